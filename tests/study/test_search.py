"""What a study hands out, remembers and stops: Optuna's storage alone, without a cluster."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from klray.errors import RunError
from klray.study import search as search_module
from klray.study.pruning import RungPruner
from klray.study.results import collect
from klray.study.search import DIVERGED, ERROR, FINISHED, PERCENT, StudySearch, latest, open_study
from klray.study.space import load_space
from tests.study.spaces import space_file

TERMS = {"process.num_terms": {"type": "categorical", "choices": [0, 1, 2, 4, 8]}}
RATE = {"optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}


def search(tmp_path: Path, *, retry_failed: bool = False, **changes: Any) -> StudySearch:
    folder = tmp_path / "study"
    folder.mkdir(exist_ok=True)
    return StudySearch(load_space(space_file(tmp_path, **changes)), folder, retry_failed)


def told(searcher: StudySearch, name: str) -> dict[str, Any]:
    suggestion = searcher.suggest(name)
    assert isinstance(suggestion, dict)
    return suggestion


def whole(value: float) -> dict[str, Any]:
    return {FINISHED: [value], "values": [[value]], PERCENT: 100}


class Killed(BaseException):
    """The driver's end, at any statement."""


def test_what_is_not_a_number_counts_as_the_worst(tmp_path: Path) -> None:
    searcher = search(tmp_path)
    searcher.suggest("a")
    searcher.on_trial_complete("a", {FINISHED: [float("nan")], "values": [[float("nan")]], PERCENT: 100})
    (trial,) = [t for t in searcher.study.get_trials() if t.state != TrialState.WAITING]
    assert (trial.state, trial.value) == (TrialState.COMPLETE, DIVERGED)


def test_a_running_trial_comes_back_first_with_its_settings(tmp_path: Path) -> None:
    first = search(tmp_path, sampler="random", trials=3)
    given = first.suggest("a")
    first.keep("a", {"val/eps_mse": 0.5, PERCENT: 20})
    again = search(tmp_path, sampler="random", trials=3)
    assert again.suggest("b") == given
    again.on_trial_complete("b", {FINISHED: [0.4], "values": [[0.4]], PERCENT: 100})
    numbers = [again.suggest(name)["number"] for name in ("c", "d")]  # type: ignore[index]
    assert numbers == [1, 2]
    assert again.suggest("e") == "FINISHED"
    states = [t.state for t in open_study(again.space, tmp_path / "study").get_trials()]
    assert states == [TrialState.COMPLETE, TrialState.RUNNING, TrialState.RUNNING]


def test_a_continued_random_study_does_not_draw_the_same_again(tmp_path: Path) -> None:
    lr = {"optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    drawn = []
    for name in "abcd":
        suggested = search(tmp_path, sampler="random", trials=9, parameters=lr).study.ask()
        drawn.append(suggested.suggest_float("optimizer.lr", 1e-4, 1e-2, log=True))
        assert name
    assert len(set(drawn)) == 4


def test_every_choice_is_tried_at_least_once(tmp_path: Path) -> None:
    parameters = {
        "process.num_terms": {"type": "categorical", "choices": [0, 1, 2, 4, 8]},
        "process.marginal": {"type": "categorical", "choices": ["matched", "truncated"]},
        "optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
    }
    searcher = search(tmp_path, sampler="tpe", trials=10, parameters=parameters)
    chosen = [searcher.suggest(name)["chosen"] for name in "abcde"]  # type: ignore[index]
    assert {setting["process.num_terms"] for setting in chosen} == {0, 1, 2, 4, 8}
    assert {setting["process.marginal"] for setting in chosen} == {"matched", "truncated"}
    assert len({setting["optimizer.lr"] for setting in chosen}) == 5


def test_a_stopped_trial_keeps_the_look_that_stopped_it(tmp_path: Path) -> None:
    searcher = search(tmp_path)
    number = searcher.suggest("a")["number"]  # type: ignore[index]
    searcher.keep("a", {"val/eps_mse": 0.5, PERCENT: 20})
    stopped_at = {"val/eps_mse": 0.4, PERCENT: 40}
    searcher.keep("a", stopped_at)
    searcher.on_trial_complete("a", stopped_at)
    stopped = searcher.study.get_trials()[number]
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {20: 0.5, 40: 0.4})


