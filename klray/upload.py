"""``python -m klray.upload RUN_DIR``: sends a run's kept records to MLflow."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from klray.cli import Parser, run_command


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(
        prog="klray.upload",
        description="Sends the records of a run, and of the runs below it, to MLflow: what is not there yet, each "
        "point once. Runs that a killed command left RUNNING are ended.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="a run's directory, with records.jsonl in it")
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="where to send it: http://HOST:PORT or sqlite:///PATH/mlflow.db (default: the run's own)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Sends what MLflow does not have yet; 0 when all of it is there, 2 with one line on stderr when not."""
    args = parse(argv)
    return run_command("klray.upload", lambda: _upload(args))


def _upload(args: Namespace) -> int:
    from klray.tracking.stale import upload_all
    from klray.tracking.state import TrackingError, load_state, redact

    try:
        count = upload_all(args.run_dir, args.tracking_uri)
        state = load_state(args.run_dir)
    except OSError as error:
        raise TrackingError(str(error)) from error
    where = f"{redact(state.uri)}, experiment {state.experiment}, run {state.run_id}" if state else "MLflow"
    print(f"{count} records sent to {where}" if count else f"nothing left to send, all is at {where}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
