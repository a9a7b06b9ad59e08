"""A study's or comparison's folder: what it was asked, and the rule that one name means one question."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klray.config import ConfigError
from klray.runs.run_dir import locked
from klray.runs.whole_file import write_whole


@contextmanager
def open_study_folder(
    root: Path,
    name: str,
    description: Mapping[str, Any],
    differences: Callable[[dict[str, Any]], list[str]],
    *,
    may_grow: str,
) -> Iterator[Path]:
    """ROOT/NAME with a study.json of the description, locked against a second driver.

    Args:
        differences: what changed since a kept description, one text each.
        may_grow: the key of a number that may be larger than before, but not smaller.

    Raises:
        ConfigError: for a bad name, a name that stands for something else, or a folder that another process uses.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name must be letters, digits, '.', '_' or '-', got {name!r}")
    folder = root.resolve() / name
    with locked(folder, f"{name} is being run by another process; wait, or choose a --name"):
        file = folder / "study.json"
        if file.exists():
            kept = json.loads(file.read_text())
            changed = differences(kept)
            if changed:
                raise ConfigError(f"{name} stands for something else ({'; '.join(changed)}); choose another --name")
            if description[may_grow] < kept[may_grow]:
                raise ConfigError(
                    f"{name} has {kept[may_grow]} {may_grow}; give at least as many, got {description[may_grow]}"
                )
        write_whole(file, json.dumps(description, indent=1))
        yield folder
