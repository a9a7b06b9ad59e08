"""Figures of an evaluation: quality against cost, sample grids side by side; and of a learned schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from klray.evaluation.verdicts import solver_of

Row = Mapping[str, Any]
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "v", "D", "x")


def quality_figure(rows: Sequence[Row], metrics: Sequence[str], path: Path) -> None:
    """Each metric against NFE and against network evaluations an image: a line a solver (colour) and grid (dash).

    Args:
        rows: with ``solver``, ``timesteps``, ``nfe``, ``network_evals`` and the metrics; ``<metric>_sd`` is drawn as a
            bar where it is there.
    """
    solvers, grids = (list(dict.fromkeys(each)) for each in zip(*_by_method(rows), strict=True))
    figure, axes = _figure(len(metrics), 2, width=6.0, height=4.2)
    for line, metric in enumerate(metrics):
        for column, (key, label) in enumerate(
            (("nfe", "score evaluations (NFE)"), ("network_evals", "network evaluations"))
        ):
            axis = axes[line][column]
            for (solver, grid), group in _by_method(rows).items():
                points = sorted(group, key=lambda row: row[key])
                axis.errorbar(
                    [row[key] for row in points],
                    [row[metric] for row in points],
                    yerr=[row.get(f"{metric}_sd", 0.0) for row in points],
                    color=f"C{solvers.index(solver)}",
                    linestyle=_DASHES[grids.index(grid) % len(_DASHES)],
                    marker=_MARKERS[grids.index(grid) % len(_MARKERS)],
                    markersize=5,
                    capsize=2,
                    label=f"{solver}, {grid}",
                )
            axis.set_xlabel(f"{label} an image")
            axis.set_ylabel(metric)
            if all(row[metric] > 0 for row in rows):
                axis.set_yscale("log")
            axis.grid(alpha=0.3, which="both")
    axes[0][1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.02, 1.0))
    _save(figure, path)


def overview_figure(rows: Sequence[Row], pictures: Sequence[np.ndarray], path: Path) -> None:
    """The pictures, uint8 [h, w, 3], of the rows: solvers and grids downwards, NFE to the right."""
    methods, budgets = list(_by_method(rows)), sorted({row["nfe"] for row in rows})
    figure, axes = _figure(len(methods), len(budgets), width=3.0, height=3.3)
    for axis in axes.flat:
        axis.axis("off")
    for row, picture in zip(rows, pictures, strict=True):
        solver = solver_of(row)
        axis = axes[methods.index((solver, row["timesteps"]))][budgets.index(row["nfe"])]
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(f"{solver}\n{row['timesteps']}, NFE {row['nfe']}", fontsize=7)
    _save(figure, path)


def grids_figure(lams: Mapping[str, Sequence[float]], learned: str, title: str, path: Path) -> None:
    """lam over the step of several grids, [N + 1] each; the one called ``learned`` is drawn thick."""
    figure, axes = _figure(1, 1, width=6.0, height=4.2)
    axis = axes[0][0]
    for index, (name, lam) in enumerate(lams.items()):
        thick = name == learned
        axis.plot(
            range(len(lam)),
            lam,
            color="black" if thick else f"C{index}",
            linewidth=2.5 if thick else 1.0,
            linestyle="-" if thick else _DASHES[index % len(_DASHES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            label=name,
        )
    axis.set_xlabel("step")
    axis.set_ylabel("lam = log(alpha / sigma)")
    axis.set_title(title, fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")
    _save(figure, path)


def rows_figure(pictures: Mapping[str, np.ndarray], title: str, path: Path) -> None:
    """Pictures uint8 [h, w, 3] of equal size below each other, each by its name."""
    height, width, _ = next(iter(pictures.values())).shape
    figure, axes = _figure(len(pictures), 1, width=7.0, height=6.0 * height / width + 0.1)
    for axis, (name, picture) in zip(axes.flat, pictures.items(), strict=True):
        axis.imshow(picture, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize="medium")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.suptitle(title, fontsize="medium")
    _save(figure, path)


def _by_method(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    methods: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        methods.setdefault((solver_of(row), row["timesteps"]), []).append(row)
    return methods


def _figure(lines: int, columns: int, *, width: float, height: float) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure  # takes a second to import; no global state, as pyplot has

    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    aside = path.with_name(f".{path.name}.writing")
    figure.savefig(aside, format="png", dpi=110, bbox_inches="tight")
    aside.replace(path)
