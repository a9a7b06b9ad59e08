"""One training run: python -m klray.train --config digits. The same command again resumes it."""

from __future__ import annotations

import functools
import os
import sys
import threading
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klray.cli import CallableModule, Parser, run_command, steps_between

if TYPE_CHECKING:
    from klray.config import Config
    from klray.data.sources import ImageData


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="a preset or a YAML file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; repeatable"
    )
    parser.add_argument("--seed", type=int, help="the run's seed (the same as --set seed=...)")
    parser.add_argument("--runner", choices=("ray", "torchrun", "local"), default="ray", help="where to train")
    parser.add_argument(
        "--workers",
        metavar="N|LEAST-MOST",
        help="processes (default: one for each GPU, else 1); of LEAST-MOST as many as there is room for at any time",
    )
    parser.add_argument("--name", help="the run's name (default: preset + hash of the configuration)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder that holds the runs' folders")
    parser.add_argument(
        "--profile", metavar="A:B", help="trace steps A to B, counted from where this starts, into the run's profile/"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained and what it costs")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 the user's mistake, 1 a failure, 130 stopped by Ctrl-C, 143 by SIGTERM."""
    args = parse(argv)
    return run_command("klray.train", lambda: train_by(args), lambda: _how_to_go_on(args))


def _how_to_go_on(args: Namespace) -> str:
    run_dir: Path | None = getattr(args, "run_dir", None)
    if run_dir is None or not any(run_dir.glob("checkpoints/checkpoint_*")):
        return "There is no checkpoint yet: the same command starts anew."
    return "The same command again goes on from the last checkpoint."


def train_by(args: Namespace) -> int:
    """Trains as the command line says; ``args.run_dir`` is where. Raises UserError and RunError."""
    from klray.build import build_sampler
    from klray.config import ConfigError, load_config
    from klray.parallel.mesh import resolve_mesh
    from klray.runs.run_dir import check_run
    from klray.training.initialise import checked_start

    args.profile = args.profile and steps_between("--profile", args.profile)
    seed = [] if args.seed is None else [f"seed={args.seed}"]
    config = load_config(args.config, [*args.set, *seed])
    build_sampler(config.sampling)
    config = checked_start(config)
    least, workers = _workers(args)
    data_size, basis_size = resolve_mesh(
        workers,
        data=config.mesh.data,
        basis=config.mesh.basis,
        terms_per_step=config.evals_per_image,
        batch_size=config.optimizer.batch_size,
    )
    if least < workers and basis_size > 1:
        raise ConfigError(f"mesh.basis must be 1 where --workers is a range, got {basis_size}")
    name = args.name or config.default_name()
    if args.dry_run:
        _dry_run(config, name, (data_size, basis_size))
        check_run(args.runs, name, config)
        _data(config)  # what it would cost is said even where this refuses
        return 0
    data = _data(config)
    if args.runner == "torchrun" and os.environ["RANK"] != "0":
        from klray.runs.progress import finished

        args.run_dir = run_dir = (args.runs / name).resolve()
        if not finished(config, run_dir, warn=lambda text: None):  # rank 0 asks the same, and says it
            _in_process(config, data, (data_size, basis_size), run_dir, {}, args.profile)
        return 0
    return _drive(args, config, name, (data_size, basis_size), data, least)


def _workers(args: Namespace) -> tuple[int, int]:
    """How many processes train: at least, at most."""
    from klray.cli import workers_of
    from klray.config import ConfigError

    least, most = (None, None) if args.workers is None else workers_of(args.workers)
    if args.runner == "torchrun":
        if "WORLD_SIZE" not in os.environ:
            raise ConfigError(
                "--runner torchrun is started by torchrun: torchrun --nproc-per-node 2 -m klray.train ..."
            )
        world = int(os.environ["WORLD_SIZE"])
        if {least, most} - {None, world}:
            raise ConfigError(f"--workers must be torchrun's number of processes, {world}, got {args.workers}")
        return world, world
    if args.runner == "local":
        if {least, most} - {None, 1}:
            raise ConfigError(
                f"--runner local trains in one process, got --workers {args.workers}; use torchrun or ray"
            )
        return 1, 1
    if least is not None and most is not None:
        return least, most
    from klray.cluster.connect import default_workers

    return (default_workers(),) * 2


def _data(config: Config) -> ImageData:
    from klray.config import ConfigError
    from klray.data.sources import images_of

    settings = config.data
    data = images_of(settings)
    channels = data.train.shape[1]
    if channels != settings.channels:
        raise ConfigError(f"data.channels must be {channels} for these images, got {settings.channels}")
    return data


def _dry_run(config: Config, name: str, mesh_shape: tuple[int, int]) -> None:
    import yaml

    from klray.build import build_network
    from klray.cli import duration
    from klray.runs.progress import steps_of
    from klray.training.cost import cost_of, step_work
    from klray.training.step_time import expected_lines, step_time, this_machine

    cost = cost_of(config, build_network(config))
    data_size, basis_size = mesh_shape
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip())
    print(f"\nrun         {name}")
    print(f"parameters  {cost['cost.parameters']:,}")
    print(f"FLOPs       {cost['cost.flops_per_eval'] / 1e9:.3f} GFLOP a network evaluation, forward, of one image")
    print(f"            {cost['cost.train_flops_per_image'] / 1e9:.3f} GFLOP a training image")
    print(f"workers     {data_size * basis_size} = {data_size} (data) x {basis_size} (basis)")
    work, machine = step_work(config, cost), this_machine()
    print("\n".join(expected_lines(work, machine, data_size, basis_size)))
    if config.budget.unit == "seconds":
        print(f"in all      {duration(config.budget.amount)} of training")
    else:
        seconds = steps_of(config) * step_time(work, machine, data_size, basis_size).total
        print(f"in all      about {duration(seconds)} of training, validation and start-up not counted")


