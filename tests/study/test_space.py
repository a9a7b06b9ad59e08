"""Space files: what they may say, what a trial gets from them, and the one line that every mistake gets."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from klray.config import Config, ConfigError, flatten
from klray.study.space import Space, load_space
from klray.study.space.expressions import Expression, ExpressionError
from klray.study.space.space import MOST_CORNERS

SHIPPED = sorted((Path(__file__).parents[2] / "tune_spaces").glob("*.yaml"))
SPACE: dict[str, Any] = {
    "question": "How many?",
    "config": "digits",
    "set": {"tracking.every_steps": 20},
    "parameters": {
        "process.num_terms": {"type": "categorical", "choices": [0, 1, 2, 4, 8]},
        "optimizer.lr": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
        "loss.partial_terms": {"type": "int", "low": 1, "high": "process.num_terms", "when": "process.num_terms > 0"},
        "process.time_grid": {"derive": "200 / process.num_terms", "when": "process.num_terms > 0"},
    },
    "objectives": [{"metric": "val/eps_mse", "direction": "minimize"}],
    "budget": {"unit": "network_evals", "amount": 200000},
    "scheduler": "none",
    "sampler": "tpe",
    "trials": 16,
    "seeds": 1,
    "concurrency": None,
}
TERMS, RATE, PARTIAL, GRID = SPACE["parameters"]
KL = {"type": "categorical", "choices": [2, 4]}
FLOAT = {"type": "float", "low": 1e-4, "high": 1e-2}
COST = {"metric": "network_evals_per_image", "direction": "minimize"}
ERROR = {"metric": "val/eps_mse"}
ABSENT = object()


def write(folder: Path, tree: Any) -> Path:
    """JSON is YAML."""
    path = folder / "space.yaml"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return path


def changed(*changes: tuple[tuple[str, ...], Any]) -> dict[str, Any]:
    """SPACE with other values, or with keys taken out."""
    tree = copy.deepcopy(SPACE)
    for keys, value in changes:
        node = tree
        for key in keys[:-1]:
            node = node[key]
        if value is ABSENT:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value
    return tree


def of(folder: Path, parameters: dict[str, Any], **more: Any) -> Space:
    """A small space of these parameters."""
    return load_space(write(folder, {"config": "digits", "budget": SPACE["budget"], "parameters": parameters, **more}))


def draws(space: Space, count: int, seed: int = 0) -> list[dict[str, Any]]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        directions=[objective.direction for objective in space.objectives],
        sampler=optuna.samplers.RandomSampler(seed=seed),
    )
    return [space.suggest(study.ask()) for _ in range(count)]


Bad = tuple[tuple[tuple[str, ...], Any] | list[tuple[tuple[str, ...], Any]] | str, str]


def parameter(name: str, **entry: Any) -> tuple[tuple[str, ...], Any]:
    """One parameter more, or in place of another."""
    return ("parameters", name), entry


def only(**parameters: Any) -> tuple[tuple[str, ...], Any]:
    """These parameters and no other; __ stands for a point."""
    return ("parameters",), {name.replace("__", "."): entry for name, entry in parameters.items()}


BAD: list[Bad] = [
    ("{", "is not valid YAML: while parsing a flow node"),
    ("trials: 1\ntrials: 2", "trials is given twice"),
    ("- 1", "must hold config, parameters, budget, ..., got list"),
    ("", "must hold config, parameters, budget, ..., got NoneType"),
    ((("trial",), 3), "unknown key trial; did you mean trials?"),
    ((("budget", "units"), "images"), "unknown key budget.units; did you mean unit?"),
    ((("config",), ABSENT), "config is missing"),
    ((("budget",), ABSENT), "budget is missing"),
    ((("budget", "amount"), ABSENT), "budget.amount is missing"),
    ((("budget",), 1000), "budget must be a mapping of unit, amount, got 1000"),
    ((("config",), "digit"), "config: unknown preset 'digit'; did you mean digits?"),
    ((("config",), "none.yaml"), "none.yaml: No such file or directory"),
    ((("parameters",), {}), "parameters must not be empty"),
    ((("parameters",), [1]), "parameters must be a valid dictionary, got [1]"),
    ((("set",), {"data.limits": 5}), "unknown key data.limits; did you mean data.limit?"),
    ((("set",), {"data.limit": 0}), "set: data.limit must be greater than 0, got 0"),
    ((("set",), {"data": 3}), "unknown key data"),
    ((("set",), {"seed": 3}), "seed is not for set or parameters; the study's seeds gives it"),
    ((("set",), {"budget": {"amount": 3}}), "budget.amount is not for set or parameters; the study's budget gives it"),
    (parameter("seed", type="int", low=0, high=3), "seed is not for set or parameters; the study's seeds gives it"),
    (parameter("budget.amount", **FLOAT), "budget.amount is not for set or parameters; the study's budget gives it"),
    (parameter("process.num_term", **KL), "unknown key process.num_term; did you mean process.num_terms?"),
    (parameter("process", **KL), "unknown key process"),
    (parameter("validation.images", **KL), "validation.images cannot vary: all trials must be measured alike"),
    (parameter("data.held_out", **KL), "data.held_out cannot vary: all trials must be measured alike"),
    ((("set", "optimizer.lr"), 0.1), "optimizer.lr is in set and among the parameters; leave it in one of them"),
    (parameter(RATE, type="uniform"), "parameters.optimizer.lr.type must be one of float, int, categorical, got"),
    (parameter(RATE, low=1), "parameters.optimizer.lr needs type (float, int, categorical) or derive, got low"),
    ((("parameters", RATE), 3), "parameters.optimizer.lr must be a mapping with type (float, int, categorical)"),
    (parameter(RATE, type="float", high=1), "parameters.optimizer.lr.low is missing"),
    (parameter(RATE, type="float", low=1), "parameters.optimizer.lr.high is missing"),
    (parameter(RATE, type="categorical"), "parameters.optimizer.lr.choices is missing"),
    (parameter(RATE, **FLOAT, hihg=3), "unknown key parameters.optimizer.lr.hihg; did you mean high?"),
    (parameter(GRID, derive="2", low=3), "unknown key parameters.process.time_grid.low; known: derive, when"),
    (parameter(RATE, type="float", low=2, high=1), "parameters.optimizer.lr: low must be <= high, got 2 > 1"),
    (parameter(RATE, type="float", low=[1], high=1), "lr.low: must be a number or an expression, got [1]"),
    (parameter(RATE, type="float", low="'a'", high=1), "parameters.optimizer.lr: 'a' must be a number, got 'a'"),
    (parameter(RATE, type="float", low=0, high=1, log=True), "parameters.optimizer.lr: log needs low > 0, got 0"),
    (parameter(RATE, **FLOAT, log=True, step=0.1), "parameters.optimizer.lr: log and step exclude each other"),
    (parameter(RATE, **FLOAT, log="yes"), "parameters.optimizer.lr.log must be a valid boolean, got 'yes'"),
    (parameter(RATE, **FLOAT, step=0), "parameters.optimizer.lr.step must be greater than 0, got 0"),
    (parameter(TERMS, type="int", low=1, high=4, step=0), "process.num_terms.step must be greater than 0, got 0"),
    (parameter(TERMS, type="int", low=1, high=2.5), "the ends of an int must be whole, got 2.5 from 2.5"),
    (only(process__num_terms=KL, loss__partial_terms={"type": "int", "low": 1, "high": "process.num_terms / 4"}),
     "got 0.5 from process.num_terms / 4; // rounds down with process.num_terms=2"),
    (parameter(TERMS, type="categorical", choices=[]), "parameters.process.num_terms.choices must not be empty"),
    (parameter(TERMS, type="categorical", choices=[2, 4, 2]), "choices must differ, got 2 twice"),
    (only(process__num_terms={"type": "float", "low": 1, "high": 8}), "num_terms must be a valid integer, got 1.0"),
    ((("parameters", PARTIAL, "high"), "process.terms"), "partial_terms: unknown name process.terms; did you mean"),
    ((("parameters", PARTIAL, "high"), PARTIAL), "parameters.loss.partial_terms refers to itself"),
    ((("parameters", RATE, "when"), "process.time_grid != 3"), "refers to process.time_grid, which comes later"),
    ((("parameters", PARTIAL, "when"), "process.num_terms >"), "cannot read the expression 'process.num_terms >'"),
    ((("parameters", PARTIAL, "high"), "max(1"), "inside { } YAML ends a text at a comma: quote it"),
    ((("parameters", PARTIAL, "high"), "open('x')"), "an expression may hold numbers, strings, true"),
    ((("parameters", PARTIAL, "when"), "process.num_terms"), "process.num_terms must be true or false, got 0"),
    ((("parameters", PARTIAL, "when"), True), "partial_terms.when: must be a number or an expression, got True"),
    ((("parameters", GRID, "when"), ABSENT), "200 / process.num_terms divides by zero with process.num_terms=0"),
    (parameter(GRID, derive="data.name * 2"), "parameters.process.time_grid: data.name must be a number, got 'digits'"),
    ((("parameters", PARTIAL, "when"), ABSENT), "low must be <= high, got 1 > 0 with process.num_terms=0"),
    ((("parameters", TERMS, "choices"), [1, 3]),
     "parameters.process.time_grid: 200 / process.num_terms must be a whole number, got 66.6667 "
     "(process.num_terms may be 1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 200) with process.num_terms=3"),
    ([parameter(TERMS, type="int", low=1, high=8), (("parameters", PARTIAL), ABSENT)],
     "must be a whole number, got 66.6667"),  # for 3, neither an end nor the middle
    (parameter(PARTIAL, type="int", low=1, high=8, when="process.num_terms > 0"),
     "loss.partial_terms must be <= process.num_terms = 1, got 4; try 1; bound the parameters by low, high, when"),
    (only(network__architecture={"type": "categorical", "choices": ["repeated", "wide"]},
          mesh__basis={"type": "categorical", "choices": [1, 2]}),
     "network.architecture=wide, mesh.basis=2: mesh.basis must be 1 for network.architecture wide, got 2"),
    ((("set",), {"network.term_input": "time_offset"}), "time_offset needs process.time_grid to be a number N"),
    ((("objectives",), []), "objectives must not be empty"),
    ((("objectives",), [{"direction": "minimize"}]), "objectives.0.metric is missing"),
    ((("objectives",), [{"metric": "train/loss"}]), "must be comparable, which a loss is not across M, coupling and"),
    ((("objectives",), [{"metric": "val/loss"}]), "got val/loss; take val/eps_mse"),
    ((("objectives",), [{"metric": "val/loss_t03"}]), "got val/loss_t03; take val/eps_mse"),
    ((("objectives",), [{"metric": "val/eps"}]), "must be a known metric, got val/eps; did you mean val/eps_mse?"),
    ((("objectives",), [{**ERROR, "direction": "down"}]), "direction must be 'minimize' or 'maximize', got 'down'"),
    ((("objectives",), [ERROR, ERROR]), "objectives must differ, got val/eps_mse twice"),
    ((("objectives",), [{"metric": "fid"}]), "fid needs fid in evaluation.metrics, got ['kid']; set evaluation"),
    ((("budget", "unit"), "steps"), "budget.unit: must be 'network_evals', 'images' or 'seconds', got 'steps': steps"),
    ((("budget", "unit"), "epochs"), "budget.unit must be 'network_evals', 'images' or 'seconds', got 'epochs'"),
    ((("budget", "amount"), 0), "budget.amount must be greater than 0, got 0"),
    ((("sampler",), "grid"), "sampler grid needs a step of every float, got none for optimizer.lr; give step"),
    ([only(process__num_terms={"type": "int", "low": 1, "high": 8}), (("sampler",), "grid"), (("trials",), 7)],
     "sampler grid has 8 combinations, got trials: 7; raise trials"),
    ([only(optimizer__lr={"type": "float", "low": 0.1, "high": 9, "step": 1e-6}), (("sampler",), "grid")],
     "sampler grid has more than 10000 combinations, got trials: 16"),
    ((("sampler",), "cmaes"), "sampler must be 'tpe', 'random', 'grid' or 'nsga2', got 'cmaes'"),
    ((("sampler",), "nsga2"), "sampler nsga2 needs several objectives, got 1; take tpe"),
    ([(("scheduler",), "asha"), (("objectives",), [ERROR, COST])], "scheduler asha needs one objective, got 2; take"),
    ([(("scheduler",), "median"), (("objectives",), [ERROR, COST])], "scheduler median needs one objective, got 2"),
    ((("scheduler",), "ash"), "scheduler.kind must be 'none', 'asha' or 'median', got 'ash'"),
    ((("scheduler",), {"kind": "asha", "reduction_factor": 1}), "scheduler.reduction_factor must be greater than or"),
    ((("scheduler",), {"kind": "asha", "min_fraction": 1}), "scheduler.min_fraction must be less than 1, got 1"),
    ((("trials",), 0), "trials must be greater than 0, got 0"),
    ((("seeds",), 0), "seeds must be greater than 0, got 0"),
    ((("concurrency",), 0), "concurrency must be greater than 0, got 0"),
    ((("trials",), 2.5), "trials must be a valid integer, got 2.5"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_mistake_is_one_line(change: Any, message: str, tmp_path: Path) -> None:
    tree = change if isinstance(change, str) else changed(*(change if isinstance(change, list) else [change]))
    path = write(tmp_path, tree)
    with pytest.raises(ConfigError) as caught:
        load_space(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, SPACE)
    with pytest.raises(ConfigError, match=r"spacs.yaml: No such file or directory; did you mean space.yaml\?"):
        load_space(tmp_path / "spacs.yaml")
    with pytest.raises(ConfigError, match="No such file or directory$"):
        load_space(tmp_path / "nowhere" / "space.yaml")
    (tmp_path / "space.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read the space .*utf-8[^\n]*$"):
        load_space(tmp_path / "space.yaml")


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, SPACE))
    drawn = draws(space, 100)
    assert {setting[TERMS] for setting in drawn} == {0, 1, 2, 4, 8}
    for setting in drawn:
        config = space.config(setting, seed=3)
        assert config.seed == 3
        assert config.tracking.every_steps == 20
        assert (config.budget.unit, config.budget.amount) == ("network_evals", 200_000)
        assert 1e-4 <= config.optimizer.lr <= 1e-2
        if setting[TERMS] == 0:
            assert setting.keys() == {TERMS, RATE}
            assert (config.loss.partial_terms, config.process.time_grid) == (None, "continuous")
        else:
            assert 1 <= setting[PARTIAL] <= setting[TERMS]
            assert setting[GRID] * setting[TERMS] == 200
            assert type(setting[GRID]) is int


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_space_gives_valid_configurations(path: Path) -> None:
    assert [line[0] for line in path.read_text().splitlines()[:3]] == ["#", "#", "q"]
    space = load_space(path)
    assert space.question.endswith("?")
    for setting in draws(space, 200):
        config = space.config(setting)
        assert setting.items() <= config.flat().items()
        if config.loss.partial_terms is not None:
            assert config.loss.partial_terms <= config.process.num_terms
        if path.stem == "time_discretization":
            assert int(config.process.time_grid) * config.process.num_terms == 200


def test_six_spaces_ship() -> None:
    names = ["M", "fine_tune", "joint", "learning_rate", "partial_k", "time_discretization"]
    assert sorted(path.stem for path in SHIPPED) == sorted(names)


def test_fine_tuning_takes_its_baseline_from_the_command_line() -> None:
    path = next(path for path in SHIPPED if path.stem == "fine_tune")
    assert all(setting["network.init_from"] is None for setting in draws(load_space(path), 20))
    space = load_space(path, ["parameters.network.init_from.choices=[null, runs/base]"])
    for setting in draws(space, 50):
        assert ("optimizer.warmup_images" in setting) == (setting["network.init_from"] == "runs/base")


def test_the_paper_s_term_input_can_be_fixed_beside_a_derived_grid() -> None:
    """The rule that binds them holds for the trials; the base alone would break it."""
    path = next(path for path in SHIPPED if path.stem == "time_discretization")
    space = load_space(path, ["set.network.term_input=time_offset"])
    assert {space.config(setting).network.term_input for setting in space.corners()} == {"time_offset"}
    assert space.base.process.time_grid == "continuous"


def test_values_that_a_later_parameter_reads_where_they_do_not_apply(tmp_path: Path) -> None:
    """They are the base's: digits has M = 4."""
    inactive = {**KL, "when": "network.kind == 'mlp'"}
    space = of(tmp_path, {TERMS: inactive, PARTIAL: {"type": "int", "low": TERMS, "high": TERMS}})
    assert space.grid() == [{PARTIAL: 4}]
    assert space.config({PARTIAL: 4}).process.num_terms == 4


