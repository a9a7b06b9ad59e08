"""The console script: klray train ..., klray list ..., klray --version."""

from __future__ import annotations

import importlib
import sys

import klray
from klray.cli import Parser

COMMANDS = {
    "train": "one training run; the same command again goes on",
    "tune": "a study: trials on Ray Tune, settings by Optuna",
    "compare": "ways to train under one budget, over seeds, with verdicts",
    "ld3": "learns time grids of solvers at few evaluations, in parallel",
    "sample": "images of a model",
    "evaluate": "FID, KID and others of a model, over solvers and NFE",
    "check": "checks a cluster file",
    "upload": "sends a run's kept records to MLflow",
    "list": "what there is: presets, runs, and the entries of every registry",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the command's exit status."""
    argv = sys.argv[1:] if argv is None else argv
    width = max(map(len, COMMANDS))
    told = "\n".join(f"  {name:{width}}  {does}" for name, does in COMMANDS.items())
    parser = Parser(prog="klray", usage="klray COMMAND ...; klray COMMAND --help", epilog=None)
    parser.add_argument("--version", action="version", version=f"klray {klray.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=f"of\n{told}")
    if argv and argv[0] in COMMANDS:
        if argv[0] == "list":
            return _list(argv[1:])
        status: int = importlib.import_module(f"klray.{argv[0]}").main(argv[1:])
        return status
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: klray COMMAND ...\n\n{told}\n\nklray COMMAND --help says more; klray --version")
        return 0
    parser.parse_args(argv[:1])
    return 2


def _list(argv: list[str]) -> int:
    """``klray list WHAT``."""
    from pathlib import Path

    from klray import registry

    sets = {_plural(kind): kind for kind in registry.SETS}
    parser = Parser(prog="klray list", description=COMMANDS["list"])
    parser.add_argument(
        "what", choices=["presets", "runs", *sets], metavar="WHAT", help=", ".join(["presets", "runs", *sets])
    )
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder that holds the runs' folders")
    args = parser.parse_args(argv)
    if args.what == "presets":
        from klray.config import preset_names

        print("\n".join(preset_names()))
    elif args.what == "runs":
        found = sorted(folder.parent.name for folder in args.runs.glob("*/run.json"))
        print("\n".join(found) if found else f"no runs in {args.runs}")
    else:
        print("\n".join(registry.names(sets[args.what])))
    return 0


def _plural(kind: str) -> str:
    words = {
        "backbone": "networks",
        "time grid": "timesteps",
        "basis": "bases",
        "process": "processes",
        "features": "features",
    }
    return words.get(kind, kind.replace(" ", "_") + "s")


if __name__ == "__main__":
    raise SystemExit(main())
