"""Quality of a model's images: python -m klray.evaluate --checkpoint runs/NAME --solver ddim unipc_3 --nfe 5 10 20."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from klray.cli import (
    CallableModule,
    Parser,
    add_sampling_flags,
    check_sampling_flags,
    columns,
    image_seeds,
    options_of,
    run_command,
)

if TYPE_CHECKING:
    from klray.evaluation.job import Cell
    from klray.evaluation.record import Row
    from klray.sampling.model import Model


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.evaluate", description=__doc__)
    add_sampling_flags(parser)
    parser.add_argument("--solver", nargs="+", help="sampling methods (default: the model's sampling.solver)")
    parser.add_argument("--nfe", nargs="+", type=int, help="score evaluations an image (default: the model's)")
    parser.add_argument(
        "--timesteps", nargs="+", metavar="NAME|FILE", help="time grids, or learned (default: the model's)"
    )
    parser.add_argument(
        "--num-samples", type=int, default=10_000, metavar="N", help="images of a block (default 10000)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="blocks of N seeds each, for mean and deviation (default 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the first image's seed (default 0)")
    parser.add_argument("--metrics", nargs="+", default=["fid", "kid"], help="of fid kid is pr (default fid kid)")
    parser.add_argument("--features", help="inception, efficientnet_lite0 or one of torch-fidelity's extractors")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="torch-fidelity's weights file")
    parser.add_argument(
        "--reference",
        default="train",
        metavar="train|held_out|FILE",
        help="what to compare with, or an .npz (mu, sigma)",
    )
    parser.add_argument("--reference-images", type=int, metavar="N", help="only the first N of them")
    parser.add_argument(
        "--data", metavar="NAME|PATH", help="the preset or YAML file of the data (default: the model's)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of evaluations (default: the run's own)")
    parser.add_argument("--experiment", help="MLflow experiment (default: the training run's)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 the user's mistake, 1 a failure, 130 stopped by Ctrl-C."""
    args = parse(argv)
    return run_command(
        "klray.evaluate", lambda: _evaluate(args), "The same command again goes on with what is missing."
    )


def _evaluate(args: Namespace) -> int:
    from klray.evaluation.cells import text_of

    rows = evaluate_by(args)
    print(columns(text_of(rows)))
    print(f"\nin {args.folder}: table.csv, quality.png, samples.png, and a folder for each cell")
    return 0


def evaluate_by(args: Namespace) -> list[Row]:
    """Measures what the command line says and what ``args.folder`` does not hold yet; a row for each cell it holds.

    Raises:
        UserError, RunError: for what cannot be measured.
    """
    import torch

    from klray.cluster.connect import default_workers
    from klray.evaluation.cells import Yardstick, evaluate_cells, open_evaluation
    from klray.evaluation.features import find_extractor
    from klray.evaluation.job import Features
    from klray.evaluation.scores import check_metrics
    from klray.parallel.mesh import Mesh
    from klray.sampling.draw import Drawing
    from klray.sampling.find import checkpoint_folder
    from klray.sampling.model import load_model
    from klray.tracking.state import asked_uri, load_state

    _check(args)
    check_metrics(args.metrics)
    checkpoint = checkpoint_folder(args.checkpoint, args.tracking_uri).resolve()
    clip = None if args.clip_x0 is None else args.clip_x0 == "yes"
    model = load_model(checkpoint, torch.device("cpu"), clip_x0=clip, mesh=Mesh(1, args.basis))
    cells = _cells(args, model)
    name, note = find_extractor(args.features, args.inception_weights)
    for text in (model.assumed, note, _too_few(args)):
        if text is not None:
            print(f"note: {text}", flush=True)
    yardstick = Yardstick(
        features=Features(name, args.inception_weights),
        metrics=args.metrics,
        num_samples=args.num_samples,
        repeats=args.repeats,
        seed=args.seed,
        reference=args.reference,
        reference_images=args.reference_images,
        data=args.data,
    )
    workers = args.workers or default_workers() * args.basis
    reference = yardstick.images(model, workers)
    parent = next((folder for folder in model.folder.parents if (folder / "run.json").exists()), None)
    state = None if parent is None else load_state(parent)
    run = open_evaluation(
        model,
        yardstick,
        reference,
        root=args.out or (Path("evaluations") if parent is None else parent / "evaluations"),
        uri=asked_uri(args.tracking_uri, state),
        experiment=args.experiment or (state.experiment if state else "klray"),
        parent=parent,
    )
    drawing = Drawing.of(checkpoint, cells[0].sampling, batch_size=args.batch_size, clip_x0=clip, compile=args.compile)
    args.folder = run.folder
    return evaluate_cells(model, cells, drawing, yardstick, reference, run, workers=workers, basis=args.basis)


def _check(args: Namespace) -> None:
    from klray.config import ConfigError

    check_sampling_flags(args)
    for flag, least in (("num_samples", 2), ("repeats", 1), ("seed", 0), ("reference_images", 2)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag.replace('_', '-')} must be >= {least}, got {value}")
    image_seeds("--num-samples and --repeats", args.seed, args.num_samples * args.repeats)


def _cells(args: Namespace, model: Model) -> list[Cell]:
    """Every solver with every grid and NFE."""
    from itertools import product

    from klray.build import build_sampler
    from klray.evaluation.job import Cell
    from klray.sampling.draw import sampling_of
    from klray.schedules.grid_files import grid_of

    cells = []
    options = options_of(args.option) or None
    for solver, timesteps, nfe in product(args.solver or [None], args.timesteps or [None], args.nfe or [None]):
        chosen = {"solver": solver, "nfe": nfe, "options": options, "final": args.final, "amp": args.amp}
        grid = grid_of(timesteps, model, sampling_of(model, **chosen), force=args.force)
        cells.append(Cell(sampling_of(model, grid, timesteps=timesteps, **chosen), grid))
        build_sampler(cells[-1].sampling, grid)  # refuses what cannot be drawn
    return cells


def _too_few(args: Namespace) -> str | None:
    if "fid" not in args.metrics or args.num_samples >= 10_000:
        return None
    return (
        f"FID of {args.num_samples:,} images is biased upwards: compare it only with FIDs of as many images, and use "
        "--num-samples 10000 or more, or KID"
    )


if __name__ == "__main__":
    raise SystemExit(main())
sys.modules[__name__].__class__ = CallableModule
