"""The text that a training run's page in MLflow begins with: what it reached, what is varied, its main settings."""

from __future__ import annotations

from pathlib import Path

from klray.config import Config
from klray.runs.records import read_records
from klray.tracking.state import TITLE_TAG

SCORE, USED = "val/eps_mse", "budget_used"
MAIN = (
    "process.kind",
    "process.num_terms",
    "process.marginal",
    "loss.partial_terms",
    "loss.coupling",
    "loss.prediction",
    "network.kind",
    "network.architecture",
    "optimizer.lr",
    "optimizer.batch_size",
    "data.name",
    "seed",
)


def run_note(config: Config, run_dir: Path) -> str:
    """A table in Markdown of the run in ``run_dir``, as far as its records go."""
    last: dict[str, float] = {}
    title = None
    for record, _ in read_records(run_dir):
        if record["kind"] == "metrics":
            last.update((key, record["values"][key]) for key in (SCORE, USED) if key in record["values"])
        elif record["kind"] == "tags":
            title = record["values"].get(TITLE_TAG, title)
    rows = {SCORE: f"{last[SCORE]:.5g}"} if SCORE in last else {}
    rows["budget"] = f"{last.get(USED, 0):.0%} of {config.budget.amount:,.10g} {config.budget.unit}"
    rows |= {"varied": title} if title else {}
    settings = config.flat()
    rows |= {key: str(settings[key]) for key in MAIN}
    first, *others = (f"| {key} | {value} |" for key, value in rows.items())
    return "\n".join([first, "|---|---|", *others])  # MLflow's pages show no table without a header
