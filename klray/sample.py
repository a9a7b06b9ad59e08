"""Images from a trained model: python -m klray.sample --checkpoint runs/NAME --nfe 20. Seeds fix each image."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from klray.cli import Parser, add_sampling_flags, check_sampling_flags, options_of, run_command, seeds_of

if TYPE_CHECKING:
    from klray.sampling.model import Model


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.sample", description=__doc__)
    add_sampling_flags(parser)
    parser.add_argument("--solver", help="sampling method (default: the model's sampling.solver)")
    parser.add_argument(
        "--nfe", type=int, help="score evaluations an image (default: what the model's sampling.num_steps take)"
    )
    parser.add_argument(
        "--timesteps",
        metavar="NAME|FILE",
        help="time grid, learned, or a list in a .json or an LD3 .pt file (default: the model's)",
    )
    parser.add_argument("--seeds", default="0-63", metavar="A-B", help="one image for each seed, A to B (default 0-63)")
    parser.add_argument(
        "--out",
        type=Path,
        action="append",
        help="a grid (.png), all images (.zip, .npz, or a folder); repeatable (default samples.png)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files of --out that exist")
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write the model as a diffusers DDIMPipeline")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 the user's mistake, 1 a failure, 130 stopped by Ctrl-C."""
    args = parse(argv)
    return run_command("klray.sample", lambda: _sample(args))


def _sample(args: Namespace) -> int:
    from contextlib import ExitStack

    import torch
    from tqdm import tqdm

    from klray.build import build_sampler
    from klray.cluster.connect import default_workers
    from klray.parallel.mesh import Mesh
    from klray.sampling.draw import Drawing, SamplingTask, batches_of, sampling_of
    from klray.sampling.find import checkpoint_folder
    from klray.sampling.image_files import check_targets, open_targets
    from klray.sampling.job import spread
    from klray.sampling.model import load_model
    from klray.schedules.grid_files import grid_of

    check_sampling_flags(args)
    batches = batches_of(seeds_of(args.seeds), args.batch_size)
    targets = args.out or [Path("samples.png")]
    check_targets(targets, overwrite=args.overwrite)
    _check_export(args.export)
    checkpoint = checkpoint_folder(args.checkpoint, args.tracking_uri).resolve()
    model = load_model(checkpoint, torch.device("cpu"), mesh=Mesh(1, args.basis))
    if model.assumed is not None:
        print(f"note: {model.assumed}")
    chosen = {
        "solver": args.solver,
        "nfe": args.nfe,
        "options": options_of(args.option) or None,
        "final": args.final,
        "amp": args.amp,
    }
    grid = grid_of(args.timesteps, model, sampling_of(model, **chosen), force=args.force)
    settings = sampling_of(model, grid, timesteps=args.timesteps, **chosen)
    sampler = build_sampler(settings, grid)
    clip = None if args.clip_x0 is None else args.clip_x0 == "yes"
    drawing = Drawing.of(checkpoint, settings, batch_size=args.batch_size, clip_x0=clip, compile=args.compile)
    task = SamplingTask(drawing, settings, grid)
    workers = args.workers or default_workers() * args.basis
    with ExitStack() as stack:
        write = stack.enter_context(open_targets(targets))
        if args.export is not None:
            _export(model, args.export)
        bar = stack.enter_context(tqdm(total=sum(map(len, batches)), unit=" images", smoothing=0.1, mininterval=0.5))
        for seeds, images in zip(batches, spread(task, batches, workers=workers, basis=args.basis), strict=True):
            write(seeds, images)
            bar.update(len(seeds))
    evals = sampler.nfe * model.evals
    how = f"{settings.solver}, {settings.timesteps}, {sampler.nfe} NFE, {evals} network evaluations an image"
    for target in targets:
        print(f"wrote {target}: seeds {args.seeds}, {how}")
    return 0


def _check_export(folder: Path | None) -> None:
    from klray.config import ConfigError

    if folder is not None and folder.exists() and (folder.is_file() or next(folder.iterdir(), None) is not None):
        raise ConfigError(f"--export {folder} exists and is no empty folder; choose another name")


def _export(model: Model, folder: Path) -> None:
    from klray.build import build_process
    from klray.config import ConfigError
    from klray.networks.weights import save_pipeline
    from klray.runs.checkpoint import load_network

    if model.config is None:
        raise ConfigError("--export writes a klray model in diffusers' format; this model has it already")
    _, network = load_network(model.folder)
    try:
        save_pipeline(network, build_process(model.config), model.config.loss.prediction, folder, clip_x0=model.clip_x0)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    print(f"wrote {folder}: diffusers.DDIMPipeline.from_pretrained({str(folder)!r})")


if __name__ == "__main__":
    raise SystemExit(main())
