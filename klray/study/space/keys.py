"""Which configuration keys a space file may touch, and what kind of value they take."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from klray.config import Config, ConfigError, explain, nearest

_OF_THE_STUDY = {"seed": "seeds", "budget": "budget", "preset": "config"}
# Trials are compared by what they reach on the same held-out images, measured alike.
_YARDSTICKS = ("data", "validation", "evaluation")
_NO_YARDSTICK = ("data.flip", "data.limit", "validation.every_images", "evaluation.every_images")


class _Fields(Config):
    """A configuration whose keys keep their own rules; those between keys are for trials, not for their base."""

    @model_validator(mode="after")
    def _rules(self) -> _Fields:
        return self


def check_keys(keys: Iterable[str], parameters: bool) -> None:
    """Refuses what is no configuration key, or not for a space file to set or (``parameters``) to vary.

    Raises:
        ConfigError: one line.
    """
    for key in keys:
        section = key.partition(".")[0]
        if section in _OF_THE_STUDY:
            raise ConfigError(f"{key} is not for set or parameters; the study's {_OF_THE_STUDY[section]} gives it")
        if _field(key) is None:
            raise ConfigError(f"unknown key {key}{nearest(key, Config().flat())}")
        if parameters and section in _YARDSTICKS and key not in _NO_YARDSTICK:
            raise ConfigError(f"{key} cannot vary: all trials must be measured alike; fix it in set")


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with values of known keys, each by its own rule; trials answer to the rules between keys.

    Raises:
        ConfigError: one line.
    """
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        section, *inner, leaf = key.split(".")
        node = tree[section]
        for part in inner:
            node = node[part]
        node[leaf] = value
    try:
        return _Fields.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error)) from error


@functools.cache
def takes_fractions(key: str) -> bool:
    """Whether the key's value may be a number that is not whole."""
    annotation: Any = getattr(_field(key), "annotation", Any)
    adapter = TypeAdapter[Any](annotation, config=ConfigDict(strict=True))
    try:
        adapter.validate_python(0.5)
    except ValidationError:
        return False
    return True


def _field(key: str) -> FieldInfo | None:
    """The model field of a dotted key; of a key inside a mapping the mapping's."""
    model: type[BaseModel] = Config
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        field = model.model_fields.get(part)
        if field is None:
            return None
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            model = field.annotation
        else:
            inside = len(parts) - depth
            return field if inside == 0 or (inside == 1 and get_origin(field.annotation) is dict) else None
    return None
