"""Arms of a comparison: short names for settings, as kl8k2_separable, and what each result has to be read with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from klray.config import Config, ConfigError, override, parse_override

SUFFIXES: dict[str, tuple[str, Any]] = {
    "joint": ("loss.coupling", "joint"),
    "separable": ("loss.coupling", "separable"),
    "wide": ("network.architecture", "wide"),
    "repeated": ("network.architecture", "repeated"),
    "matched": ("process.marginal", "matched"),
    "truncated": ("process.marginal", "truncated"),
    "paper": ("process.marginal", "paper"),
}
FORMS = (
    "vp, vp_batchB (B times the batch), vp_ensembleM, vp_truncatedM, klM, klMkK, the last two with any of "
    + ", ".join(f"_{suffix}" for suffix in SUFFIXES)
)
# All arms see the same data, spend the same budget, and are measured and warmed up alike; their rates are tuned.
SET_FOR_ALL = ("data.", "budget.", "validation.", "sampling.every_images", "optimizer.lr", "optimizer.warmup_images")
_BASE = re.compile(
    r"vp(?:_batch(?P<batch>[0-9]+)|_ensemble(?P<ensemble>[0-9]+)|_truncated(?P<truncated>[0-9]*))?"
    r"|kl(?P<terms>[0-9]+)(?:k(?P<partial>[0-9]+))?(?P<suffixes>(?:_[a-z]+)*)"
)

SAME_LOSS = (
    "joint and matched with K = M: the loss depends on the terms' noise only through its sum, so it is the VP loss of "
    "the summed predictor. A gain over vp comes from the M network calls (or, wide, the larger last layer) and from "
    "the larger effective learning rate, not from the process; vp_ensemble{M} is its control."
)
PART_LOSS = (
    "joint and matched with K < M: in expectation its loss is the separable one plus (K - 1)/(M - 1) of joint's cross "
    "terms. With K = M it would be the VP loss of the summed predictor, no matter the process."
)


@dataclass(frozen=True)
class Arm:
    """One way to train: the changes that make it of the comparison's configuration."""

    name: str
    changes: tuple[tuple[str, Any], ...] = field(hash=False)

    def config(self, base: Config, **others: Any) -> Config:
        """The arm's configuration; ``others`` are sections' changes as {"optimizer.lr": 1e-3}, passed by ``**``.

        Raises:
            ConfigError: where they break a rule.
        """
        return override(base.model_dump(mode="json"), [*self.changes, *others.items()])


def read_arm(text: str, base: Config) -> Arm:
    """An arm from its name, ``kl8_wide`` or ``vp``, with any overrides behind commas: ``kl8,loss.prediction=share``.

    Raises:
        ConfigError: for a name of no known form, or overrides that are wrong or set the learning rate.
    """
    name, *extra = re.split(r",(?=[a-z_]+\.)", text)
    found = _BASE.fullmatch(name)
    if found is None:
        raise ConfigError(f"an arm must be one of {FORMS}; got {name!r}")
    changes = [*_changes(found, base, name), *(parse_override(part) for part in extra)]
    for key, _ in changes:
        if key.startswith(SET_FOR_ALL):
            raise ConfigError(f"arm {text}: {key} is set by the comparison, for every arm alike; leave it out")
    arm = Arm(text, tuple(changes))
    try:
        arm.config(base)
    except ConfigError as error:
        raise ConfigError(f"arm {text}: {error}") from error
    return arm


def read_arms(texts: Sequence[str], base: Config) -> list[Arm]:
    """At least two different arms, the first of them the baseline; raises as ``read_arm``."""
    arms = [read_arm(text, base) for text in texts]
    if len(arms) < 2:
        raise ConfigError(f"--arms needs at least 2, the baseline first, got {len(arms)}; for example vp kl8")
    for i, arm in enumerate(arms):
        if any(arm.config(base) == other.config(base) for other in arms[:i]):
            raise ConfigError(f"arm {arm.name} is given twice; leave one out")
    return arms


def caveat(config: Config) -> str | None:
    """What has to be said beside an arm's result (the joint loss with the matched marginal, see docs in README)."""
    process, loss = config.process, config.loss
    if (process.kind, loss.coupling, process.marginal) != ("kl", "joint", "matched") or process.num_terms < 2:
        return None
    whole = loss.partial_terms in (None, process.num_terms)
    return SAME_LOSS.format(M=process.num_terms) if whole else PART_LOSS


def _changes(found: re.Match[str], base: Config, name: str) -> list[tuple[str, Any]]:
    groups = found.groupdict()
    if groups["terms"] is not None:
        changes: list[tuple[str, Any]] = [
            ("process.kind", "kl"),
            ("process.num_terms", int(groups["terms"])),
            ("loss.partial_terms", None if groups["partial"] is None else int(groups["partial"])),
        ]
        for suffix in filter(None, groups["suffixes"].split("_")):
            if suffix not in SUFFIXES:
                raise ConfigError(f"arm {name}: _{suffix} must be one of {', '.join('_' + s for s in SUFFIXES)}")
            changes.append(SUFFIXES[suffix])
        return changes
    common: list[tuple[str, Any]] = [("loss.partial_terms", None), ("loss.coupling", "joint")]
    if groups["ensemble"] is not None:
        return [("process.kind", "vp_ensemble"), ("process.num_terms", int(groups["ensemble"])), *common]
    if groups["truncated"] is not None:
        terms = int(groups["truncated"] or base.process.num_terms)
        return [("process.kind", "vp_truncated"), ("process.num_terms", terms), *common]
    batch = base.optimizer.batch_size * int(groups["batch"] or 1)
    return [("process.kind", "kl"), ("process.num_terms", 0), *common, ("optimizer.batch_size", batch)]
