"""A study's folder: its resolved space, and the rule that one name means one space."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from klray.config import ConfigError
from klray.space import Space
from klray.training.run_dir import locked


@contextmanager
def open_study_folder(root: Path, name: str, space: Space) -> Iterator[Path]:
    """STUDIES/NAME with a study.json of the space, locked against a second driver.

    Raises:
        ConfigError: for a bad name, a name that stands for another space, fewer trials than were asked for before,
            or a study that another process is running.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name must be letters, digits, '.', '_' or '-', got {name!r}")
    folder = root.resolve() / name
    with locked(folder, f"study {name} is being run by another process; wait, or choose a --name"):
        file = folder / "study.json"
        if file.exists():
            kept = json.loads(file.read_text())
            changed = space.differences(kept)
            if changed:
                raise ConfigError(f"study {name} has another space ({'; '.join(changed)}); choose another --name")
            if space.trials < kept["trials"]:
                raise ConfigError(
                    f"study {name} has {kept['trials']} trials; give at least as many, got {space.trials}"
                )
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps(space.describe(), indent=1))
        aside.rename(file)
        yield folder
