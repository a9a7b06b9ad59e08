"""Files of which readers find the whole or what was there before."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(file: Path, text: str) -> None:
    """Writes aside and renames; raises OSError."""
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_text(text)
    aside.replace(file)
