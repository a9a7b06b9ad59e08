"""A function as one CUDA graph: one launch from the host where there were thousands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Result = TypeVar("Result")


class CudaGraph(Generic[Result]):
    """Calls ``function`` as it is for ``warm_up`` calls, then captures it and replays what was captured.

    What changes from call to call must stand in tensors that keep their place. Where the function cannot be captured,
    it goes on as it is, and ``refused`` is told why. The result is tensors, in tuples if several; each call's its own.
    """

    def __init__(self, function: Callable[[], Result], refused: Callable[[str], None], warm_up: int = 3) -> None:
        self.function, self.refused, self.warm_up = function, refused, warm_up
        self.stream: torch.cuda.Stream | None = None  # autograd remembers the stream it ran on: the one captured
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Result | None = None

    def __call__(self) -> Result:
        if self.graph is None and self.warm_up == 0:
            self._capture()
        if self.graph is not None and self.result is not None:
            self.graph.replay()
            return tree_map_only(Tensor, Tensor.clone, self.result)
        self.warm_up -= 1
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.function()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _capture(self) -> None:
        """Nothing is computed here: the state stays what it was."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                self.result = self.function()
            self.graph = graph
        except RuntimeError as error:
            self.refused(" ".join(str(error).split())[:200])