def test_a_range_ends_on_a_step_and_steps_are_decimal(tmp_path: Path) -> None:
    space = of(tmp_path, {RATE: {"type": "float", "low": 0.1, "high": 0.75, "step": 0.1}}, sampler="grid")
    values = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]
    assert [setting[RATE] for setting in space.grid()] == values
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert {setting[RATE] for setting in draws(space, 100)} == set(values)


def test_the_grid_holds_every_setting_once(tmp_path: Path) -> None:
    parameters = {TERMS: {**KL, "choices": [0, 2, 4]}, **{name: SPACE["parameters"][name] for name in (PARTIAL, GRID)}}
    space = of(tmp_path, parameters, sampler="grid")
    two = [{TERMS: 2, PARTIAL: k, GRID: 100} for k in (1, 2)]
    four = [{TERMS: 4, PARTIAL: k, GRID: 50} for k in (1, 2, 3, 4)]
    assert space.grid() == [{TERMS: 0}, *two, *four]


def test_lists_as_choices_survive_a_storage(tmp_path: Path) -> None:
    choices = [[16, 32], [32, 64], [8, 8]]
    space = of(tmp_path, {"network.channels": {"type": "categorical", "choices": choices}, GRID: {"derive": 10}})
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(tmp_path / "study")))
    study = optuna.create_study(storage=storage)
    for setting in space.grid():
        study.enqueue_trial(space.params(setting))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        drawn = [space.suggest(study.ask()) for _ in choices]
    assert drawn == space.grid() == [{"network.channels": choice, GRID: 10} for choice in choices]


