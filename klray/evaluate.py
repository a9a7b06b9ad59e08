"""Quality of a model's images: python -m klray.evaluate --checkpoint runs/NAME --solver ddim unipc_3 --nfe 5 10 20."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klray.cli import Parser, add_sampling_flags, check_sampling_flags, options_of, run_command

if TYPE_CHECKING:
    from klray.cluster.evaluate_job import Cell, Features
    from klray.metrics.reference import Reference
    from klray.tracking.evaluation_run import EvaluationRun
    from klray.training.model import Model


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
    parser.add_argument("--repeats", type=int, default=1, help="blocks of N seeds each; gives mean and deviation")
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
    import torch
    from tqdm import tqdm

    from klray.build import build_sampler
    from klray.cluster.connect import default_workers
    from klray.cluster.evaluate_job import EvaluationTask, Features, measure
    from klray.metrics.features import find_extractor
    from klray.metrics.scores import check_metrics
    from klray.parallel.mesh import Mesh
    from klray.tracking.find import checkpoint_folder
    from klray.training.model import load_model
    from klray.training.sampling import Drawing, image_grid

    _check(args)
    check_metrics(args.metrics)
    checkpoint = checkpoint_folder(args.checkpoint, args.tracking_uri).resolve()
    clip = None if args.clip_x0 is None else args.clip_x0 == "yes"
    model = load_model(checkpoint, torch.device("cpu"), clip_x0=clip, mesh=Mesh(1, args.basis))
    cells = _cells(args, model)
    samplers = [build_sampler(cell.sampling, cell.grid) for cell in cells]
    name, note = find_extractor(args.features, args.inception_weights)
    features = Features(name, args.inception_weights)
    for text in (model.assumed, note, _too_few(args)):
        if text is not None:
            print(f"note: {text}", flush=True)
    workers = args.workers or default_workers() * args.basis
    reference = _reference(args, model, features, workers)
    run = _run_of(args, model, features, reference)
    described = [_describe(cell, sampler.nfe) for cell, sampler in zip(cells, samplers, strict=True)]
    missing = [index for index, settings in enumerate(described) if not run.has(settings)]
    blocks = [(cell, block, _seeds(args, block)) for cell in missing for block in range(args.repeats)]
    task = EvaluationTask(Drawing(checkpoint, args.batch_size, clip, args.compile), cells, features)
    found: list[Any] = []
    with run, tqdm(total=len(blocks) * args.num_samples, unit=" images", smoothing=0.1, mininterval=0.5) as bar:
        for result in measure(
            task, blocks, args.metrics, reference, workers=workers, basis=args.basis, progress=bar.update
        ):
            found.append(result)
            if len(found) < args.repeats:
                continue
            nfe = samplers[result.cell].nfe
            row = {
                **described[result.cell],
                "network_evals": nfe * model.evals,
                "images_per_s": args.num_samples * args.repeats / sum(each.seconds for each in found),
                "scores": _over_blocks([each.scores for each in found]),
            }
            run.add(described[result.cell], row, image_grid(found[0].images))
            found.clear()
        rows = run.finish(("fid", "kid", "is", "precision", "recall"))
    _print_table(rows)
    print(f"\nin {run.folder}: table.csv, quality.png, samples.png, and a folder for each cell")
    return 0


def _check(args: Namespace) -> None:
    from klray.config import ConfigError

    check_sampling_flags(args)
    for flag, least in (("num_samples", 2), ("repeats", 1), ("seed", 0), ("reference_images", 2)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise ConfigError(f"--{flag.replace('_', '-')} must be >= {least}, got {value}")


def _cells(args: Namespace, model: Model) -> list[Cell]:
    """Every solver with every grid and NFE."""
    from itertools import product

    from klray.cluster.evaluate_job import Cell
    from klray.discretize.grid_files import grid_of
    from klray.training.sampling import sampling_of

    cells = []
    options = options_of(args.option) or None
    for solver, timesteps, nfe in product(args.solver or [None], args.timesteps or [None], args.nfe or [None]):
        chosen = {"solver": solver, "nfe": nfe, "options": options}
        grid = grid_of(timesteps, model, sampling_of(model, **chosen), force=args.force)
        cells.append(Cell(sampling_of(model, grid, timesteps=timesteps, **chosen), grid))
    return cells


def _describe(cell: Cell, nfe: int) -> dict[str, Any]:
    """What tells a cell from others."""
    from dataclasses import asdict

    settings = cell.sampling.model_dump(mode="json", include={"solver", "timesteps", "options"})
    points = {} if cell.grid is None else {"grid": asdict(cell.grid)}
    return {**settings, **points, "nfe": nfe}


def _seeds(args: Namespace, block: int) -> range:
    first = args.seed + block * args.num_samples
    return range(first, first + args.num_samples)


def _too_few(args: Namespace) -> str | None:
    if "fid" not in args.metrics or args.num_samples >= 10_000:
        return None
    return (
        f"FID of {args.num_samples:,} images is biased upwards: compare it only with FIDs of as many images, and use "
        "--num-samples 10000 or more, or KID"
    )


def _reference(args: Namespace, model: Model, features: Features, workers: int) -> Reference:
    """Statistics of the images to compare with."""
    from klray.cluster.evaluate_job import reference_features
    from klray.config import ConfigError, load_config
    from klray.metrics.reference import load_reference, read_npz
    from klray.training.data import images_of

    if args.reference.endswith(".npz"):
        return read_npz(Path(args.reference))
    if args.reference not in ("train", "held_out"):
        raise ConfigError(f"--reference must be train, held_out or an .npz file, got {args.reference!r}")
    config = model.config if args.data is None else load_config(args.data)
    if config is None:
        raise ConfigError("--data must name a preset: an imported model does not know its training images")
    data = images_of(config.data)
    images = getattr(data, args.reference)[: args.reference_images]
    if images.shape[1:] != model.shape:
        raise ConfigError(f"the model draws images {list(model.shape)}, --data holds {list(images.shape[1:])}")
    name = args.reference if args.reference_images is None else f"{args.reference}_{len(images)}"
    return load_reference(
        images, data.fingerprint, name, features.name, lambda all_: reference_features(all_, features, workers)
    )


def _run_of(args: Namespace, model: Model, features: Features, reference: Reference) -> EvaluationRun:
    import hashlib
    import json

    from klray.tracking.evaluation_run import EvaluationRun
    from klray.tracking.mlflow_upload import resolve_uri
    from klray.tracking.state import load_state
    from klray.tracking.train_run import git_commit, hardware
    from klray.training.checkpoint import read_state

    about = {
        "evaluation.model": model.fingerprint,
        "evaluation.num_samples": args.num_samples,
        "evaluation.repeats": args.repeats,
        "evaluation.seed": args.seed,
        "evaluation.metrics": " ".join(args.metrics),
        "evaluation.features": features.name,
        "evaluation.reference": reference.name,
        "evaluation.reference_images": reference.count,
        "evaluation.reference_fingerprint": reference.fingerprint,
        "evaluation.clip_x0": model.clip_x0,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    parent = next((folder for folder in model.folder.parents if (folder / "run.json").exists()), None)
    state = None if parent is None else load_state(parent)
    uri = args.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or (state.uri if state else None)
    uri = None if uri == "off" else resolve_uri(uri, Path.cwd())
    root = args.out or (Path("evaluations") if parent is None else parent / "evaluations")
    return EvaluationRun(
        root.resolve() / f"{features.name}-{reference.name}-{args.num_samples}-{digest}",
        uri=uri,
        experiment=args.experiment or (state.experiment if state else "klray"),
        parent_dir=parent if state is not None and state.uri == uri else None,
        about=about,
        tags={"klray.git": git_commit(), "klray.hardware": hardware(), "klray.checkpoint": str(model.folder)},
        step=0 if model.config is None else read_state(model.folder)["progress"]["images_seen"],
    )


def _over_blocks(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means over the blocks, and of more than one their standard deviations as ``<score>_sd``."""
    from statistics import fmean, stdev

    means = {key: fmean(block[key] for block in scores) for key in scores[0]}
    if len(scores) > 1:
        means |= {f"{key}_sd": stdev(block[key] for block in scores) for key in scores[0] if not key.endswith("_std")}
    return means


def _print_table(rows: list[dict[str, Any]]) -> None:
    fixed = ["solver", "timesteps", "nfe", "network_evals"]
    scores = [key for key in rows[0] if key not in (*fixed, "options", "grid")]
    lines = [[*fixed, *scores]]
    lines += [
        [*(str(row[key]) for key in fixed), *(f"{row.get(key, float('nan')):.5g}" for key in scores)] for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
