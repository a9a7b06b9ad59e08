"""What the entry points share: common flags, and what errors look like."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from klray.errors import RunError, StoppedError, UserError

MOST_IMAGES = 10_000_000  # of one command: their list of batches and their features are held in memory
MOST_IN_BATCH = 65_536
LAST_SEED = 2**63
MOST_PROFILED = 1_000  # steps of one trace, which is held in memory


class CallableModule(ModuleType):
    """A command's module that is also the function of its name in ``klray.api``: ``klray.train`` is both."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return getattr(importlib.import_module("klray.api"), self.__name__.rpartition(".")[2])(*args, **keywords)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def run_command(name: str, command: Callable[[], int], resume: str | Callable[[], str] = "") -> int:
    """Runs a command: the user's mistakes are one line and exit 2, a failure is one line and exit 1, Ctrl-C is 130, a
    granted SIGTERM 143.

    ``resume``: how to go on after these two, asked for then if it depends on what there is.
    """
    # Libraries below call what torch has deprecated; whoever runs a command can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")
    try:
        return command()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"{name}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: stopped. {resume if isinstance(resume, str) else resume()}", file=sys.stderr)
        return 130
    except StoppedError as stopped:
        print(f"{name}: {stopped}. {resume if isinstance(resume, str) else resume()}", file=sys.stderr)
        return 143


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that draws images from a trained model."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR|RUN_ID",
        help="a run, a checkpoint, a diffusers folder, an MLflow run id",
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="where MLflow is")
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help="of the solver, as variant=bh2; repeatable"
    )
    parser.add_argument(
        "--clip-x0", choices=("yes", "no"), help="clamp x0 to [-1, 1] (default: as the model's settings)"
    )
    add_final_flag(parser)
    parser.add_argument(
        "--amp",
        choices=("auto", "bf16", "fp16", "off"),
        help="precision of the network (default: the model's sampling.amp, auto: bf16 on GPUs that have it)",
    )
    parser.add_argument(
        "--batch-size", type=int, default=64, help="images that go through the network at once (default 64)"
    )
    parser.add_argument(
        "--workers", type=int, help="processes, on Ray if more than one (default: one for each GPU, else 1)"
    )
    parser.add_argument("--basis", type=int, default=1, help="workers that share an image's terms (default 1)")
    parser.add_argument("--force", action="store_true", help="use a learned schedule of other weights too")
    parser.add_argument("--compile", action="store_true", help="compile the network; pays for thousands of images")


def add_final_flag(parser: argparse.ArgumentParser) -> None:
    """Of every command whose images a solver makes."""
    parser.add_argument(
        "--final",
        choices=("denoise", "keep"),
        help="take out the noise that is left where the time grid ends, or keep it (default: the model's)",
    )


def check_sampling_flags(args: argparse.Namespace) -> None:
    """Refuses wrong numbers before anything is loaded.

    Raises:
        UserError: one line.
    """
    for flag in ("batch_size", "workers", "basis"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')} must be >= 1, got {value}")
    if args.batch_size > MOST_IN_BATCH:
        raise UserError(f"--batch-size must be at most {MOST_IN_BATCH}, got {args.batch_size}")
    if args.workers is not None and args.workers % args.basis:
        raise UserError(f"--basis must divide --workers, {args.workers}, got {args.basis}")


def options_of(texts: list[str]) -> dict[str, bool | float | str]:
    """``--option`` KEY=VALUE; true and false are truth values, what reads as a number is one.

    Raises:
        UserError: for a text without =.
    """
    options: dict[str, bool | float | str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option takes KEY=VALUE, got {text!r}; for example variant=bh2")
        words = {"true": True, "false": False}
        options[key.strip()] = words.get(value.strip().lower(), _number(value.strip()))
    return options


def _number(text: str) -> float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def seeds_of(text: str) -> range:
    """``A-B``, both included, or one number.

    Raises:
        UserError: for anything else, and for more images than one command draws.
    """
    ends = _ends_of(text)
    if ends is None or ends[0] > ends[1]:
        raise UserError(f"--seeds must be A-B with A <= B, or one number, got {text!r}; for example 0-63")
    return image_seeds("--seeds", ends[0], ends[1] - ends[0] + 1)


def image_seeds(flag: str, first: int, count: int) -> range:
    """The seeds of ``count`` images from ``first`` on.

    Raises:
        UserError: naming ``flag``, for more than one command draws, and beyond the seeds that there are.
    """
    if count > MOST_IMAGES:
        raise UserError(f"{flag} must ask for at most {MOST_IMAGES:,} images, got {count:,}; use several commands")
    if first + count > LAST_SEED:
        raise UserError(f"{flag} must stay below {LAST_SEED}, got {first + count - 1}")
    return range(first, first + count)


def workers_of(text: str) -> tuple[int, int]:
    """``--workers`` N or LEAST-MOST, as (least, most).

    Raises:
        UserError: for anything else.
    """
    ends = _ends_of(text.strip())
    if ends is None:
        raise UserError(f"--workers must be N, or LEAST-MOST, got {text!r}; for example 2-4")
    least, most = ends
    if least < 1:
        raise UserError(f"--workers must be >= 1, got {text}")
    if least > most:
        raise UserError(f"--workers LEAST-MOST must have LEAST <= MOST, got {text}")
    return least, most


def steps_between(flag: str, text: str) -> range:
    """``A:B``, the steps from A on and before B.

    Raises:
        UserError: naming ``flag``, for anything else, and for more steps than one trace holds.
    """
    found = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    if found is None or int(found[1]) >= int(found[2]):
        raise UserError(f"{flag} must be A:B with A < B, got {text!r}; for example 10:20")
    steps = range(int(found[1]), int(found[2]))
    if len(steps) > MOST_PROFILED:
        raise UserError(f"{flag} must hold at most {MOST_PROFILED:,} steps, got {len(steps):,}; for example 10:20")
    return steps


def _ends_of(text: str) -> tuple[int, int] | None:
    """(A, B) of A-B, (A, A) of one number."""
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", text)
    return None if found is None else (int(found[1]), int(found[2] or found[1]))


def duration(seconds: float) -> str:
    """12 s, 3 min 04 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many texts each, below each other."""
    widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
