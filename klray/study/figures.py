"""Figures of a study: Optuna's own, and quality against what it cost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from klray.study.results import TrialRow
from klray.study.search import open_study
from klray.study.space import Space

AXES = {"images_seen": "images", "network_evals": "network evaluations", "seconds": "training seconds"}


def draw_figures(space: Space, folder: Path, rows: Sequence[TrialRow]) -> list[Path]:
    """Writes STUDY/figures/*.png and returns them; a figure that needs more trials than there are is left out."""
    target = folder / "figures"
    target.mkdir(exist_ok=True)
    study = open_study(space, folder)
    plots = optuna.visualization.matplotlib
    several = len(space.objectives) > 1
    first: dict[str, Any] = {"target_name": space.objectives[0].metric}
    if several:
        first["target"] = lambda trial: trial.values[0]
    drawings: dict[str, Callable[[], Any]] = {
        "history": lambda: plots.plot_optimization_history(study, **first),
        "importance": lambda: plots.plot_param_importances(study, **first),
        "slices": lambda: plots.plot_slice(study, **first),
        "parallel_coordinates": lambda: plots.plot_parallel_coordinate(study, **first),
    }
    if several:
        names = [objective.metric for objective in space.objectives]
        drawings["pareto_front"] = lambda: plots.plot_pareto_front(study, target_names=names)
    written = []
    complete = any(row.state == "complete" for row in rows)
    for name, draw in drawings.items() if complete else ():
        path = target / f"{name}.png"
        if _optuna_figure(draw, path):
            written.append(path)
    metric = space.objectives[0].metric
    if any(metric in row.curves for row in rows):
        convergence_figure(space, rows, target / "convergence.png")
        written.append(target / "convergence.png")
    return written


def convergence_figure(space: Space, rows: Sequence[TrialRow], path: Path) -> None:
    """The first objective of every trial against images, network evaluations and seconds, coloured by M."""
    metric = space.objectives[0].metric
    figure = Figure(figsize=(15, 4.5), layout="constrained")

    def num_terms(row: TrialRow) -> int:
        return int(row.chosen.get("process.num_terms", space.base.process.num_terms))

    terms = sorted({num_terms(row) for row in rows})
    for axis, (key, label) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
        labelled: set[int] = set()
        for row in sorted(rows, key=num_terms):
            of_step = dict(row.curves.get(key, []))
            points = [(of_step[step], value) for step, value in row.curves.get(metric, []) if step in of_step]
            m = num_terms(row)
            style = {"color": f"C{terms.index(m)}", "alpha": 0.4 if row.state == "pruned" else 1.0}
            name = None if m in labelled or not points else (f"M = {m}" if m else "VP baseline (M = 0)")
            labelled |= {m} if points else set()
            axis.plot([x for x, _ in points], [y for _, y in points], marker=".", label=name, **style)
        axis.set_xlabel(label)
        axis.set_ylabel(metric)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=110)


def _optuna_figure(draw: Callable[[], Any], path: Path) -> bool:
    """Optuna draws on pyplot's global figures; they are closed again here."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        with warnings.catch_warnings(), matplotlib.rc_context():  # it sets a style for all figures
            warnings.simplefilter("ignore")
            draw()
            pyplot.gcf().set_size_inches(10, 6)
            pyplot.gcf().savefig(path, format="png", dpi=110, bbox_inches="tight")
    except (ValueError, RuntimeError, ZeroDivisionError):  # too few trials, or all of them equal
        return False
    finally:
        pyplot.close("all")
    return True
