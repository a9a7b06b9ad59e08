"""Builds and registers "seconddev", the device of ``second_device.cpp``, and counts what happens on it.

It shows where devices would meet, what the host would wait for, how many kernels and bytes klray asks for. It cannot
show speed, streams and races, CUDA's own kernels (Triton's and cuDNN's among them), captured graphs, NCCL, nor what
klray does only where a device's type is "cuda".
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import types
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch

import klray

NAME = "seconddev"
DEVICE_SOURCE = Path(__file__).with_suffix(".cpp")
KLRAY = Path(klray.__file__).parent


class NoCompilerError(Exception):
    """The device cannot be built on this machine."""


class BuildError(Exception):
    """The compiler refuses the device's source."""


@cache
def second_device() -> torch.device:
    """The device. The first call builds it, unless an earlier process has, and registers it in this process for good.

    Autograd only knows devices that were there at the first backward pass of the process.

    Raises:
        NoCompilerError: where there is nothing to build it with.
        BuildError: with what the compiler says.
    """
    library()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _torch_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return torch.device(NAME, 0)


@cache
def library() -> ctypes.CDLL:
    """The compiled file, kept under its source's and torch's digest in the user's cache, or among temporary files."""
    key = hashlib.sha256(f"{torch.__version__} {sys.version}".encode() + DEVICE_SOURCE.read_bytes()).hexdigest()[:16]
    folder = _cache_folder()
    built = folder / f"second_device_{key}.so"
    with (folder / "lock").open("w") as lock:  # of many test processes one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not built.exists():
            _compile(built)
    loaded = ctypes.CDLL(str(built))
    for name in ("seconddev_bytes_now", "seconddev_bytes_peak"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


def _compile(target: Path) -> None:
    from torch.utils import cpp_extension  # looks for CUDA's compiler when it is imported

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        raise NoCompilerError("no C++ compiler builds the second device; install g++, or name one in CXX")
    aside = target.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-O1", "-w", "-fPIC", "-shared", str(DEVICE_SOURCE), "-o", str(aside)]
    command += [part for path in cpp_extension.include_paths() for part in ("-isystem", path)]
    command += [f"-L{path}" for path in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{DEVICE_SOURCE.name} does not compile:\n{done.stderr[:4000]}")
    aside.rename(target)


def _cache_folder() -> Path:
    """The user's cache; a folder among temporary files where that cannot be written to."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "klray-tests"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = Path(tempfile.gettempdir()) / f"klray-tests-{os.getuid()}"
        folder.mkdir(exist_ok=True)
        return folder


def _torch_module() -> types.ModuleType:
    """What torch.cuda is to CUDA, as far as torch asks for it. Random numbers come from the CPU's generator."""
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.synchronize = lambda device=None: None
    module.max_memory_allocated = lambda device=None: library().seconddev_bytes_peak()
    module.reset_peak_memory_stats = lambda device=None: library().seconddev_forget_peak()
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    return module


def take_klrays_operators() -> None:
    """klray's own operators that exist by now are one kernel each, as they are on a GPU."""
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        if space == "klray" and not torch._C._dispatch_has_kernel_for_dispatch_key(full, "PrivateUse1"):
            library().seconddev_take_as_one_kernel(space.encode(), name.encode())


class Memory:
    """Bytes that tensors on the device hold."""

    @staticmethod
    def now() -> int:
        """At this moment."""
        return library().seconddev_bytes_now()

    @staticmethod
    def take_peak() -> int:
        """The most since the last call."""
        peak: int = library().seconddev_bytes_peak()
        library().seconddev_forget_peak()
        return peak


class Counting:
    """What happens on the device within a ``with`` block; one at a time.

    Attributes:
        lines: (kind, operator, line of klray that asked for it) -> how often. The kinds:
            ``launch``: a kernel, about as CUDA has them;
            ``read``: the host waits for the device: item, copies to the CPU, sizes that depend on data;
            ``upload``: a copy of the host's pageable memory, for which the host waits, too.
    """

    def __init__(self) -> None:
        self.lines: Counter[tuple[str, str, str]] = Counter()

    def __enter__(self) -> Counting:
        global _counting
        assert _counting is None, "one Counting at a time"
        _counting = self
        library().seconddev_listen(_listener)
        return self

    def __exit__(self, *error: object) -> None:
        global _counting
        library().seconddev_listen(None)
        _counting = None

    @property
    def reads(self) -> int:
        """How often the host waited for a value."""
        return self._of("read")

    @property
    def uploads(self) -> int:
        """How often the host waited for a copy of its own."""
        return self._of("upload")

    @property
    def launches(self) -> int:
        """Kernels."""
        return self._of("launch")

    def _of(self, kind: str) -> int:
        return sum(count for (each, _, _), count in self.lines.items() if each == kind)

    def beyond(self, other: Counting, steps: int, *kinds: str) -> dict[str, float]:
        """What each of ``steps`` more steps than in ``other`` cost, by line, the most first; empty where nothing."""
        more = {key: count - other.lines[key] for key, count in self.lines.items() if key[0] in kinds}
        ordered = sorted(more.items(), key=lambda item: -item[1])
        return {" ".join(key): count / steps for key, count in ordered if count}


_counting: Counting | None = None


@ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)
def _listener(kind: bytes, op: bytes) -> None:
    if _counting is not None:
        _counting.lines[kind.decode(), op.decode(), _line_of_klray()] += 1


def _line_of_klray() -> str:
    """The innermost line of klray that is being run; autograd's own thread runs none."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        file = _within_klray(frame.f_code.co_filename)
        if file:
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back
    return "no line of klray"


@cache
def _within_klray(filename: str) -> str | None:
    path = Path(filename)
    return str(path.relative_to(KLRAY.parent)) if path.is_relative_to(KLRAY) else None
