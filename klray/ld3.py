"""Learns time grids: python -m klray.ld3 --checkpoint runs/NAME --solvers unipc_3 ipndm_3 --nfe 4 6 8 10.

One LD3 job for each solver and NFE on a pool of workers; klray.sample and klray.evaluate use what was learned as
--timesteps learned. The same command again goes on with what is missing.
"""

from __future__ import annotations

from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klray.cli import Parser, add_final_flag, columns, image_seeds, options_of, run_command

if TYPE_CHECKING:
    from klray.sampling.model import Model
    from klray.schedules.ask import Ask, Job
    from klray.schedules.job import Measuring


MOST_SEEDS = 1000


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.ld3", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="DIR|RUN_ID", help="as for klray.sample")
    parser.add_argument(
        "--solvers", nargs="+", type=str.lower, default=["dpm_solver_pp_3m", "unipc_3", "ipndm_3"], metavar="SOLVER"
    )
    parser.add_argument("--nfe", nargs="+", type=int, default=[4, 6, 8, 10], help="score evaluations an image")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the solvers; repeatable")
    parser.add_argument("--clip-x0", choices=("yes", "no"), help="clamp x0 to [-1, 1] (default: the model's)")
    add_final_flag(parser)
    parser.add_argument("--optimizer", default="ld3", help="ld3 (default), or adam, made for more pairs")
    parser.add_argument("--pairs", type=int, help="noises with the teacher's images (default: ld3 100, adam 1000)")
    parser.add_argument("--loss", help="l2 (default), l1, efficientnet_lite0 (a distance of its features), lpips_vgg")
    parser.add_argument("--lpips-weights", nargs=2, type=Path, metavar=("VGG16", "LPIPS"), help="files, for lpips_vgg")
    parser.add_argument("--space", choices=("lam", "time"), help="in which the steps are laid out (default lam)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="another setting of the fit")
    parser.add_argument("--seeds", type=int, default=1, help="fits of each, of which the best is used (default 1)")
    parser.add_argument("--teacher-solver", default="unipc_3", metavar="SOLVER")
    parser.add_argument("--teacher-nfe", type=int, default=20, metavar="N")
    parser.add_argument("--teacher-timesteps", default="logsnr", metavar="NAME")
    parser.add_argument("--warm-start", action="store_true", help="start also from grids learned at other NFE")
    parser.add_argument(
        "--num-samples", type=int, default=0, metavar="N", help="then score N images a grid (default 0)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="blocks of N images each (default 3)")
    parser.add_argument("--features", help="of the scores, as for klray.evaluate")
    parser.add_argument("--reference-images", type=int, metavar="N", help="only the first N training images")
    parser.add_argument("--all-fixed", action="store_true", help="score all fixed grids, not only the best by its loss")
    parser.add_argument("--workers", type=int, help="jobs at once (default: one for each GPU, else each CPU)")
    parser.add_argument("--name", help="of the pool's folder and MLflow run (default: ld3 + hash of what is asked)")
    parser.add_argument("--tracking-uri", metavar="URI", help="where MLflow is; off for none")
    parser.add_argument("--force", action="store_true", help="replace schedules that were learned with other settings")
    parser.add_argument("--dry-run", action="store_true", help="print the jobs and what they cost")
    parser.add_argument("--list", action="store_true", help="print the schedules that the model has")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 the user's mistake, 1 failed jobs, 130 stopped by Ctrl-C."""
    args = parse(argv)
    return run_command("klray.ld3", lambda: _ld3(args), "The same command again goes on with what is missing.")


def _ld3(args: Namespace) -> int:
    import torch

    from klray.sampling.find import checkpoint_folder
    from klray.sampling.model import load_model
    from klray.schedules.ask import AskError, check_ask

    for flag, least in (
        ("workers", 1),
        ("seeds", 1),
        ("pairs", 1),
        ("repeats", 1),
        ("num_samples", 0),
        ("reference_images", 2),
    ):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise AskError(f"--{flag.replace('_', '-')} must be >= {least}, got {value}")
    if args.seeds > MOST_SEEDS:
        raise AskError(f"--seeds must be at most {MOST_SEEDS}, got {args.seeds}: each is a fit of its own")
    image_seeds("--num-samples and --repeats", 0, args.num_samples * args.repeats)
    if args.num_samples == 1:
        raise AskError("--num-samples must be 0, for no images, or >= 2, got 1")
    uri = None if args.tracking_uri == "off" else args.tracking_uri
    clip = None if args.clip_x0 is None else args.clip_x0 == "yes"
    checkpoint = checkpoint_folder(args.checkpoint, uri).resolve()
    model = load_model(checkpoint, torch.device("cpu"), clip_x0=clip)
    if args.list:
        return _list(model)
    if model.assumed is not None:
        print(f"note: {model.assumed}")
    jobs, ask = _jobs(args, model), _ask(args, model)
    check_ask(ask, jobs)
    return _learn(args, model, ask, jobs)


def _jobs(args: Namespace, model: Model) -> list[Job]:
    """Every solver with every NFE, checked as klray.sample checks them."""
    from itertools import product

    from klray.build import build_sampler
    from klray.sampling.draw import sampling_of
    from klray.schedules.ask import Job
    from klray.schedules.store import chosen

    jobs = []
    for solver, nfe in product(args.solvers, args.nfe):
        asked = sampling_of(model, solver=solver, nfe=nfe, options=options_of(args.option) or None, timesteps="logsnr")
        build_sampler(asked)
        jobs += [Job(solver, nfe, chosen(solver, asked.options), seed) for seed in range(args.seeds)]
    return jobs


def _ask(args: Namespace, model: Model) -> Ask:
    from klray.sampling.draw import sampling_of
    from klray.schedules.ask import Ask, fit_settings, learner_of, teacher_of

    final = sampling_of(model, final=args.final).final
    fit = fit_settings(args.optimizer, args.set, loss=args.loss, space=args.space, final=final)
    return Ask(
        fit=fit,
        teacher=teacher_of(args.teacher_solver, args.teacher_nfe, args.teacher_timesteps, model.schedule, fit.final),
        teacher_nfe=args.teacher_nfe,
        teacher_grid=args.teacher_timesteps,
        pairs=args.pairs or learner_of(args.optimizer).pairs,
        clip_x0=model.clip_x0,
        warm_start=args.warm_start,
        lpips_weights=None if args.lpips_weights is None else tuple(args.lpips_weights),
    )


def _learn(args: Namespace, model: Model, ask: Ask, jobs: list[Job]) -> int:
    from functools import partial

    from klray.evaluation.verdicts import quality_lines
    from klray.schedules.ask import AskError, plan_text
    from klray.schedules.job import Ld3Job
    from klray.schedules.store import home_of
    from klray.schedules.table import rows_of, text_of
    from klray.tracking.stale import send_rest

    home = home_of(model.folder)
    job = Ld3Job(model, home, ask, jobs, args.name, args.tracking_uri, args.workers, _measuring(args, model))
    missing, other = job.plan()
    if args.dry_run:
        print(f"model       {model.folder} ({model.fingerprint})\n{plan_text(ask, jobs, missing, model.evals)}")
        return 0
    if other and not args.force:
        raise AskError(f"learned with other settings: {other[0]}; --force replaces such schedules")
    failures: dict[str, str] = {}
    quality: list[dict[str, Any]] = []
    if missing or job.measuring is not None:
        failures, quality = job.run(missing, partial(print, flush=True))
    else:
        send_rest(job.folder)
    if schedules := job.schedules():
        header = f"loss on {ask.fit.validation_pairs} validation pairs, which chose the grid but did not train it"
        print(f"\n{header}:\n{text_of(rows_of(schedules))}")
    if quality:
        count = f"{args.repeats} x {args.num_samples:,} images, mean and deviation over these blocks"
        print(f"\n1000 x KID of {count}:\n{columns(quality_lines(quality))}")
    print(f"\nschedules   {home / 'schedules'}\nuse them    --timesteps learned")
    for name, error in failures.items():
        print(f"{name} failed: {error}")
    if not missing:
        print("finished before; nothing was learned again")
    return 1 if failures else 0


def _measuring(args: Namespace, model: Model) -> Measuring | None:
    from klray.evaluation.cells import Yardstick
    from klray.evaluation.features import find_extractor
    from klray.evaluation.job import Features
    from klray.schedules.ask import AskError
    from klray.schedules.job import SCORES, Measuring

    if args.num_samples == 0:
        return None
    if model.config is None:
        raise AskError(
            "--num-samples must be 0 for an imported model, whose training images are not known; then use "
            "klray.evaluate --timesteps learned --data NAME"
        )
    name, note = find_extractor(args.features)
    if note is not None:
        print(f"note: {note}")
    yardstick = Yardstick(
        Features(name), SCORES, args.num_samples, args.repeats, reference_images=args.reference_images
    )
    return Measuring(yardstick, args.all_fixed)


def _list(model: Model) -> int:
    from klray.schedules.store import home_of, stored
    from klray.schedules.table import rows_of, text_of

    home = home_of(model.folder)
    found = [each for _, each in stored(home)]
    own = [each for each in found if each.model == model.fingerprint]
    print(text_of(rows_of(own)) if own else f"no schedules of {model.fingerprint} in {home / 'schedules'}")
    if len(own) < len(found):
        print(f"and {len(found) - len(own)} of other weights")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
