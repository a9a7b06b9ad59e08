"""A prepared view of the runs below one: the columns and the order in which MLflow's pages show them, and a chart.

MLflow keeps a shared view as a tag of the experiment, ``mlflow.sharedViewState.<key>``, in words of its own pages, and
opens it where a page's address names the key. Written for MLflow 3.17.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klray.tracking.state import NOTE_TAG, STATE_TAG, UploadState, load_state, redact

VIEW_TAG = "mlflow.sharedViewState."
DEFAULT_ADDRESS = "http://127.0.0.1:5000"  # of ``mlflow ui``
_SHOWN_IN_CHART = 1000  # runs; MLflow would draw ten
_WIDTH = 140  # of a column, in pixels; MLflow's own, 100, cuts names off


@dataclass(frozen=True)
class View:
    """What to show of the runs below one.

    Attributes:
        heading: what they are to answer; stands above the links.
        params: that vary; axes of the chart too.
        metrics: what was reached; the first one orders the runs.
        ascending: whether less of it is better.
        tags, costs: further columns, which the chart leaves out.
    """

    heading: str
    params: Sequence[str]
    metrics: Sequence[str]
    ascending: bool = True
    tags: Sequence[str] = (STATE_TAG,)
    costs: Sequence[str] = ("budget_used",)


def publish(client: Any, view: View, run: Any, key: str) -> None:
    """Keeps the view of the runs below ``run`` in its experiment, and the links to it in the run's note.

    Raises:
        Exception: whatever MLflow raises.
    """
    experiment = run.info.experiment_id
    client.set_experiment_tag(experiment, f"{VIEW_TAG}{key}", _shared_state(view, run.info.run_id))
    note = run.data.tags.get(NOTE_TAG, "")
    if key not in note:  # what somebody has added since stays
        # Without host and port the links hold wherever the page itself is opened.
        table, chart = _page(experiment, key), _page(experiment, key, chart=True)
        links = f"[The runs, the best first]({table}) · [Chart]({chart})"
        client.set_tag(run.info.run_id, NOTE_TAG, "\n\n".join(filter(None, [view.heading, links, note])))


def where_to_look(uri: str, folder: Path) -> str:
    """Lines on how to open a run's MLflow, at the view of the runs below where there is one; see ``where``."""
    state = load_state(folder)
    return where(state if state is not None and state.uri == uri else UploadState(uri, "", ""))


def where(state: UploadState) -> str:
    """Lines on how to open MLflow, at the view of the runs below where there is one."""
    page = ""
    if state.view is not None and state.experiment_id is not None:
        page = _page(state.experiment_id, state.run_key)
    uri = redact(state.uri)
    if uri.startswith(("http", "databricks")):
        return f"MLflow      {uri.rstrip('/')}/{page}" if page else f"MLflow      {uri}"
    lines = [f"MLflow      mlflow ui --backend-store-uri {uri}"]
    if page:
        lines += [f"            then {DEFAULT_ADDRESS}/{page}"]
        lines += ["            (with --port or --host, the same after that address)"]
    return "\n".join(lines)


def _page(experiment_id: str, key: str, *, chart: bool = False) -> str:
    """What follows MLflow's own address."""
    return f"#/experiments/{experiment_id}/runs?viewStateShareKey={key}" + ("&compareRunsMode=CHART" if chart else "")


def _shared_state(view: View, run_id: str) -> str:
    columns = [
        f"{kind}.`{key}`"
        for kind, keys in (("params", view.params), ("metrics", [*view.metrics, *view.costs]), ("tags", view.tags))
        for key in keys
    ]
    section = {"uuid": "klray", "name": "Overview", "display": True, "columns": 1, "cardHeight": 500}
    chart = {
        "type": "PARALLEL",
        "uuid": "klray-parallel",
        "metricSectionId": section["uuid"],
        "selectedParams": view.params,
        "selectedMetrics": view.metrics,
        "runsCountToCompare": _SHOWN_IN_CHART,
        "showAllRuns": True,
    }
    made = {"deleted": False, "isGenerated": False}
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": f"metrics.`{view.metrics[0]}`",
        "orderByAsc": view.ascending,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, _WIDTH),
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [chart | made],
        "compareRunSections": [section | made | {"isReordered": False}],
    }
    # As MLflow writes it: a tag of an experiment holds 5,000 characters.
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
