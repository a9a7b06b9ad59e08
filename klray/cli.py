"""What the entry points share: common flags, and what errors look like."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable

from klray.errors import RunError, UserError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        raise SystemExit(2)


def run_command(name: str, command: Callable[[], int], resume: str = "") -> int:
    """Runs a command: the user's mistakes are one line and exit 2, a failure is one line and exit 1, Ctrl-C is 130."""
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
        print(f"\n{name}: stopped. {resume}", file=sys.stderr)
        return 130


def duration(seconds: float) -> str:
    """12 s, 3 min 04 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
