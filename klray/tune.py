"""A study: python -m klray.tune --space tune_spaces/M.yaml. The same command again goes on with what is missing."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klray.cli import Parser, run_command

if TYPE_CHECKING:
    from klray.study.space import Space


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.tune", description=__doc__)
    parser.add_argument("--space", required=True, type=Path, metavar="FILE", help="what to search; see tune_spaces/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override the file: trials=4, budget.amount=1e5"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of one trial (default 1)")
    parser.add_argument(
        "--gpus-per-worker", type=float, default=1.0, help="below 1, as 0.25, small trials share a GPU (default 1)"
    )
    parser.add_argument(
        "--trial-runner",
        choices=("train", "inline"),
        default="train",
        help="a trial's run on Ray Train, or, for tiny ones, in the trial's own process",
    )
    parser.add_argument("--name", help="the study's name (default: the file's name + hash of the space)")
    parser.add_argument("--studies", type=Path, default=Path("studies"), help="the folder that holds studies' folders")
    parser.add_argument("--tracking-uri", metavar="URI", help="where MLflow is; off for none")
    parser.add_argument("--retry-failed", action="store_true", help="trials that failed go on too")
    parser.add_argument("--dry-run", action="store_true", help="print the space and what a trial may be")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 2 the user's mistake, 1 failed trials, 130 stopped by Ctrl-C."""
    args = parse(argv)
    return run_command("klray.tune", lambda: _tune(args), "The same command again goes on with what is missing.")


def _tune(args: Namespace) -> int:
    from klray.study.space import load_space

    space = load_space(args.space, args.set)
    _check(space, args)
    name = args.name or f"{args.space.stem}-{space.fingerprint()[:8]}"
    for note in space.notes:
        print(f"note: {note}", flush=True)
    if args.dry_run:
        return _dry_run(space, name)
    return _run(args, space, name)


def _check(space: Space, args: Namespace) -> None:
    """What trials would otherwise fail by, tried on settings at the edges of the space."""
    from klray.build import build_sampler
    from klray.config import ConfigError
    from klray.parallel.mesh import resolve_mesh
    from klray.study.space.space import in_words
    from klray.training.initialise import checked_start

    if args.workers < 1:
        raise ConfigError(f"--workers must be >= 1, got {args.workers}")
    if not 0 < args.gpus_per_worker <= 1:
        raise ConfigError(f"--gpus-per-worker must be above 0 and at most 1, got {args.gpus_per_worker:g}")
    if args.gpus_per_worker < 1 and args.trial_runner == "train" and any(o.score for o in space.objectives):
        raise ConfigError(
            f"--gpus-per-worker must be 1 where objectives are scores of images, got {args.gpus_per_worker:g}; "
            "or take --trial-runner inline, which draws them on the trial's own part"
        )
    if args.trial_runner == "inline" and args.workers != 1:
        raise ConfigError(f"--trial-runner inline trains in the trial's own process, got --workers {args.workers}")
    tried = set()
    for setting in space.corners():
        config = space.config(setting)
        try:
            build_sampler(config.sampling)
            resolve_mesh(
                args.workers,
                data=config.mesh.data,
                basis=config.mesh.basis,
                terms_per_step=config.evals_per_image,
                batch_size=config.optimizer.batch_size,
            )
            start = (config.network.model_dump_json(), config.process.num_terms, config.loss.prediction)
            if start not in tried:
                tried.add(start)
                checked_start(config)
        except ValueError as error:
            raise ConfigError(f"{args.space} with {in_words(setting)}: {error}") from error


def _dry_run(space: Space, name: str) -> int:
    import yaml

    described = space.describe()
    print(yaml.safe_dump(described, sort_keys=False).rstrip())
    print(f"\nstudy       {name}")
    print(f"trials      {space.trials} x {space.seeds} seeds, {space.budget.amount:g} {space.budget.unit} each")
    return 0


def _run(args: Namespace, space: Space, name: str) -> int:
    from contextlib import ExitStack
    from functools import partial

    from klray.cluster.connect import connect
    from klray.data.sources import images_of
    from klray.evaluation.job import Features
    from klray.runs.study_dir import open_study_folder
    from klray.study.figures import draw_figures
    from klray.study.job import concurrency, run_study
    from klray.study.progress import StudyProgress
    from klray.study.results import collect, goes_on, ranking, table, train_command, view_of, write_csv
    from klray.tracking.parent_run import parent_run
    from klray.tracking.state import asked_uri
    from klray.tracking.view import where_to_look
    from klray.training.job import SharedImages

    uri = asked_uri(args.tracking_uri)
    data = images_of(space.base.data)
    with ExitStack() as stack:
        opened = open_study_folder(args.studies, name, space.describe(), space.differences, may_grow="trials")
        folder = stack.enter_context(opened)
        print(f"study {name} in {folder}: {space.question}", flush=True)
        say = partial(print, flush=True)
        if before := goes_on(space, folder, args.retry_failed):
            say(before)
        writer = stack.enter_context(parent_run(folder, uri, "study", _params(space), view=view_of(space), say=say))
        connect()
        features = Features(*_features(space))
        progress = StudyProgress(space, say)
        at_once = concurrency(space, args.workers, args.gpus_per_worker)
        print(f"{space.trials} trials, {at_once} at a time, {args.workers} workers each")
        details = {"experiment": name, "tracking_uri": uri}
        run_study(
            space,
            folder,
            SharedImages.of(data),
            workers=args.workers,
            gpus_per_worker=args.gpus_per_worker,
            inline=args.trial_runner == "inline",
            features=features,
            details=details,
            watch=progress,
            retry_failed=args.retry_failed,
        )
        rows = ranking(space, collect(space, folder))
        write_csv(space, rows, folder / "results.csv")
        for path in (folder / "results.csv", *draw_figures(space, folder, rows)):
            writer.artifact(path)
        complete = [row for row in rows if row.state == "complete"]
        if complete:
            best = {f"best/{o.metric}": value for o, value in zip(space.objectives, complete[0].values, strict=True)}
            writer.metrics(len(rows), best)
        failed = [row for row in rows if row.state == "failed"]
        writer.status("FAILED" if failed or not complete else "FINISHED")
    print(f"\n{table(space, rows)}\n\nresults     {folder / 'results.csv'} and {folder / 'figures'}")
    if complete:
        print(f"best        trial {complete[0].number}:\n{train_command(space, complete[0])}")
    if uri is not None:
        print(where_to_look(uri, folder))
    if failed:
        print(f"{len(failed)} trials failed: {', '.join(str(row.number) for row in failed)}")
    return 1 if failed or not complete else 0


def _features(space: Space) -> tuple[str, Path | None]:
    """Which features scores are made of, and their weights; settled before any trial starts."""
    from klray.evaluation.features import EFFICIENTNET, find_extractor

    settings = space.base.evaluation
    weights = None if settings.inception_weights is None else Path(settings.inception_weights).resolve()
    if not any(objective.score for objective in space.objectives):
        return settings.features or EFFICIENTNET, weights  # nothing is measured
    name, note = find_extractor(settings.features, weights)
    if note is not None:
        print(f"note: {note}", flush=True)
    return name, weights


def _params(space: Space) -> dict[str, Any]:
    from klray.config import flatten

    described = space.describe()
    return flatten({key: described[key] for key in described if key not in ("base", "objectives")})


if __name__ == "__main__":
    raise SystemExit(main())