def test_a_large_space_is_tried_by_a_fixed_sample(tmp_path: Path) -> None:
    rates = {key: {"type": "float", "low": 0.1, "high": 0.9} for key in ("lr", "eps", "weight_decay", "clip_norm")}
    parameters = {f"optimizer.{key}": entry for key, entry in rates.items()}
    parameters |= {f"ema.{key}": {"type": "int", "low": 1, "high": 9} for key in ("every",)}
    parameters |= {TERMS: {"type": "int", "low": 1, "high": 60}, PARTIAL: {"type": "int", "low": 1, "high": TERMS}}
    space = of(tmp_path, parameters)
    corners = space.corners()
    assert len(corners) == MOST_CORNERS
    assert corners == space.corners()
    assert {setting[TERMS] for setting in corners} == set(range(1, 61))
    parameters[PARTIAL]["high"] = 30
    with pytest.raises(ConfigError, match="loss.partial_terms must be <= process.num_terms"):
        of(tmp_path, parameters)


def test_a_config_of_one_s_own_lies_beside_the_space(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("process: {num_terms: 6}\ndata: {name: digits}")
    space = of(tmp_path, {RATE: FLOAT}, config="own.yaml")
    assert space.base.process.num_terms == 6


def test_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("ema: {decay: 0.5}")
    (tmp_path / "study").mkdir()
    overrides = ["trials=4", "budget.amount=1e5", "set.data.limit=200", "scheduler=asha", "scheduler.min_fraction=0.2"]
    overrides += ["parameters.optimizer.lr.high=0.5", "parameters.optimizer.eps={type: int, low: 1, high: 2}"]
    space = load_space(write(tmp_path / "study", SPACE), [*overrides, "config=own.yaml"])
    assert (space.trials, space.budget.amount, space.base.data.limit) == (4, 1e5, 200)
    assert (space.scheduler.kind, space.scheduler.min_fraction) == ("asha", 0.2)
    assert space.base.tracking.every_steps == 20
    assert space.describe()["parameters"][RATE]["high"] == 0.5
    assert "optimizer.eps" in space.parameters
    assert space.base.ema.decay == 0.5  # a path on the command line is one from the working folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trials", "--set takes key=value, got 'trials'"),
        ("trails=3", "unknown key trails; did you mean trials?"),
        ("trials=many", "trials must be a valid integer, got 'many'"),
        ("set.optimizer.lr=1", "optimizer.lr is in set and among the parameters"),
        ("trials.most=3", "trials has no keys to override, got trials.most; give trials whole"),
        ("parameters.optimizer.rl.high=1", "parameters.optimizer.rl needs type"),
    ],
)
def test_a_bad_override(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_space(write(tmp_path, SPACE), [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def reordered(tree: Any) -> Any:
    return {key: reordered(tree[key]) for key in reversed(tree)} if isinstance(tree, dict) else tree


ORDER = (TERMS, GRID, PARTIAL, RATE)
SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "order of keys": lambda: {
        **reordered(SPACE),
        "parameters": {name: reordered(entry) for name, entry in SPACE["parameters"].items()},
    },
    "order of parameters": lambda: changed((("parameters",), {k: SPACE["parameters"][k] for k in ORDER})),
    "trials": lambda: changed((("trials",), 99)),
    "concurrency": lambda: changed((("concurrency",), 2)),
    "question": lambda: changed((("question",), "Why?")),
    "defaults left out": lambda: changed((("seeds",), ABSENT), (("scheduler",), ABSENT), (("objectives",), ABSENT)),
    "spaces in an expression": lambda: changed((("parameters", PARTIAL, "when"), "process.num_terms>0")),
    "1e-2 as an expression": lambda: changed((("parameters", RATE, "high"), "1/100")),
    "how often to report": lambda: changed((("set",), {"tracking.every_steps": 7})),
    "a preset's own value in set": lambda: changed((("set", "data.image_size"), 8)),
}  # fmt: skip
OTHER = {
    "parameters.optimizer.lr.high: 0.01 -> 0.02": (("parameters", RATE, "high"), 0.02),
    "parameters.process.num_terms.choices: [0, 1, 2, 4, 8] -> [0, 1]": (("parameters", TERMS, "choices"), [0, 1]),
    "parameters.process.time_grid.when: process.num_terms > 0 -> process.num_terms > 1":
        (("parameters", GRID, "when"), "process.num_terms > 1"),
    "parameters.optimizer.eps.type: absent -> float": parameter("optimizer.eps", **FLOAT),
    "parameters.process.time_grid.derive: 200 / process.num_terms -> absent": (("parameters", GRID), ABSENT),
    "budget.amount: 200000.0 -> 100.0": (("budget", "amount"), 100),
    "budget.unit: network_evals -> images": (("budget", "unit"), "images"),
    "scheduler.kind: none -> asha": (("scheduler",), "asha"),
    "sampler: tpe -> random": (("sampler",), "random"),
    "seeds: 1 -> 2": (("seeds",), 2),
    "base.data.limit: null -> 9": (("set", "data.limit"), 9),
    "base.preset: digits -> mnist_small": (("config",), "mnist_small"),
}  # fmt: skip


@pytest.mark.parametrize("what", SAME)
def test_the_same_study(what: str, tmp_path: Path) -> None:
    space = load_space(write(tmp_path, SPACE))
    other = load_space(write(tmp_path, SAME[what]()))
    assert other.fingerprint() == space.fingerprint()
    assert other.differences(json.loads(json.dumps(space.describe()))) == []


@pytest.mark.parametrize("difference", OTHER)
def test_another_study(difference: str, tmp_path: Path) -> None:
    space = load_space(write(tmp_path, SPACE))
    other = load_space(write(tmp_path, changed(OTHER[difference])))
    assert difference in other.differences(json.loads(json.dumps(space.describe())))
    assert other.fingerprint() != space.fingerprint()


def test_how_images_are_scored_matters_where_scores_are_the_objective(tmp_path: Path) -> None:
    spaces = [
        of(tmp_path, {RATE: FLOAT}, objectives=[{"metric": metric}], set={"evaluation.num_samples": count})
        for metric in ("kid", "val/eps_mse")
        for count in (500, 1000)
    ]
    assert spaces[1].differences(spaces[0].describe()) == ["base.evaluation.num_samples: 500 -> 1000"]
    assert spaces[3].differences(spaces[2].describe()) == []


def test_a_space_travels(tmp_path: Path) -> None:
    space = load_space(write(tmp_path, SPACE))
    copied = pickle.loads(pickle.dumps(space))
    assert len(space.fingerprint()) == 16
    assert copied.fingerprint() == space.fingerprint()
    assert draws(copied, 5) == draws(space, 5)
    assert flatten(copied.describe()) == flatten(space.describe())


def test_choices_reach_the_configuration_unchanged(tmp_path: Path) -> None:
    """A key inside sampling.options too, and null."""
    parameters = {
        "sampling.options.variant": {"type": "categorical", "choices": ["bh1", "bh2"]},
        "loss.term_chunk": {"type": "categorical", "choices": [None, 1], "when": "sampling.options.variant == 'bh2'"},
    }
    space = of(tmp_path, parameters, sampler="grid")
    found: list[Config] = [space.config(setting) for setting in space.grid()]
    seen = [(config.sampling.options["variant"], config.loss.term_chunk) for config in found]
    assert seen == [("bh1", None), ("bh2", None), ("bh2", 1)]


VALUES = {"a": 3, "b.c": 0, "name": "wide", "none": None, "half": 0.5}
EXPRESSIONS: dict[str, Any] = {
    "1 + 2 * 3": 7,
    "(1 + 2) * 3": 9,
    "2 - 3 - 4": -5,
    "100 / 5 / 2": 10,
    "-2 * -a": 6,
    "7 // 2 + 7 % 4": 6,
    "200 / a": 200 / 3,
    "a * (1 / 3)": 1,
    "half + half": 1,
    "1e-4": 1e-4,
    "min(a, 2, 5) + max(1, half)": 3,
    "1 + 1 == 2 and not a < 2": True,
    "true or 1 / b.c > 0": True,
    "b.c > 0 and 1 / b.c > 2": False,
    "1 < a < 4": True,
    "1 < a < 3": False,
    "not a == 3 or name == 'wide'": True,
    "none == null": True,
    "name != null": True,
    "a == 'wide'": False,
    "-half": -0.5,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_an_expression(text: str) -> None:
    value = Expression.read(text).value(VALUES)
    assert value == EXPRESSIONS[text]
    assert type(value) is type(EXPRESSIONS[text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os')", "not __import__('os')"),
        ("__import__('os').system('ls')", "not __import__('os').system('ls')"),
        ("a.bit_length()", "not a.bit_length()"),
        ("(1).real", "not 1 .real"),
        ("'x'.upper", "not 'x'.upper"),
        ("a[0]", "not a[0]"),
        ("lambda: 1", "not lambda: 1"),
        ("[1, 2]", "not [1, 2]"),
        ("{1: 2}", "not {1: 2}"),
        ("[x for x in a]", "not [x for x in a]"),
        ("1 if a else 2", "not 1 if a else 2"),
        ("f'{a}'", "not f'{a}'"),
        ("(a := 3)", "not (a := 3)"),
        ("2 ** 999", "not 2 ** 999"),
        ("1 << 9", "not 1 << 9"),
        ("~a", "not ~a"),
        ("1j", "not 1j"),
        ("b'x'", "not b'x'"),
        ("...", "not ..."),
        ("a in name", "not a in name"),
        ("a is none", "not a is none"),
        ("min(a)", "not min(a)"),
        ("min(*a, 1)", "not *a"),
        ("max(a, 1, key=a)", "not max(a, 1, key=a)"),
        ("", "cannot read the expression ''"),
        ("1 +", "cannot read the expression '1 +': invalid syntax"),
        ("a b", "cannot read the expression 'a b'"),
        ("import os", "cannot read the expression 'import os'"),
        ("1\x00", "cannot read the expression"),
        ("(" * 150, "cannot read the expression"),
        ("1" * 201, "at most 200 characters, got 201"),
    ],
)
def test_what_an_expression_may_not_hold(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Expression.read(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / b.c", "1 / b.c divides by zero"),
        ("1 % b.c", "1 % b.c divides by zero"),
        ("name * 2", "name must be a number, got 'wide'"),
        ("true + 1", "true must be a number, got True"),
        ("none < 1", "none must be a number, got None"),
        ("name < 'x'", "name must be a number, got 'wide'"),
        ("not a", "a must be true or false, got 3"),
        ("a > 1 and name", "name must be true or false, got 'wide'"),
        ("1e308 * 10", "a value must be finite, got inf"),
        ("1e999", "a value must be finite, got inf"),
    ],
)
def test_a_value_that_an_expression_cannot_have(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Expression.read(text).value(VALUES)
    assert message in str(caught.value)


# Budgets that are too small for the preset's warm-up and looks


def small(tmp_path: Path, **changes: Any) -> Space:
    tree = {"config": "digits", "parameters": {TERMS: {"type": "categorical", "choices": [0, 8]}}, **changes}
    return load_space(write(tmp_path, {"budget": {"unit": "network_evals", "amount": 80000}, **tree}))


def test_warm_up_and_looks_fit_a_small_budget(tmp_path: Path) -> None:
    """As tune_spaces/M.yaml has them: shares of each trial's own images."""
    space = small(tmp_path)
    for terms, images in ((0, 80000), (8, 10000)):
        config = space.config({TERMS: terms})
        assert (config.optimizer.warmup_images, config.validation.every_images) == (images // 25, images // 5)
    assert len(space.notes) == 2
    assert "buys the shortest trial 10,000 images, 3,200 of them to warm up; so each trial takes 1/25" in space.notes[0]
    assert space.fingerprint() != small(tmp_path, budget={"unit": "network_evals", "amount": 1e6}).fingerprint()


def test_what_the_space_says_of_warm_up_and_looks_holds(tmp_path: Path) -> None:
    said = {"optimizer.warmup_images": 9000, "validation.every_images": 16000}
    space = small(tmp_path, set=said)
    assert space.config({TERMS: 8}).optimizer.warmup_images == 9000
    assert space.scaled == ()
    assert len(space.notes) == 2
    assert all("as the space says" in note for note in space.notes)


@pytest.mark.parametrize("budget", [{"unit": "images", "amount": 64000}, {"unit": "seconds", "amount": 10}])
def test_a_budget_that_is_large_enough_changes_nothing(budget: dict[str, Any], tmp_path: Path) -> None:
    space = small(tmp_path, budget=budget)
    assert (space.scaled, space.notes) == ((), ())
    assert space.config({TERMS: 8}).optimizer.warmup_images == 3200


def test_the_shipped_study_of_m_needs_no_scaling() -> None:
    (file,) = [path for path in SHIPPED if path.name == "M.yaml"]
    assert load_space(file).notes == ()


def test_a_setting_s_title_is_what_varies(tmp_path: Path) -> None:
    parameters = {
        "process.num_terms": {"type": "categorical", "choices": [2, 4]},
        "loss.partial_terms": {"type": "categorical", "choices": [1, 2]},
        "optimizer.lr": {"type": "float", "low": 1e-3, "high": 1e-2, "log": True},
    }
    tree = {"config": "digits", "budget": SPACE["budget"], "parameters": parameters, "sampler": "random", "trials": 2}
    space = load_space(write(tmp_path, tree))
    chosen = {"process.num_terms": 4, "loss.partial_terms": 2, "optimizer.lr": 0.008}
    assert space.title(chosen) == "M=4 K=2 lr=0.008"
