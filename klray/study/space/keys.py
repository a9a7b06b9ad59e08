"""Which configuration keys a space file may touch, and what kind of value they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.fields import FieldInfo

from klray import registry
from klray.config import OPEN_SECTIONS, Config, ConfigError, OpenSection, explain, leave_entries, nearest

_OF_THE_STUDY = {"seed": "seeds", "budget": "budget", "preset": "config"}
# Trials are compared by what they reach on the same held-out images, measured alike.
_YARDSTICKS = ("data", "validation", "evaluation")
ENTRY_KEYS = {f"{each.SECTION}.{key}" for each in OPEN_SECTIONS for key in each.SETS}
_NO_YARDSTICK = ("data.flip", "data.limit", "validation.every_images", "evaluation.every_images")


class _Fields(Config):
    """A configuration whose keys keep their own rules; those between keys are for trials, not for their base."""

    @model_validator(mode="after")
    def _rules(self) -> _Fields:
        return self


def check_keys(keys: Iterable[str], config: Config, parameters: bool) -> None:
    """Refuses what is no configuration key, or not for a space file to set or (``parameters``) to vary.

    ``config``: of the study; with the settings of the entries that it names, klray's own other ones are known too.

    Raises:
        ConfigError: one line.
    """
    for key in keys:
        section = key.partition(".")[0]
        if section in _OF_THE_STUDY:
            raise ConfigError(f"{key} is not for set or parameters; the study's {_OF_THE_STUDY[section]} gives it")
        if _field(key, config) is None:
            raise ConfigError(f"unknown key {key}{nearest(key, config.flat())}")
        if parameters and section in _YARDSTICKS and key not in _NO_YARDSTICK:
            raise ConfigError(f"{key} cannot vary: all trials must be measured alike; fix it in set")


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with values of known keys, each by its own rule; trials answer to the rules between keys.

    Raises:
        ConfigError: one line.
    """
    tree = config.model_dump(mode="json")
    leave_entries(tree, changes)
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


def takes_fractions(key: str, config: Config) -> bool:
    """Whether the key's value may be a number that is not whole."""
    annotation: Any = getattr(_field(key, config), "annotation", Any)
    adapter = TypeAdapter[Any](annotation, config=ConfigDict(strict=True))
    try:
        adapter.validate_python(0.5)
    except ValidationError:
        return False
    return True


def _field(key: str, config: Config) -> FieldInfo | None:
    """The model field of a dotted key; of a key inside a mapping the mapping's."""
    first, *rest = key.split(".")
    if first not in Config.model_fields or not rest or not isinstance(getattr(config, first), BaseModel):
        return None
    section = type(getattr(config, first))
    field = section.model_fields.get(rest[0])
    if field is None and issubclass(section, OpenSection):
        others = (registry.settings_of(kind, name) for kind in section.SETS.values() for name in registry.names(kind))
        field = next((each.model_fields[rest[0]] for each in others if rest[0] in each.model_fields), None)
    inside = len(rest) - 1
    mapping = field is not None and get_origin(field.annotation) is dict
    return field if inside == 0 or (inside == 1 and mapping) else None
