"""The prepared view of a parent's runs, as MLflow keeps it and as users are told of it."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path

import pytest

from klray.runs.records import RecordWriter
from klray.tracking.mlflow_upload import upload
from klray.tracking.parent_run import parent_run
from klray.tracking.state import load_state
from klray.tracking.view import View, where, where_to_look

pytestmark = pytest.mark.slow
VIEW = View("What is better?", ["a.b", "c"], ["score", "other"], ascending=False)


def test_a_parent_s_view_in_a_database(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    folder, uri, said = tmp_path / "study", f"sqlite:///{tmp_path / 'mlflow.db'}", list[str]()
    note = ""
    for _ in range(2):  # a command and its repetition
        with parent_run(folder, uri, "study", {}, view=VIEW, say=said.append) as writer:
            with RecordWriter(folder / "trials" / "0000") as trial:
                trial.metrics(1, {"score": 1.0})
            writer.status("FINISHED")
        state, client = load_state(folder), MlflowClient(uri)
        assert state is not None and state.run_id is not None and state.experiment_id is not None
        run = client.get_run(state.run_id)
        assert note in run.data.tags["mlflow.note.content"]
        note = f"{run.data.tags['mlflow.note.content']}\n\nSomebody's own."
        client.set_tag(state.run_id, "mlflow.note.content", note)
    assert note.startswith("What is better?\n\n[The runs, the best first](#/experiments/")
    assert note.count("viewStateShareKey") == 2  # table and chart, each once
    link = re.search(r"then (http://127\.0\.0\.1:5000/(#/experiments/(\d+)/runs\?viewStateShareKey=(\w+)))\n", said[0])
    assert link is not None
    assert said == [where_to_look(uri, folder)] * 2
    assert f"mlflow ui --backend-store-uri {uri}" in said[0]
    assert f"({link[2]})" in note
    assert link[3] == state.experiment_id
    tag = client.get_experiment(link[3]).tags[f"mlflow.sharedViewState.{link[4]}"]
    view = json.loads(zlib.decompress(base64.b64decode(tag.removeprefix("deflate;"))))
    assert view["orderByKey"] == "metrics.`score`"
    assert view["orderByAsc"] is False
    assert view["compareRunCharts"][0]["selectedParams"] == ["a.b", "c"]
    assert view["compareRunCharts"][0]["selectedMetrics"] == ["score", "other"]
    (found,) = client.search_runs([link[3]], view["searchFilter"])
    assert found.info.run_name == "0000"


def test_a_view_goes_where_the_records_go(tmp_path: Path) -> None:
    """A server that was away gets it with the records; what is told has a link once there is one."""
    folder, away = tmp_path / "study", "http://127.0.0.1:1/"
    with parent_run(folder, away, "study", {}, view=VIEW) as writer:
        writer.status("FINISHED")
    assert where_to_look(away, folder) == f"MLflow      {away}"
    upload(folder, f"sqlite:///{tmp_path / 'mlflow.db'}")
    state = load_state(folder)
    assert state is not None
    assert f"5000/#/experiments/{state.experiment_id}/runs?viewStateShareKey={state.run_key}" in where(state)
    assert where_to_look(away, folder) == f"MLflow      {away}"