def _drive(args: Namespace, config: Config, name: str, mesh_shape: tuple[int, int], data: ImageData, least: int) -> int:
    """Opens the run, follows its records, and trains."""
    from klray.runs.progress import budget_used, fits, kept
    from klray.runs.provenance import provenance_of
    from klray.runs.records import RecordWriter
    from klray.runs.run_dir import open_run
    from klray.tracking.mlflow_upload import TrackingError, Uploader, prepare
    from klray.tracking.stale import send_rest
    from klray.tracking.state import asked_uri
    from klray.tracking.view import where_to_look
    from klray.training.evaluate_during import SnapshotEvaluator
    from klray.training.progress import ProgressLines, summary
    from klray.training.recorded import record_scores

    tracking = config.tracking
    uri = asked_uri(tracking.uri)
    details = {"experiment": tracking.experiment, "tracking_uri": uri}
    with ExitStack() as stack:
        run_dir = stack.enter_context(open_run(args.runs, name, config, details))
        args.run_dir = run_dir
        progress = kept(run_dir, lambda text: print(f"note: {text}", flush=True))
        done = progress is not None and not fits(config, progress)
        if done and not any(run_dir.glob("snapshots/snapshot_*")):
            send_rest(run_dir)
            print(f"run {name} has finished:\n{summary(run_dir)}")
            print("A larger --set budget.amount=... goes on from here.")
            return 0
        provenance = provenance_of(config, name, run_dir)
        print(f"run {name} in {run_dir}", flush=True)
        if progress is not None:
            print(f"goes on from {progress.images_seen:,} images ({budget_used(config, progress):.0%})", flush=True)
        if uri is not None:
            try:
                prepare(uri, tracking.experiment)
            except TrackingError as error:
                print(f"note: {error}; training goes on, its records are kept", flush=True)
        say = functools.partial(print, flush=True)
        lines = ProgressLines(say)
        stack.enter_context(Uploader(run_dir, uri, tracking.experiment, name, tags=provenance, on_record=lines))
        with SnapshotEvaluator(run_dir, config.evaluation, say):
            if not done:
                _run(args, config, data, mesh_shape, run_dir, provenance, least)
        with RecordWriter(run_dir) as writer:
            record_scores(run_dir, writer, set())
    print(f"finished {name}: {summary(run_dir)}")
    if uri is not None:
        print(where_to_look(uri, run_dir))
    return 0


def _run(
    args: Namespace,
    config: Config,
    data: ImageData,
    mesh_shape: tuple[int, int],
    run_dir: Path,
    provenance: dict[str, Any],
    least: int,
) -> None:
    if args.runner == "ray":
        print("starting Ray and the workers (about half a minute)", flush=True)
        from klray.cluster.connect import connect
        from klray.training.job import SharedImages, run_on_ray
        from klray.training.stop import StopFile, on_sigterm

        connect()
        elastic = least if least < mesh_shape[0] * mesh_shape[1] else None
        images = SharedImages.of(data)
        where: dict[str, Any] = {"mesh_shape": mesh_shape, "run_dir": run_dir, "least": elastic}
        stop_file = StopFile(run_dir)
        stop_file.clear()
        with on_sigterm(stop_file.ask):
            run_on_ray(config, images, provenance=provenance, profile=args.profile, **where)
    else:
        _in_process(config, data, mesh_shape, run_dir, provenance, args.profile)


def _in_process(
    config: Config,
    data: ImageData,
    mesh_shape: tuple[int, int],
    run_dir: Path,
    provenance: dict[str, Any],
    profile: range | None,
) -> None:
    """Trains in this process: alone, or as one of torchrun's."""
    import torch
    import torch.distributed as dist

    from klray.parallel.mesh import collective_backend
    from klray.training.recorded import train_and_record
    from klray.training.stop import Request, on_sigterm

    device, shared = torch.device("cpu"), False
    if torch.cuda.is_available():
        cards = torch.cuda.device_count()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % cards)
        torch.cuda.set_device(device)
        shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > cards
    if mesh_shape != (1, 1):
        dist.init_process_group(collective_backend(config.mesh.backend, device, shared_gpu=shared))
    sigterm = threading.Event()
    where: dict[str, Any] = {"mesh_shape": mesh_shape, "device": device, "run_dir": run_dir}
    where["asked"] = lambda: Request.STOP if sigterm.is_set() else Request.NONE
    try:
        with on_sigterm(sigterm.set):
            train_and_record(config, data, provenance=provenance, profile=profile, **where)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
sys.modules[__name__].__class__ = CallableModule
