"""What a space file is made of: parameters, objectives, the budget and the scheduler, each with its own rules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, PositiveInt, field_validator, model_validator

from klray.config import nearest
from klray.study.space.expressions import Expression, Values

SCORES = ("kid", "fid")
METRICS = ("val/eps_mse", "network_evals_per_image", *SCORES)


def _expression(value: Any) -> Expression:
    if isinstance(value, Expression):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"must be a number or an expression, got {value!r}")
    return Expression.read(value)


Formula = Annotated[Expression, PlainValidator(_expression)]


class Part(BaseModel):
    """Strict and frozen, as the sections of a configuration."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def describe(self) -> dict[str, Any]:
        """As a space file has it, without what is left out."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {k: v.plain if isinstance(v, Expression) else v for k, v in values.items() if v is not None}


@dataclass(frozen=True)
class Choices:
    """The values of a categorical parameter."""

    values: list[Any]

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.values)

    def at(self, index: int) -> Any:
        """One of them."""
        return self.values[index]

    def spread(self, most: int) -> list[Any]:
        """All of them, whatever ``most`` says."""
        return self.values


@dataclass(frozen=True)
class Range:
    """The values of a numeric parameter in one setting, both ends included. ``step`` None: any number between."""

    low: float
    high: float
    step: float | None
    log: bool

    @property
    def count(self) -> int | None:
        """How many there are, None if any number between."""
        if self.step is None:
            return None
        return (_exact(self.high) - _exact(self.low)) // _exact(self.step) + 1

    def at(self, index: int) -> float:
        """The value so many steps above ``low``; an int where all are. Exact, so that 0.1 + 2 * 0.1 is 0.3."""
        value = _exact(self.low) + index * _exact(self.step or 0)
        return int(value) if isinstance(self.low, int) else float(value)

    def spread(self, most: int) -> list[float]:
        """Both ends and values evenly between, at most so many; of an unstepped range the ends and the middle."""
        count = self.count
        if count is None:
            middle = math.sqrt(self.low) * math.sqrt(self.high) if self.log else self.low / 2 + self.high / 2
            return [self.low] if self.low == self.high else [self.low, middle, self.high]
        most = min(most, count)
        return [self.at(i * (count - 1) // max(1, most - 1)) for i in range(most)]


def _exact(number: float) -> Fraction:
    """The decimal number that was written."""
    return Fraction(number if isinstance(number, int) else str(number))


class _Numeric(Part):
    low: Formula
    high: Formula
    log: bool = False
    when: Formula | None = None

    def _ends(self, values: Values, whole: bool = False) -> tuple[float, float]:
        low, high = self.low.number(values), self.high.number(values)
        for end, formula in ((low, self.low), (high, self.high)):
            if whole and not isinstance(end, int):
                raise ValueError(f"the ends of an int must be whole, got {end} from {formula.text}; // rounds down")
        if low > high:
            raise ValueError(f"low must be <= high, got {low} > {high}")
        if self.log and low <= 0:
            raise ValueError(f"log needs low > 0, got {low}")
        return low, high

    @model_validator(mode="after")
    def _log_or_step(self) -> _Numeric:
        if self.log and getattr(self, "step", None) is not None:
            raise ValueError("log and step exclude each other; leave one out")
        return self


class FloatParameter(_Numeric):
    """A number."""

    type: Literal["float"]
    step: float | None = Field(default=None, gt=0)

    def domain(self, values: Values) -> Range:
        """Its values, given those before it. Raises ValueError."""
        low, high = self._ends(values)
        return Range(float(low), float(high), self.step, self.log)


class IntParameter(_Numeric):
    """A whole number."""

    type: Literal["int"]
    step: PositiveInt | None = None

    def domain(self, values: Values) -> Range:
        """Its values, given those before it. Raises ValueError."""
        low, high = self._ends(values, whole=True)
        return Range(low, high, self.step or 1, self.log)


class Categorical(Part):
    """One of a list; None, lists and mappings are allowed."""

    type: Literal["categorical"]
    choices: list[Any] = Field(min_length=1)
    when: Formula | None = None

    @field_validator("choices")
    @classmethod
    def _different(cls, choices: list[Any]) -> list[Any]:
        for index, choice in enumerate(choices):
            if choice in choices[:index]:
                raise ValueError(f"choices must differ, got {choice!r} twice")
        return choices

    def domain(self, values: Values) -> Choices:
        """Its choices."""
        return Choices(self.choices)


class Derived(Part):
    """A value that follows from those before it."""

    derive: Formula
    when: Formula | None = None


Parameter = FloatParameter | IntParameter | Categorical | Derived
Domain = Choices | Range
TYPES: dict[str, type[Parameter]] = {"float": FloatParameter, "int": IntParameter, "categorical": Categorical}


def names_of(parameter: Parameter, *fields: str) -> list[str]:
    """The keys that the parameter's expressions refer to; of ``fields`` only, if given."""
    values: Iterable[Any] = (getattr(parameter, name) for name in fields or type(parameter).model_fields)
    return [name for value in values if isinstance(value, Expression) for name in value.names]


class Objective(Part):
    """What a study optimises."""

    metric: str
    direction: Literal["minimize", "maximize"] = "minimize"

    @property
    def score(self) -> str | None:
        """Which of evaluation.metrics it is, None if it is not a score of generated images."""
        name = self.metric.removeprefix("eval/").partition("_")[0]
        return name if name in SCORES else None

    @field_validator("metric")
    @classmethod
    def _comparable(cls, metric: str) -> str:
        if metric == "loss" or metric.startswith(("train/", "val/loss")):
            raise ValueError(
                f"must be comparable, which a loss is not across M, coupling and marginal, got {metric}; "
                "take val/eps_mse"
            )
        if metric not in METRICS and not metric.startswith(tuple(f"eval/{score}_" for score in SCORES)):
            raise ValueError(f"must be a known metric, got {metric}{nearest(metric, METRICS)}, eval/kid_*, eval/fid_*")
        return metric


class StudyBudget(Part):
    """What every trial may use."""

    unit: Literal["network_evals", "images", "seconds"]
    amount: float = Field(gt=0)

    @field_validator("unit", mode="before")
    @classmethod
    def _not_steps(cls, unit: Any) -> Any:
        if unit == "steps":
            raise ValueError(
                "must be 'network_evals', 'images' or 'seconds', got 'steps': steps of different M cost differently"
            )
        return unit


class Scheduler(Part):
    """What stops trials early: none; asha keeps the best 1/reduction_factor at each rung; median stops the worse half.

    Nothing is stopped before ``min_fraction`` of the budget.
    """

    kind: Literal["none", "asha", "median"] = "none"
    reduction_factor: int = Field(default=3, ge=2)
    min_fraction: float = Field(default=0.1, gt=0, lt=1)


class SpaceFile(Part):
    """The file's own keys; the parts inside are read one by one."""

    question: str = ""
    config: str
    set: dict[str, Any] = {}
    parameters: dict[str, Any] = Field(min_length=1)
    objectives: list[Any] = Field(default=[{"metric": "val/eps_mse"}], min_length=1)
    budget: Any
    scheduler: Any = "none"
    sampler: Literal["tpe", "random", "grid", "nsga2"] = "tpe"
    trials: PositiveInt = 16
    seeds: PositiveInt = 1
    seed: int = Field(default=0, ge=0)  # of the first run of a trial, of the sampler and of the order of choices
    concurrency: PositiveInt | None = None
