"""Independent pieces of sampling or evaluation: in this process, or spread over Ray workers, with the same results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from klray.errors import RunError
from klray.parallel.mesh import Mesh

if TYPE_CHECKING:
    from klray.cluster.pool import Place, Report, Work


class Task(Protocol):
    """What every worker is given: it loads what it needs once, then does one piece after the other."""

    def start(self, device: torch.device, mesh: Mesh) -> Callable[[Any], Any]: ...


def spread(
    task: Task, pieces: Sequence[Any], *, workers: int, basis: int = 1, cpus_per_worker: float | None = None
) -> Iterator[Any]:
    """The result of each piece, in their order. With one worker nothing of Ray is started.

    Args:
        workers: processes; ``basis`` of them share each piece, its terms spread over them.
        cpus_per_worker: for workers on Ray, one too, that share the cluster with others.

    Raises:
        UserError: as the task raises it, or where the workers do not fit.
        RunError: where a piece failed twice.
    """
    if workers == 1 and basis == 1 and cpus_per_worker is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        work = task.start(device, Mesh())
        for piece in pieces:
            yield work(piece)
        return
    from klray.cluster.connect import connect
    from klray.cluster.pool import run_jobs

    connect()
    early: dict[int, Any] = {}
    due = 0
    for outcome in run_jobs(_prepare, task, pieces, workers=workers, group_size=basis, cpus_per_worker=cpus_per_worker):
        if outcome.error is not None:
            raise RunError(f"a worker failed: {outcome.error}")
        early[outcome.index] = outcome.value
        while due in early:
            yield early.pop(due)
            due += 1


def _prepare(place: Place, task: Task) -> Work:
    work = task.start(place.device, Mesh(1, place.size, place.rank))

    def do(piece: Any, report: Report) -> Any:
        return work(piece)

    return do
