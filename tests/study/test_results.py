"""What a study's results say before anything is trained."""

from __future__ import annotations

from pathlib import Path

from klray.study.results import goes_on
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
