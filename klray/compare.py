"""Compares ways to train under one budget: python -m klray.compare --config mnist --arms vp kl8 kl8k2.

Every arm gets its own learning rate, tried on the same ladder, then runs over seeds; the first arm is the baseline.
The same command again goes on with what is missing.
"""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klray.cli import Parser, run_command

if TYPE_CHECKING:
    from klray.comparison.arms import Arm
    from klray.config import Config


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.compare", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="a preset or a YAML file")
    parser.add_argument(
        "--arms", required=True, nargs="+", metavar="ARM", help="vp, kl8, kl8k2_separable, vp_ensemble8, kl8,a.b=c, ..."
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a setting of all arms; budget.unit is network_evals unless it is set here",
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each arm at its best learning rate (default 3)")
    parser.add_argument("--rates", type=int, default=5, help="learning rates that each arm tries at first (default 5)")
    parser.add_argument("--rate-factor", type=float, default=2.0, help="between one rate and the next (default 2)")
    parser.add_argument("--quality", type=float, help="the error whose cost is told (default: one that all arms reach)")
    parser.add_argument("--workers", type=int, default=1, help="processes of one run (default 1)")
    parser.add_argument(
        "--gpus-per-worker", type=float, default=1.0, help="below 1, as 0.25, small runs share a GPU (default 1)"
    )
    parser.add_argument("--name", help="the comparison's name (default: preset + hash of what is compared)")
    parser.add_argument("--comparisons", type=Path, default=Path("comparisons"), help="the folder that holds them")
    parser.add_argument("--tracking-uri", metavar="URI", help="where MLflow is; off for none")
    parser.add_argument("--dry-run", action="store_true", help="print the arms and what they would spend")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 the user's mistake, 1 failed runs, 130 stopped by Ctrl-C."""
    args = parse(argv)
    return run_command("klray.compare", lambda: _compare(args), "The same command again goes on with what is missing.")


def _compare(args: Namespace) -> int:
    from klray.comparison.arms import read_arms
    from klray.comparison.plan import matched
    from klray.config import load_config

    _check(args)
    base = load_config(args.config, ["budget.unit=network_evals", *args.set])
    arms = {arm: _checked(arm, matched(arm, base), args.workers) for arm in read_arms(args.arms, base)}
    description = _description(args, base, list(arms))
    name = args.name or f"{base.preset}-{_digest(description)}"
    if args.dry_run:
        return _dry_run(arms, name)
    return _run(args, arms, base, name, description)


def _check(args: Namespace) -> None:
    from klray.comparison.rates import RUNGS
    from klray.config import ConfigError

    for flag, least, why in (
        ("seeds", 3, "intervals need as many"),
        ("rates", RUNGS, "a best one inside of the ladder needs as many"),
        ("workers", 1, "somebody has to train"),
    ):
        if getattr(args, flag) < least:
            raise ConfigError(f"--{flag} must be >= {least}, got {getattr(args, flag)}: {why}")
    if not 0 < args.gpus_per_worker <= 1:
        raise ConfigError(f"--gpus-per-worker must be above 0 and at most 1, got {args.gpus_per_worker:g}")
    if not 1.1 <= args.rate_factor <= 100:
        raise ConfigError(f"--rate-factor must be from 1.1 to 100, got {args.rate_factor:g}")
    if args.quality is not None and not args.quality > 0:
        raise ConfigError(f"--quality must be > 0, got {args.quality:g}")


def _checked(arm: Arm, config: Config, workers: int) -> Config:
    """The configuration, tried for what would otherwise fail when the arm's first run starts."""
    from klray.build import build_sampler
    from klray.config import ConfigError
    from klray.parallel.mesh import resolve_mesh
    from klray.training.initialise import checked_start

    try:
        build_sampler(config.sampling)
        resolve_mesh(
            workers,
            data=config.mesh.data,
            basis=config.mesh.basis,
            terms_per_step=config.evals_per_image,
            batch_size=config.optimizer.batch_size,
        )
        return checked_start(config)
    except ValueError as error:
        raise ConfigError(f"arm {arm.name}: {error}") from error


def _description(args: Namespace, base: Config, arms: list[Arm]) -> dict[str, Any]:
    return {
        "base": base.defining() | {"budget": base.budget.model_dump()},
        "baseline": arms[0].name,
        "arms": {arm.name: dict(arm.changes) for arm in arms},
        "rates": args.rates,
        "rate_factor": args.rate_factor,
        "seeds": args.seeds,
    }


def _compared(description: dict[str, Any]) -> dict[str, str]:
    """What may not change under one name; more arms and seeds may be added."""
    import json

    from klray.config import flatten

    kept = {key: description[key] for key in ("base", "baseline", "rates", "rate_factor")}
    arms = {f"arms.{name}": changes for name, changes in description["arms"].items()}
    return {key: json.dumps(value, sort_keys=True) for key, value in {**flatten(kept), **arms}.items()}


def _digest(description: dict[str, Any]) -> str:
    import hashlib
    import json

    return hashlib.sha256(json.dumps(_compared(description), sort_keys=True).encode()).hexdigest()[:8]


def _dry_run(arms: dict[Arm, Config], name: str) -> int:
    from klray.comparison.plan import budget_images

    print(f"comparison  {name}")
    for arm, config in arms.items():
        images = budget_images(config)
        amount = "" if images is None else f"{images:,.0f} images, batch {config.optimizer.batch_size}, "
        print(f"{arm.name}: {amount}{config.evals_per_image} network evaluations a training image")
    return 0


def _run(args: Namespace, arms: dict[Arm, Config], base: Config, name: str, description: dict[str, Any]) -> int:
    from functools import partial

    from klray.cluster.connect import connect
    from klray.cluster.jobs import JobProgress
    from klray.comparison.job import ComparisonJob
    from klray.comparison.plan import view_of
    from klray.comparison.report import report, write_files
    from klray.config import flatten
    from klray.data.sources import images_of
    from klray.runs.study_dir import open_study_folder
    from klray.tracking.parent_run import parent_run
    from klray.tracking.state import asked_uri
    from klray.tracking.view import where_to_look
    from klray.training.job import SharedImages

    def differences(kept: dict[str, Any]) -> list[str]:
        before, now = _compared(kept), _compared(description)
        keys = before.keys() | {key for key in now if not key.startswith("arms.")}  # arms may be added
        return [
            f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
            for key in sorted(keys)
            if before.get(key) != now.get(key)
        ]

    uri = asked_uri(args.tracking_uri)
    data = images_of(base.data)
    with open_study_folder(args.comparisons, name, description, differences, may_grow="seeds") as folder:
        print(f"comparison {name} in {folder}", flush=True)
        say = partial(print, flush=True)
        view = view_of(arms)
        with parent_run(folder, uri, "comparison", flatten(description), view=view, say=say) as writer:
            connect()
            runs = len(arms) * (args.rates + args.seeds)
            print(f"{len(arms)} arms x ({args.rates} learning rates + {args.seeds} seeds) = {runs} runs, or some more")
            progress = JobProgress(say, [1.0] * runs)
            details = {"experiment": name, "tracking_uri": uri}
            images, part = SharedImages.of(data), args.gpus_per_worker
            job = ComparisonJob(folder, images, args.workers, details, progress, part)
            results, failures = job.run(arms, seeds=args.seeds, rates=args.rates, factor=args.rate_factor)
            text = report(results, args.quality)
            for path in write_files(results, text, folder):
                writer.artifact(path)
            writer.status("FAILED" if failures else "FINISHED")
    print(f"\n{text}\n\nresults     {folder}")
    if uri is not None:
        print(where_to_look(uri, folder))
    for run, failure in failures.items():
        print(f"{run} failed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