@pytest.mark.parametrize("queued", [0, 1, 3])
def test_a_grid_is_whole_wherever_its_driver_died(queued: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it was queued; then between a trial's beginning and the keeping of its settings."""
    enqueue = optuna.Study.enqueue_trial
    calls = []

    def dies(study: optuna.Study, params: dict[str, Any], **others: Any) -> None:
        if len(calls) == queued:
            raise Killed
        calls.append(params)
        enqueue(study, params, **others)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(optuna.Study, "enqueue_trial", dies)
        search(tmp_path, parameters=TERMS, trials=5)
    again = search(tmp_path, parameters=TERMS, trials=5)
    done = told(again, "a")
    again.on_trial_complete("a", whole(0.5))
    again.study.ask()  # and dies
    last = search(tmp_path, parameters=TERMS, trials=5)
    chosen = [told(last, name)["chosen"]["process.num_terms"] for name in "bcde"]
    assert sorted([done["chosen"]["process.num_terms"], *chosen]) == [0, 1, 2, 4, 8]
    assert last.suggest("f") == "FINISHED"


def test_first_choices_are_tried_wherever_the_driver_died(tmp_path: Path) -> None:
    settings = {"parameters": {**TERMS, **RATE}, "sampler": "tpe", "trials": 9}
    first = search(tmp_path, **settings)
    told(first, "a")
    for _ in range(2):
        first.study.ask()  # and dies before the settings are kept
    again = search(tmp_path, **settings)
    chosen = [told(again, name)["chosen"]["process.num_terms"] for name in "abcde"]
    assert sorted(chosen) == [0, 1, 2, 4, 8]


def test_the_order_of_first_choices_is_the_seed_s(tmp_path: Path) -> None:
    orders = set()
    for seed in range(6):
        (tmp_path / str(seed)).mkdir()
        settings = {"parameters": {**TERMS, **RATE}, "sampler": "tpe", "trials": 9, "seed": seed}
        searcher = search(tmp_path / str(seed), **settings)
        orders.add(tuple(told(searcher, name)["chosen"]["process.num_terms"] for name in "ab"))
        assert searcher.space.config({}).seed == seed
    assert len(orders) > 2


def test_a_failed_trial_is_retried_under_its_number(tmp_path: Path) -> None:
    settings = {"parameters": RATE, "sampler": "random", "trials": 2}
    first = search(tmp_path, **settings)
    given = told(first, "a")
    first.keep("a", {"val/eps_mse": 0.9, PERCENT: 20})
    first.on_trial_complete("a", {ERROR: "the disk is full", PERCENT: 0})
    told(first, "b")
    first.on_trial_complete("b", whole(0.5))
    assert search(tmp_path, **settings).suggest("c") == "FINISHED"
    again = search(tmp_path, **settings, retry_failed=True)
    assert told(again, "d") == given
    assert again.suggest("e") == "FINISHED"
    again.keep("d", {"val/eps_mse": 0.4, PERCENT: 40})
    again.on_trial_complete("d", whole(0.3))
    rows = collect(again.space, tmp_path / "study")
    assert [(row.number, row.state, row.values) for row in rows] == [(0, "complete", [0.3]), (1, "complete", [0.5])]
    assert latest(again.study)[0].intermediate_values == {20: 0.9, 40: 0.4}
    assert search(tmp_path, **settings, retry_failed=True).suggest("f") == "FINISHED"


def test_a_renamed_study_finds_its_trials(tmp_path: Path) -> None:
    first = search(tmp_path, trials=3, sampler="random", parameters=RATE)
    given = told(first, "a")
    (tmp_path / "study").rename(tmp_path / "other")
    assert told(StudySearch(first.space, tmp_path / "other"), "b") == given


def test_a_setting_that_comes_again_has_other_seeds(tmp_path: Path) -> None:
    """Three choices, ten trials."""
    choices = {"process.num_terms": {"type": "categorical", "choices": [0, 1, 2]}}
    searcher = search(tmp_path, parameters=choices, sampler="tpe", trials=10, seeds=2)
    runs = set()
    for name in map(str, range(10)):
        suggestion = told(searcher, name)
        searcher.on_trial_complete(name, whole(0.5))
        for seed in range(2):
            config = searcher.space.config(suggestion["chosen"], 2 * suggestion["repeat"] + seed)
            runs.add((config.process.num_terms, config.seed))
    assert len(runs) == 20
    assert searcher.suggest("more") == "FINISHED"


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_a_study_is_whole_when_all_its_trials_have_ended(sampler: str, tmp_path: Path) -> None:
    searcher = search(tmp_path, sampler=sampler)
    for name in "ab":
        told(searcher, name)
    searcher.on_trial_complete("a", whole(0.5))
    assert not searcher.whole()
    searcher.on_trial_complete("b", {ERROR: "the disk is full"})
    assert searcher.whole()
    assert search(tmp_path, sampler=sampler).whole()
    assert not search(tmp_path, sampler=sampler, retry_failed=True).whole()


# Early stopping


def run_beside(searcher: StudySearch, looks: dict[str, list[float]], percents: list[int]) -> dict[str, int]:
    """Trials look in turn; where each was stopped."""
    stopped: dict[str, int] = {}
    for index, percent in enumerate(percents):
        for name, values in looks.items():
            if name not in stopped and searcher.keep(name, {"val/eps_mse": values[index], PERCENT: percent}):
                searcher.on_trial_complete(name, {"val/eps_mse": values[index], PERCENT: percent})
                stopped[name] = percent
    return stopped


ASHA = {"kind": "asha", "reduction_factor": 2, "min_fraction": 0.4}
STUDY: dict[str, Any] = {"parameters": RATE, "sampler": "random", "trials": 9, "scheduler": ASHA}


def test_the_first_trials_at_a_rung_can_be_stopped_too(tmp_path: Path) -> None:
    """All that reach it are measured by each other, as soon as enough have; the worst came first."""
    searcher = search(tmp_path, **STUDY)
    for name in "abcd":
        told(searcher, name)
    looks = {name: [value] * 4 for name, value in zip("abcd", (0.9, 0.8, 0.2, 0.1), strict=True)}
    assert run_beside(searcher, looks, [20, 40, 60, 100]) == {"a": 60, "b": 60}


def test_nothing_is_stopped_before_its_time_or_after_its_budget(tmp_path: Path) -> None:
    searcher = search(tmp_path, **STUDY)
    for name in "ab":
        told(searcher, name)
    assert run_beside(searcher, {"a": [0.9, 0.1], "b": [0.1, 0.9]}, [30, 100]) == {}
    told(searcher, "c")
    assert not searcher.keep("c", whole(0.9))


def test_a_restarted_driver_remembers_the_rungs(tmp_path: Path) -> None:
    first = search(tmp_path, **STUDY)
    for name, value in (("a", 0.1), ("b", 0.2), ("c", 0.1)):
        told(first, name)
        assert not first.keep(name, {"val/eps_mse": value, PERCENT: 20})
    for name in "ac":
        assert not first.keep(name, {"val/eps_mse": 0.1, PERCENT: 40})
        first.on_trial_complete(name, whole(0.1))
    again = search(tmp_path, **STUDY)
    assert told(again, "b")["number"] == 1
    assert not again.keep("b", {"val/eps_mse": 0.2, PERCENT: 20})  # it comes by again
    assert again.keep("b", {"val/eps_mse": 0.2, PERCENT: 40})


def test_the_median_of_complete_trials_stops_the_worse(tmp_path: Path) -> None:
    searcher = search(tmp_path, **{**STUDY, "scheduler": {"kind": "median", "min_fraction": 0.4}})
    for name, value in zip("abc", (0.1, 0.2, 0.3), strict=True):
        told(searcher, name)
        assert not searcher.keep(name, {"val/eps_mse": value, PERCENT: 40})
        searcher.on_trial_complete(name, whole(value))
    told(searcher, "d")
    assert not searcher.keep("d", {"val/eps_mse": 0.9, PERCENT: 20})
    assert searcher.keep("d", {"val/eps_mse": 0.9, PERCENT: 40})


@pytest.mark.parametrize(("direction", "kept"), [("minimize", {0, 1}), ("maximize", {2, 3})])
def test_rungs_keep_the_best_in_both_directions(direction: str, kept: set[int]) -> None:
    study = optuna.create_study(direction=direction, pruner=RungPruner(10, 2))
    trials = [study.ask() for _ in range(4)]
    for value, trial in enumerate(trials):
        trial.report(value, 10)
    assert {i for i, trial in enumerate(trials) if not trial.should_prune()} == kept


# The storage


def test_a_locked_storage_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than SQLite's own 5 s; and where it stays locked, one line says so."""
    searcher = search(tmp_path, **STUDY)
    told(searcher, "a")
    other = sqlite3.connect(tmp_path / "study" / "optuna.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(6, other.rollback)
    release.start()
    assert not searcher.keep("a", {"val/eps_mse": 0.1, PERCENT: 40})
    release.join()
    monkeypatch.setattr(search_module, "_LOCKED_S", 0.1)
    again = search(tmp_path, **STUDY)
    told(again, "a")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunError, match=r"optuna\.db .*database is locked; end the program that holds it"):
        again.keep("a", {"val/eps_mse": 0.1, PERCENT: 60})
    other.close()


def test_a_damaged_storage_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "optuna.db").write_bytes(b"no database " * 1000)
    with pytest.raises(RunError, match=r"optuna\.db .*file is not a database; put a copy of it back") as caught:
        search(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["trial", "study"])
def test_what_is_deleted_meanwhile_gets_one_line(what: str, tmp_path: Path) -> None:
    searcher = search(tmp_path, **STUDY)
    told(searcher, "a")
    other = open_study(searcher.space, tmp_path / "study")
    if what == "study":
        optuna.delete_study(study_name=other.study_name, storage=other._storage)
    else:
        with sqlite3.connect(tmp_path / "study" / "optuna.db") as database:
            database.execute("DELETE FROM trials")
    with pytest.raises(RunError, match="was deleted meanwhile") as caught:
        searcher.keep("a", {"val/eps_mse": 0.1, PERCENT: 40})
    assert searcher.lost is caught.value
