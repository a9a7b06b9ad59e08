"""Where a run's records go and how far they got: RUN_DIR/mlflow.json. No MLflow in here."""

from __future__ import annotations

import json
import os
import re
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from klray.errors import UserError
from klray.runs.whole_file import write_whole

STATE_FILE = "mlflow.json"
TITLE_TAG = "klray.title"  # how MLflow shows a run, where its folder's name says less
STATE_TAG = "klray.state"  # what became of a trial: complete, pruned, failed or diverged; running until then
NOTE_TAG = "mlflow.note.content"  # the text on a run's page


class TrackingError(UserError):
    """Tracking cannot do what it was asked to; the message is one line: what failed, and the way out."""


@dataclass
class UploadState:
    """The MLflow run of one run directory.

    Attributes:
        uri, experiment, run_name, tags: what the MLflow run is created with.
        parent_run_id, parent_dir: the MLflow run it is nested in, by id or by that run's directory (relative to this
            one), whose MLflow run may not exist yet.
        run_key: names this directory at every server (tag klray.run_key), so that a run whose creation was not
            answered, or that was sent to another server meanwhile, is found again and not made twice.
        view: how MLflow's pages show the runs below this one, as ``View`` keeps it; None for no such view.
        run_id, experiment_id: None until the run exists.
        offset, artifact_offset: bytes of records.jsonl that are sent. Files have their own, since an artifact store
            that refuses them must not hold up the numbers.
    """

    uri: str
    experiment: str
    run_name: str
    tags: dict[str, str] = field(default_factory=dict)
    parent_run_id: str | None = None
    parent_dir: str | None = None
    run_key: str = field(default_factory=lambda: uuid.uuid4().hex)
    view: dict[str, Any] | None = None
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0
    artifact_offset: int = 0

    def continued(self, run_dir: Path) -> UploadState:
        """This target with what RUN_DIR/mlflow.json knows of it already."""
        kept = load_state(run_dir)
        if kept is None:
            return self
        if (kept.uri, kept.experiment) != (self.uri, self.experiment):
            return replace(self, run_key=kept.run_key)
        known = ("run_key", "run_id", "experiment_id", "offset", "artifact_offset")
        return replace(self, **{name: getattr(kept, name) for name in known})

    def save(self, run_dir: Path) -> None:
        """Writes RUN_DIR/mlflow.json."""
        write_whole(run_dir / STATE_FILE, json.dumps(asdict(self), indent=1) + "\n")


def load_state(run_dir: Path) -> UploadState | None:
    """What RUN_DIR/mlflow.json says, None if there is none.

    Raises:
        TrackingError: if it cannot be read.
    """
    try:
        content = json.loads((run_dir / STATE_FILE).read_text())
        known = {item.name for item in fields(UploadState)}
        return UploadState(**{key: value for key, value in content.items() if key in known})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        message = f"{run_dir / STATE_FILE} cannot be read ({error}); remove it, and the run is sent as a new one"
        raise TrackingError(message) from error


def asked_uri(asked: str | None, kept: UploadState | None = None) -> str | None:
    """Where a command's MLflow is: as it asks, else as MLFLOW_TRACKING_URI says, else where ``kept`` is; None for off.

    Raises:
        TrackingError: as ``resolve_uri``, whose default counts where nothing says more.
    """
    uri = asked or os.environ.get("MLFLOW_TRACKING_URI") or (kept.uri if kept else None)
    return None if uri == "off" else resolve_uri(uri, Path.cwd())


def resolve_uri(uri: str | None, base: Path) -> str:
    """A tracking URI that means the same in every process: sqlite paths absolute, servers and databases as they are.

    Args:
        uri: None for the database mlflow.db in ``base``.
        base: what a relative sqlite path is relative to.

    Raises:
        TrackingError: for a path or a file: URI, which MLflow no longer takes, a database in memory, or another scheme.
    """
    if uri is None:
        uri = "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    if path is not None:
        return f"sqlite:///{(base / path.expanduser()).resolve()}"
    if re.match(r"(https?|(postgresql|mysql|mssql)(\+\w+)?)://.", uri) or re.match(r"databricks(://|$)", uri):
        return uri
    raise TrackingError(
        f"the tracking URI {redact(uri)!r} is none that MLflow can share between processes; "
        "give sqlite:///PATH/mlflow.db or a server's http://HOST:PORT"
    )


def sqlite_path(uri: str) -> Path | None:
    """The database file that a sqlite URI names, None for other URIs."""
    match = re.fullmatch(r"sqlite:///([^?]+)", uri)
    return Path(match[1]) if match and match[1] != ":memory:" else None


def redact(uri: str) -> str:
    """A URI that may be shown: without its password."""
    return re.sub(r"(//[^/@:]*):[^/@]*@", r"\1:***@", uri)
