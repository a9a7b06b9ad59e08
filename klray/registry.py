"""Open sets: klray's own entries by name, and the user's own as ``module:attribute``.

A set is a plain dict NAME -> entry in the package that it belongs to; ``module:attribute`` in place of an entry that is
slow to import. An entry is a function, a class or an object. It is called with what its place gives, as far as it has
arguments of these names; its other arguments, which are annotated, are its settings.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model

from klray.errors import UserError

SETS: dict[str, tuple[str, frozenset[str]]] = {  # set: where its dict lies, what its place gives
    name: (where, frozenset(given.split()))
    for name, where, given in (
        ("backbone", "klray.networks:BACKBONES", "image_size in_channels out_channels num_classes"),
        ("basis", "klray.core.bases:BASES", "t num_terms"),
        ("data source", "klray.data.sources:SOURCES", ""),
        ("encoder", "klray.data.encoders:ENCODERS", ""),
        ("features", "klray.evaluation.features:FEATURES", "device"),
        ("learner", "klray.schedules:LEARNERS", ""),
        ("optimizer", "klray.training.optimizers:OPTIMIZERS", "parameters lr"),
        ("parametrisation", "klray.core.parametrisations:PARAMETRISATIONS", "process"),
        ("process", "klray.core.process:PROCESSES", "schedule num_terms marginal basis"),
        ("rate schedule", "klray.training.rates:RATES", "share"),
        ("schedule", "klray.core.schedule:SCHEDULES", ""),
        (
            "solver",
            "klray.core.solvers:SOLVERS",
            "denoiser schedule x timesteps model_timesteps order orders variable noise",
        ),
        ("time grid", "klray.core.timesteps:TIMESTEPS", "schedule num_steps t_min t_max"),
    )
}

Entry = TypeVar("Entry")


class RegistryError(UserError):
    """A name that no entry has; one line with the nearest, or with why the user's own cannot be had."""


class EntrySettings(BaseModel):
    """The settings of an entry: strict, and by the entry's own annotations."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def names(kind: str) -> list[str]:
    """klray's own entries of a set."""
    return list(_own(kind))


def entry(kind: str, name: str, asked: str | None = None) -> Any:
    """The entry that ``name`` stands for: one of klray's own, or the user's own ``module:attribute``.

    ``asked``: the key or flag that it was given by, for errors; None: the set.

    Raises:
        RegistryError: for an unknown name, and a module or attribute that cannot be had.
    """
    own = _own(kind)
    if name in own:
        found = own[name]
        return _imported(kind, found) if isinstance(found, str) else found
    if ":" in name:
        return _imported(kind, name)
    close = difflib.get_close_matches(name, own, n=1, cutoff=0.0)[0]
    rule = f"{asked or kind} must be one of {', '.join(own)}, or module:attribute"
    raise RegistryError(f"{rule}, got {name!r}; the nearest is {close}")


@functools.cache
def settings_of(kind: str, name: str) -> type[EntrySettings]:
    """The model of an entry's settings; raises as ``entry``, and where one of them has no annotation."""
    fields: dict[str, Any] = {}
    for setting, parameter in arguments(kind, name).items():
        if setting in SETS[kind][1] or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.annotation is parameter.empty:
            raise RegistryError(f"{name}: its setting {setting} needs an annotation, as width: int = 64")
        default = ... if parameter.default is parameter.empty else parameter.default
        fields[setting] = (parameter.annotation, default)
    return create_model("Settings", __base__=EntrySettings, **fields)


def build(kind: str, name: str, settings: dict[str, Any], **given: Any) -> Any:
    """Calls the entry with its settings and what it wants of what its place gives; raises as the entry does."""
    wanted = arguments(kind, name)
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values())
    return entry(kind, name)(**{key: given[key] for key in given if takes_all or key in wanted}, **settings)


def checked_by(check: Callable[..., None]) -> Callable[[Entry], Entry]:
    """Marks an entry with ``check``, which refuses settings, and what the place gives, by ValueError."""

    def mark(found: Entry) -> Entry:
        found.check = check  # type: ignore[attr-defined]
        return found

    return mark


def check(kind: str, name: str, **given: Any) -> None:
    """Lets the entry refuse what it is given, if it was ``checked_by``; raises ValueError as that does."""
    if (own := getattr(entry(kind, name), "check", None)) is not None:
        own(**given)


def _own(kind: str) -> dict[str, Any]:
    module, _, attribute = SETS[kind][0].partition(":")
    found: dict[str, Any] = getattr(importlib.import_module(module), attribute)
    return found


@functools.cache
def arguments(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """The entry's, by name, annotations resolved; none of an object that is no function."""
    found = entry(kind, name)
    found = getattr(found, "sample", found)  # a solver's
    if not callable(found):
        return {}
    try:
        called = (
            found.__init__ if inspect.isclass(found) else found if inspect.isroutine(found) else type(found).__call__
        )
        hints = get_type_hints(called, include_extras=True)
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError, NameError) as error:
        raise RegistryError(f"{name}: its arguments cannot be read ({error})") from error
    return {key: each.replace(annotation=hints.get(key, each.annotation)) for key, each in parameters.items()}


def _imported(kind: str, name: str) -> Any:
    """``module:attribute``, looked for in the working folder too, as ``python -m`` does."""
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except Exception as error:  # the user's file may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        where = "it must lie in the working folder or on PYTHONPATH"
        raise RegistryError(f"{name}: {module} cannot be imported ({reason}); {where}") from error
    if not hasattr(found, attribute):
        close = difflib.get_close_matches(attribute, vars(found), n=1, cutoff=0.0)[0]
        raise RegistryError(f"{name}: {module} has no {attribute!r}; the nearest is {close}")
    return getattr(found, attribute)
