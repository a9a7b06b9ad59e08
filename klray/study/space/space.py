"""A study's search space: what a trial may choose, and the configuration that its choices make."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from klray.config import Config, ConfigError, flatten, override
from klray.study.space.expressions import Expression
from klray.study.space.keys import takes_fractions
from klray.study.space.parts import (
    Categorical,
    Choices,
    Derived,
    Domain,
    FloatParameter,
    Objective,
    Parameter,
    Scheduler,
    StudyBudget,
    names_of,
)

MOST_CORNERS = 4096
_MOST_VALUES = 64  # tried of a stepped parameter that others refer to; of another one its ends and middle
_NOT_COMPARED = ("question", "config", "set", "trials", "concurrency")  # config and set show in base
_HIDDEN = ("validation.", "tracking.", "checkpoint.", "optimizer.warmup_images")
_SHORT = {"process.num_terms": "M", "loss.partial_terms": "K"}  # the field's own letters
_MOST_SUGGESTED = 1000  # up to where values are looked for that would make a derived value whole

# What a trial's images are divided by for its warm-up, and to be looked at five times.
SHARES = {"optimizer.warmup_images": 25, "validation.every_images": 5}

Pick = Callable[[str, Domain], Iterable[Any]]


class Trial(Protocol):
    """What a setting is drawn from, as optuna.Trial."""

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Space:
    """A space file, read and checked by ``load_space``.

    ``base``: the file's config with ``fixed`` (the file's ``set``) and the budget. What a trial does not choose is
    taken from it. Rules between keys (K <= M) hold for every trial's configuration, not necessarily for ``base``.
    ``scaled``: keys of ``SHARES`` that each trial takes from its own number of images, as the base's are made for a
    larger budget; ``notes``: a line on each key that does not fit the budget.
    """

    path: Path
    question: str
    config_name: str
    fixed: dict[str, Any]
    parameters: dict[str, Parameter]
    objectives: tuple[Objective, ...]
    budget: StudyBudget
    scheduler: Scheduler
    sampler: str
    trials: int
    seeds: int
    seed: int
    concurrency: int | None
    base: Config
    scaled: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """One setting, drawn parameter by parameter: dotted keys to values, chosen and derived.

        Raises:
            ConfigError: where an expression has no value for what was drawn.
        """
        return next(self._settings(lambda name, domain: [_draw(trial, name, domain)]))

    def params(self, setting: Mapping[str, Any]) -> dict[str, Any]:
        """A setting as a trial's own parameters, for ``Study.enqueue_trial``: without what is derived."""
        chosen = {k: v for k, v in setting.items() if not isinstance(self.parameters[k], Derived)}
        return {k: _label(v) if isinstance(self.parameters[k], Categorical) else v for k, v in chosen.items()}

    def config(self, chosen: Mapping[str, Any], seed: int = 0) -> Config:
        """The configuration of one run of a setting; ``seed`` counts up from the study's.

        Raises:
            ConfigError: where the setting breaks a rule.
        """
        config = override(self._tree, [*chosen.items(), ("seed", self.seed + seed)])
        images = trial_images(config)
        if not self.scaled or images is None:
            return config
        return override(config.model_dump(mode="json"), [(key, max(1, images // SHARES[key])) for key in self.scaled])

    @property
    def shown(self) -> list[str]:
        """The parameters that tables show: all but those that only say when to look, or how long to warm up."""
        return [key for key in self.parameters if not key.startswith(_HIDDEN)]

    def title(self, chosen: Mapping[str, Any]) -> str:
        """A setting by what varies: ``M=4 K=2 lr=0.008``."""
        varied = [(_SHORT.get(key, key.rpartition(".")[2]), chosen[key]) for key in self.shown if key in chosen]
        return " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in varied)

    def grid(self) -> list[dict[str, Any]]:
        """Every setting once.

        Raises:
            ConfigError: for a float without step.
        """
        return list(self.iterate_grid())

    def iterate_grid(self) -> Iterator[dict[str, Any]]:
        """As ``grid``, one by one. No setting comes twice: a parameter that does not apply is not varied."""
        for name, parameter in self.parameters.items():
            if isinstance(parameter, FloatParameter) and parameter.step is None:
                raise ConfigError(
                    f"sampler grid needs a step of every float, got none for {name}; give step or choices"
                )
        return self._settings(lambda name, domain: map(domain.at, range(domain.count or 0)))

    def corners(self) -> list[dict[str, Any]]:
        """Settings at the edges, to try rules on: all combinations of choices, of both ends and the middle of ranges,
        of all values (64 at most) where an expression refers to them; beyond MOST_CORNERS a fixed random sample.

        Raises:
            ConfigError: where an expression has no value, or a range no element.
        """
        referred = {name for parameter in self.parameters.values() for name in names_of(parameter)}

        def some(name: str, domain: Domain) -> Sequence[Any]:
            return domain.spread(_MOST_VALUES if name in referred else 3)

        corners = list(islice(self._settings(some), MOST_CORNERS + 1))
        if len(corners) <= MOST_CORNERS:
            return corners
        draw = random.Random(0)
        return [next(self._settings(lambda *of: [draw.choice(some(*of))])) for _ in range(MOST_CORNERS)]

    def describe(self) -> dict[str, Any]:
        """The whole space as plain JSON: the file, and in ``base`` what its config and ``set`` come to."""
        base = self.base.defining()
        if any(objective.score for objective in self.objectives):
            measured = self.base.evaluation
            base["evaluation"] = measured.model_dump(include={"num_samples", "metrics", "features", "reference"})
        return {
            "question": self.question,
            "config": self.config_name,
            "set": self.fixed,
            "parameters": {name: parameter.describe() for name, parameter in self.parameters.items()},
            "objectives": [objective.describe() for objective in self.objectives],
            "budget": self.budget.describe(),
            "scheduler": self.scheduler.describe(),
            "sampler": self.sampler,
            "trials": self.trials,
            "seeds": self.seeds,
            "concurrency": self.concurrency,
            "base": base,
            # Of these spaces of version 0.1 say nothing.
            **({"seed": self.seed} if self.seed else {}),
            **({"scaled": list(self.scaled)} if self.scaled else {}),
        }

    def fingerprint(self) -> str:
        """16 hex digits of what makes studies comparable: all but the question, trials and concurrency."""
        return hashlib.sha256(json.dumps(_compared(self.describe()), sort_keys=True).encode()).hexdigest()[:16]

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What changed since ``other``, a kept description: ``parameters.optimizer.lr.high: 0.01 -> 0.02``."""
        before, now = _compared(other), _compared(self.describe())
        return [
            f"{key}: {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]

    @cached_property
    def _tree(self) -> dict[str, Any]:
        return self.base.model_dump(mode="json")

    @cached_property
    def _fixed_values(self) -> dict[str, Any]:
        return self.base.flat()

    def _settings(
        self, pick: Pick, names: tuple[str, ...] | None = None, chosen: Mapping[str, Any] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Settings in the order of the file, from the values that ``pick`` takes of every parameter's domain."""
        names, chosen = tuple(self.parameters) if names is None else names, chosen or {}
        if not names:
            yield dict(chosen)
            return
        name, rest = names[0], names[1:]
        domain = self._domain(name, chosen)
        if domain is None:
            yield from self._settings(pick, rest, chosen)
            return
        derived = isinstance(self.parameters[name], Derived)
        for value in [domain.at(0)] if derived else pick(name, domain):
            yield from self._settings(pick, rest, {**chosen, name: value})

    def _domain(self, name: str, chosen: Mapping[str, Any]) -> Domain | None:
        """What a parameter may be after what was chosen; None where it does not apply."""
        parameter, known = self.parameters[name], {**self._fixed_values, **chosen}
        try:
            if parameter.when is not None and not parameter.when.truth(known):
                return None
            if not isinstance(parameter, Derived):
                return parameter.domain(known)
            value = parameter.derive.value(known)
            if isinstance(value, float) and not takes_fractions(name, self.base):
                fit = _whole_for(parameter.derive, known, chosen)
                raise ValueError(f"{parameter.derive.text} must be a whole number, got {value:g}{fit}")
            return Choices([value])
        except ValueError as error:
            used = {key: chosen[key] for key in names_of(parameter) if key in chosen}
            where = f" with {in_words(used)}" if used else ""
            raise ConfigError(f"parameters.{name}: {error}{where}") from error


def trial_images(config: Config) -> int | None:
    """How many images a run's budget buys; None where it is in seconds."""
    per_image = {"images": 1, "network_evals": config.evals_per_image}.get(config.budget.unit)
    return None if per_image is None else int(config.budget.amount / per_image)


def in_words(setting: Mapping[str, Any]) -> str:
    """a.b=1, c.d=2."""
    return ", ".join(f"{key}={_plain(value)}" for key, value in setting.items())


def _whole_for(expression: Expression, known: Mapping[str, Any], chosen: Mapping[str, Any]) -> str:
    """Which values of a whole number that was chosen would make the expression whole."""
    for name in expression.names:
        if isinstance(chosen.get(name), int):
            fit = []
            for number in range(1, _MOST_SUGGESTED + 1):
                try:
                    value = expression.value({**known, name: number})
                except ValueError:
                    continue
                if isinstance(value, int) and value > 0:
                    fit.append(str(number))
            listed = ", ".join(fit[:12]) + (", ..." if len(fit) > 12 else "")
            return f" ({name} may be {listed})" if fit else ""
    return ""


def _draw(trial: Trial, name: str, domain: Domain) -> Any:
    if isinstance(domain, Choices):
        labels = [_label(choice) for choice in domain.values]
        return domain.values[labels.index(trial.suggest_categorical(name, labels))]
    if domain.step is None:
        return trial.suggest_float(name, domain.low, domain.high, log=domain.log)
    low, high, step = domain.low, domain.at((domain.count or 1) - 1), domain.step
    if isinstance(low, int):
        return trial.suggest_int(name, low, int(high), step=int(step), log=domain.log)
    return domain.at(round((trial.suggest_float(name, low, high, step=step) - low) / step))


def _label(choice: Any) -> Any:
    """A choice as Optuna's storages can keep it: lists and mappings as JSON."""
    return _plain(choice) if isinstance(choice, (list, dict)) else choice


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _compared(description: Mapping[str, Any]) -> dict[str, str]:
    compared = {key: value for key, value in description.items() if key not in _NOT_COMPARED}
    return {key: _plain(value) for key, value in flatten(compared).items()}
