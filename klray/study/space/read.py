"""Reads a space file and checks it whole: every rule is one line, before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from klray.config import Config, ConfigError, flatten, load_config, nearest, parse_override, read_yaml
from klray.study.space.keys import ENTRY_KEYS, check_keys, with_changes
from klray.study.space.parts import (
    TYPES,
    Categorical,
    Derived,
    FloatParameter,
    IntParameter,
    Objective,
    Parameter,
    Part,
    Scheduler,
    SpaceFile,
    StudyBudget,
    names_of,
)
from klray.study.space.space import SHARES, Space, in_words, trial_images

_MOST_COUNTED = 10_000
_MOST_WARMUP = 5  # the part of a trial's images that may go into its warm-up, 1/5
_LEAST_LOOKS = 3
_FIELDS = {name for model in (FloatParameter, IntParameter, Categorical, Derived) for name in model.model_fields}
AnyPart = TypeVar("AnyPart", bound=Part)


def load_space(path: Path, overrides: Iterable[str] = ()) -> Space:
    """The space of a YAML file, with overrides as ``trials=4``, ``budget.amount=1e5``, ``set.data.limit=200``,
    ``parameters.optimizer.lr.high=0.1`` (values are YAML).

    Raises:
        ConfigError: one line that names the file, for anything wrong in it, down to combinations of values that no
            configuration may have.
    """
    path = Path(path)
    tree = _read(path)
    try:
        for text in overrides:
            _override(tree, *parse_override(text))
        space = _space(path, tree)
        _check_references(space)
        _check_study(space)
        space = _fitted(space)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return space


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        others = [] if path.exists() else sorted(p.name for p in path.parent.glob("*.yaml"))
        near = nearest(path.name, others) if others else ""
        raise ConfigError(f"cannot read the space {path}: {getattr(error, 'strerror', error)}{near}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold config, parameters, budget, ..., got {type(tree).__name__}")
    return tree


def _override(tree: dict[str, Any], key: str, value: Any) -> None:
    head, _, rest = key.partition(".")
    if not rest:
        own = head == "config" and isinstance(value, str) and value.endswith((".yaml", ".yml"))
        tree[head] = str(Path(value).resolve()) if own else value  # typed in the working folder
        return
    section = tree.get(head)
    if head == "scheduler" and isinstance(section, str):
        section = {"kind": section}
    if section is not None and not isinstance(section, dict):
        raise ConfigError(f"{head} has no keys to override, got {key}; give {head} whole")
    name, _, field = rest.rpartition(".")
    if head == "parameters" and field in _FIELDS:
        rest, value = name, {**((section or {}).get(name) or {}), field: value}
    tree[head] = {**(section or {}), rest: value}


def _space(path: Path, tree: Mapping[str, Any]) -> Space:
    file = _part(SpaceFile, tree)
    fixed = flatten(file.set)
    parameters = {name: _parameter(name, entry) for name, entry in file.parameters.items()}
    if both := [name for name in parameters if name in fixed]:
        raise ConfigError(f"{both[0]} is in set and among the parameters; leave it in one of them")
    scheduler = {"kind": file.scheduler} if isinstance(file.scheduler, str) else file.scheduler
    budget = _part(StudyBudget, file.budget, "budget")
    own = file.config.endswith((".yaml", ".yml"))
    try:
        config = load_config(str(path.parent / file.config) if own else file.config)
    except ConfigError as error:
        raise ConfigError(f"config: {error}") from error
    try:  # first what settles which other keys there are
        config = with_changes(config, {key: value for key, value in fixed.items() if key in ENTRY_KEYS})
    except ConfigError as error:
        raise ConfigError(f"set: {error}") from error
    check_keys(fixed, config, parameters=False)
    check_keys(parameters, config, parameters=True)
    try:
        base = with_changes(config, {**fixed, "budget.unit": budget.unit, "budget.amount": budget.amount})
    except ConfigError as error:
        raise ConfigError(f"set: {error}") from error
    return Space(
        path=path,
        question=file.question,
        config_name=file.config,
        fixed=fixed,
        parameters=parameters,
        objectives=tuple(_part(Objective, entry, f"objectives.{i}") for i, entry in enumerate(file.objectives)),
        budget=budget,
        scheduler=_part(Scheduler, scheduler, "scheduler"),
        sampler=file.sampler,
        trials=file.trials,
        seeds=file.seeds,
        seed=file.seed,
        concurrency=file.concurrency,
        base=base,
    )


def _parameter(name: str, entry: Any) -> Parameter:
    where = f"parameters.{name}"
    known = ", ".join(TYPES)
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} must be a mapping with type ({known}) or derive, got {entry!r}")
    if "derive" in entry:
        return _part(Derived, entry, where)
    if "type" not in entry:
        raise ConfigError(f"{where} needs type ({known}) or derive, got {', '.join(map(str, entry)) or 'nothing'}")
    if (kind := str(entry["type"])) not in TYPES:
        raise ConfigError(f"{where}.type must be one of {known}, got {kind!r}{nearest(kind, TYPES)}")
    return _part(TYPES[kind], entry, where)


def _part(model: type[AnyPart], tree: Any, where: str = "") -> AnyPart:
    """``tree`` as a part of the file, or one line about the first thing that is wrong."""
    prefix = f"{where}." if where else ""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where} must be a mapping of {', '.join(model.model_fields)}, got {tree!r}")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = prefix + ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            reason = f"unknown key {key}{nearest(str(first['loc'][-1]), model.model_fields)}"
        elif first["type"] == "missing":
            reason = f"{key} is missing"
        elif first["type"] == "too_short":
            reason = f"{key} must not be empty"
        elif first["type"] == "value_error":
            reason = f"{key.rstrip('.')}: {first['ctx']['error']}"
        else:
            reason = f"{key} must be {first['msg'].removeprefix('Input should be ')}, got {first['input']!r}"
        raise ConfigError(reason) from error


def _check_references(space: Space) -> None:
    """Expressions refer to the configuration and to earlier parameters."""
    fixed, names = space.base.flat(), list(space.parameters)
    for position, (name, parameter) in enumerate(space.parameters.items()):
        for used in names_of(parameter):
            if used in names[position:]:
                what = "itself" if used == name else f"{used}, which comes later; put it below that"
                raise ConfigError(f"parameters.{name} refers to {what}")
            if used not in fixed and used not in names:
                raise ConfigError(f"parameters.{name}: unknown name {used}{nearest(used, fixed)}")


def _check_study(space: Space) -> None:
    """The objectives, the sampler and the scheduler fit each other."""
    metrics = [objective.metric for objective in space.objectives]
    if twice := [metric for metric in metrics if metrics.count(metric) > 1]:
        raise ConfigError(f"objectives must differ, got {twice[0]} twice")
    for objective in space.objectives:
        drawn = space.base.evaluation.metrics
        if objective.score and objective.score not in drawn:
            raise ConfigError(
                f"objectives: {objective.metric} needs {objective.score} in evaluation.metrics, got {drawn}; "
                f"set evaluation.metrics: [{', '.join([*drawn, objective.score])}]"
            )
    if space.sampler == "nsga2" and len(metrics) == 1:
        raise ConfigError("sampler nsga2 needs several objectives, got 1; take tpe")
    if space.scheduler.kind != "none" and len(metrics) > 1:
        raise ConfigError(f"scheduler {space.scheduler.kind} needs one objective, got {len(metrics)}; take none")
    if space.sampler == "grid":
        count = sum(1 for _ in islice(space.iterate_grid(), _MOST_COUNTED + 1))
        if count > space.trials:
            number = f"more than {_MOST_COUNTED}" if count > _MOST_COUNTED else str(count)
            raise ConfigError(f"sampler grid has {number} combinations, got trials: {space.trials}; raise trials")


def _fitted(space: Space) -> Space:
    """The space, scaled to its budget; every setting at its edges makes a configuration."""
    shortest: tuple[int, Config] | None = None
    for setting in space.corners():
        try:
            config = space.config(setting)
        except ConfigError as error:
            raise ConfigError(f"{in_words(setting)}: {error}; bound the parameters by low, high, when") from error
        images = trial_images(config)
        if images is not None and (shortest is None or images < shortest[0]):
            shortest = images, config
    if shortest is None:
        return space
    images, config = shortest
    warmup, every = config.optimizer.warmup_images, config.validation.every_images
    unfit = {
        "optimizer.warmup_images": f"{warmup:,} of them to warm up" if warmup * _MOST_WARMUP > images else "",
        "validation.every_images": f"a look each {every:,}" if images < _LEAST_LOOKS * every else "",
    }
    scaled, notes = [], []
    for key, what in unfit.items():
        if what:
            told = key in space.fixed or key in space.parameters
            way = "as the space says" if told else f"so each trial takes 1/{SHARES[key]} of its images for {key}"
            notes.append(f"the budget is small: it buys the shortest trial {images:,} images, {what}; {way}")
            scaled += [] if told else [key]
    return replace(space, scaled=tuple(scaled), notes=tuple(notes))
