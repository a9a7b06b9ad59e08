"""What a study tells of its trials: how far it is when it goes on, and Optuna's figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.text import Text

from klray.study.figures import draw_figures
from klray.study.results import collect, goes_on
from klray.study.search import ERROR, FINISHED, PERCENT, StudySearch
from klray.study.space import load_space
from tests.study.spaces import space_file

PARAMETERS = {"optimizer.lr": {"type": "float", "low": 1e-3, "high": 1e-2}}


def test_a_study_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    space = load_space(space_file(tmp_path, parameters=PARAMETERS, sampler="random", trials=9))
    assert goes_on(space, tmp_path, retry_failed=False) is None
    search = StudySearch(space, tmp_path)
    assert goes_on(space, tmp_path, retry_failed=False) is None
    for name in "abcdef":
        assert search.suggest(name) != "FINISHED"
    search.on_trial_complete("a", {FINISHED: [0.1], "values": [[0.1]]})
    search.keep("b", {"val/eps_mse": 0.1, PERCENT: 10})
    search.on_trial_complete("b", {PERCENT: 10})  # pruned
    search.on_trial_complete("c", {ERROR: "it broke"})
    for number in (2, 4):
        (tmp_path / "trials" / f"{number:04d}" / "checkpoints" / "checkpoint_000000000064").mkdir(parents=True)
    assert goes_on(space, tmp_path, retry_failed=False) == (
        "goes on: 2 of 9 trials are finished, 1 failed, 1 goes on from a checkpoint, 2 start anew, 3 are to come"
    )
    assert goes_on(space, tmp_path, retry_failed=True) == (
        "goes on: 2 of 9 trials are finished, 2 go on from a checkpoint, 2 start anew, 3 are to come"
    )


@pytest.mark.parametrize("objectives", [["val/eps_mse"], ["val/eps_mse", "network_evals_per_image"]])
def test_optuna_s_figures_name_the_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objectives: list[str]
) -> None:
    told = [{"metric": metric, "direction": "minimize"} for metric in objectives]
    space = load_space(space_file(tmp_path, parameters=PARAMETERS, sampler="random", trials=6, objectives=told))
    search = StudySearch(space, tmp_path)
    for number in range(6):
        assert search.suggest(str(number)) != "FINISHED"
        values = [0.1 + number % 4, 1.0 + number][: len(objectives)]
        search.on_trial_complete(str(number), {FINISHED: values, "values": [values]})
    monkeypatch.setattr(pyplot, "close", lambda which: None)  # to look at them afterwards
    written = draw_figures(space, tmp_path, collect(space, tmp_path))
    assert {path.stem for path in written} >= {"history", "slices", "parallel_coordinates"}
    for number in pyplot.get_fignums():
        texts = {text.get_text() for text in pyplot.figure(number).findobj(Text)}
        assert "val/eps_mse" in texts
        assert "Objective Value" not in texts
    monkeypatch.undo()
    pyplot.close("all")
