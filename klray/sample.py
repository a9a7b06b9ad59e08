"""Images from a trained model: python -m klray.sample --checkpoint runs/NAME --nfe 20. Seeds fix each image."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from klray.cli import Parser, run_command


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.sample", description=__doc__)
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR|RUN_ID", help="a run, a checkpoint, an MLflow run id"
    )
    parser.add_argument("--tracking-uri", metavar="URI", help="where the MLflow run id is to be found")
    parser.add_argument("--solver", default="ddim", help="sampling method")
    parser.add_argument("--nfe", type=int, help="score evaluations an image (default: the model's sampling.num_steps)")
    parser.add_argument("--timesteps", help="time grid (default: the model's sampling.timesteps)")
    parser.add_argument("--seeds", default="0-63", metavar="A-B", help="one image for each seed, A to B (default 0-63)")
    parser.add_argument("--batch-size", type=int, default=64, help="images that go through the network at once")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="the grid's PNG file")
    parser.add_argument("--export", type=Path, metavar="DIR", help="also write the model as a diffusers DDIMPipeline")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 the user's mistake, 130 stopped by Ctrl-C."""
    args = parse(argv)
    return run_command("klray.sample", lambda: _sample(args))


def _sample(args: Namespace) -> int:
    import torch
    from PIL import Image

    from klray.build import build_denoiser, build_process, build_sampler
    from klray.config import ConfigError, override
    from klray.networks.weights import save_pipeline
    from klray.tracking.find import checkpoint_folder
    from klray.training.checkpoint import load_network
    from klray.training.sampling import image_grid, sample_images

    seeds = _seeds(args.seeds)
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size must be >= 1, got {args.batch_size}")
    config, network = load_network(checkpoint_folder(args.checkpoint, args.tracking_uri))
    asked = {"solver": args.solver, "num_steps": args.nfe, "timesteps": args.timesteps}
    changes = [(f"sampling.{key}", value) for key, value in asked.items() if value is not None]
    config = override(config.model_dump(mode="json"), changes)
    solver, grid = build_sampler(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    process = build_process(config)
    denoiser = build_denoiser(config, network.to(device), process)
    if args.export is not None:
        try:
            save_pipeline(network, process, denoiser.prediction, args.export, clip_x0=config.sampling.clip_x0)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        print(f"wrote {args.export}: diffusers.DDIMPipeline.from_pretrained({str(args.export)!r})")
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    images = sample_images(
        denoiser,
        solver,
        grid(process),
        seeds,
        shape,
        batch_size=args.batch_size,
        device=device,
        progress=lambda done: print(f"\r{done}/{len(seeds)} images", end="", flush=True),
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(images)).save(args.out)
    nfe = solver.nfe(config.sampling.num_steps)
    evals = nfe * (1 if network.wide else process.num_terms)
    print(f"\nwrote {args.out}: seeds {args.seeds}, {args.solver}, {nfe} NFE, {evals} network evaluations an image")
    return 0


def _seeds(text: str) -> range:
    from klray.config import ConfigError

    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit() and int(first) <= int(last or first)):
        raise ConfigError(f"--seeds must be A-B with A <= B, or one number, got {text!r}; for example 0-63")
    return range(int(first), int(last or first) + 1)


if __name__ == "__main__":
    raise SystemExit(main())
