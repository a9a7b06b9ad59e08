"""A comparison as text, as CSV and as pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from klray.comparison.curves import Interval, Verdict
from klray.comparison.results import AXES, METRIC, ArmResult, common_quality, cost_ratios, verdicts
from klray.statistics import half_width


def report(results: Sequence[ArmResult], quality: float | None = None) -> str:
    """Three tables in Markdown and what they have to be read with.

    Args:
        quality: the error whose cost is told; None: one that every arm comes down to.
    """
    quality = common_quality(results) if quality is None else quality
    baseline = results[0].arm.name
    at_equal_cost, paid = verdicts(results), cost_ratios(results, quality)
    parts = [_markdown(*_arms_table(results))]
    if at_equal_cost:
        header = ["arm", *(f"at equal {label}" for label in AXES.values())]
        lines = [[name, *(_verdict(of_axis[axis]) for axis in AXES)] for name, of_axis in at_equal_cost.items()]
        parts += [f"{METRIC} over that of {baseline}, 95 % interval (below 1 is better):", _markdown(header, lines)]
        header = ["arm", *AXES.values()]
        lines = [[name, *(_ratio(of_axis[axis]) for axis in AXES)] for name, of_axis in paid.items()]
        parts += [f"Cost to reach {METRIC} {quality:.4g}, over that of {baseline}:", _markdown(header, lines)]
    return "\n\n".join([*parts, *_notes(results, len(at_equal_cost) * len(AXES))])


def write_files(results: Sequence[ArmResult], text: str, folder: Path) -> list[Path]:
    """FOLDER/report.md, verdicts.csv, curves.png and rates.png."""
    paths = [folder / name for name in ("report.md", "verdicts.csv", "curves.png", "rates.png")]
    paths[0].write_text(text + "\n", encoding="utf-8")
    write_csv(results, paths[1])
    curves_figure(results, paths[2])
    rates_figure(results, paths[3])
    return paths


def write_csv(results: Sequence[ArmResult], path: Path) -> None:
    """One line for each arm and axis: the cost of both, the ratio of errors with its interval, the word."""
    names = ("arm", "axis", "cost", "ratio", "low", "high", "verdict")
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for arm, of_axis in verdicts(results).items():
            for axis, verdict in of_axis.items():
                ratio = verdict.ratio
                writer.writerow([arm, axis, verdict.cost, ratio.value, ratio.low, ratio.high, verdict.word])


def curves_figure(results: Sequence[ArmResult], path: Path) -> None:
    """The error against every cost: geometric mean over the seeds, and their range."""
    figure = Figure(figsize=(17, 4.6), layout="constrained")
    for panel, (axis, label) in zip(figure.subplots(1, len(AXES), sharey=True), AXES.items(), strict=True):
        for index, result in enumerate(results):
            if not result.curves:
                continue
            curves = result.curves[axis]
            costs = np.exp(np.log(curves.costs).mean(0))
            style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3]}
            panel.plot(costs, np.exp(np.log(curves.errors).mean(0)), label=result.arm.name, **style)
            panel.fill_between(
                costs, curves.errors.min(0), curves.errors.max(0), color=style["color"], alpha=0.15, linewidth=0
            )
        panel.set(xlabel=label, xscale="log", yscale="log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(alpha=0.3, which="both")
    figure.axes[0].set_ylabel(METRIC)
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, format="png", dpi=110)


def rates_figure(results: Sequence[ArmResult], path: Path) -> None:
    """The error of every learning rate that was tried; the one taken is marked."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    panel = figure.subplots()
    for index, result in enumerate(results):
        tried = {rate: error for rate, error in sorted(result.tried.items()) if math.isfinite(error)}
        panel.plot(list(tried), list(tried.values()), color=f"C{index % 10}", marker=".", label=result.arm.name)
        best = result.config.optimizer.lr
        if best in tried:
            panel.plot([best], [tried[best]], color=f"C{index % 10}", marker="o")
    panel.set(xlabel="learning rate", ylabel=METRIC, xscale="log", yscale="log")
    panel.grid(alpha=0.3, which="both")
    panel.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=110)


def _arms_table(results: Sequence[ArmResult]) -> tuple[list[str], list[list[str]]]:
    header = ["arm", "learning rate", "parameters", "evals / image", "images", "network evals", "GFLOP", "seconds"]
    header.append(METRIC)
    lines = []
    for result in results:
        line = [
            result.arm.name,
            f"{result.config.optimizer.lr:.4g} (of {len(result.tried)})",
            f"{result.parameters:,}",
            str(result.config.evals_per_image),
        ]
        if result.curves:
            ends = [result.curves[axis].costs[:, -1].mean() for axis in AXES]
            errors = result.curves["images"].errors[:, -1].tolist()
            line += [f"{ends[0]:,.0f}", f"{ends[1]:,.0f}", f"{ends[2] / 1e9:,.0f}", f"{ends[3]:,.0f}"]
            half = half_width(errors)
            interval = "" if half is None else f" ± {half:.1g}"
            line += [f"{np.mean(errors):.4g}{interval} ({len(errors)} seeds)"]
        else:
            line += ["", "", "", "", "no run reached the end"]
        lines.append(line)
    return header, lines


def _notes(results: Sequence[ArmResult], comparisons: int) -> list[str]:
    budget = results[0].config.budget
    lines = [f"- {r.arm.name}: {r.note}" for r in results if r.note is not None]
    for result in results:
        if result.lost:
            lines.append(
                f"- {result.arm.name}: {result.lost} of its seeds diverged or failed and are not in its means."
            )
        if result.rate_at_end:
            lines.append(
                f"- {result.arm.name}: its best learning rate, {result.config.optimizer.lr:.4g}, is at an end of those "
                "tried; it may do better beyond."
            )
    lines += [
        f"- Learning rates were tuned on a seed of their own, for the whole budget of {budget.amount:g} {budget.unit}; "
        "on the other axes arms are compared at points of their training that they were not tuned for.",
        "- Intervals are over seeds (Welch's t; bootstrap for costs, coarse for few seeds). "
        f"Of {comparisons} comparisons, chance alone would call about {0.05 * comparisons:.1g} ahead or behind.",
        "- Seconds are training seconds of runs side by side on the same kind of worker.",
    ]
    return ["\n".join(lines)]


def _verdict(verdict: Verdict) -> str:
    if math.isnan(verdict.ratio.value):
        return "not looked at by then"
    return f"{verdict.word} {_ratio(verdict.ratio)}"


def _ratio(ratio: Interval) -> str:
    if math.isnan(ratio.value):
        return "baseline does not reach it"
    if math.isinf(ratio.value):
        return "not reached"
    return f"{ratio.value:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    rows = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)) + " |" for row in rows)
