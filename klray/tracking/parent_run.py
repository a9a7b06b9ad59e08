"""The run above other runs: a study's or a comparison's own, with its children's records sent beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from klray.runs.provenance import git_commit, hardware
from klray.runs.records import RecordWriter, status_after
from klray.tracking.children import StudyUploads
from klray.tracking.mlflow_upload import Uploader
from klray.tracking.stale import close_below
from klray.tracking.view import View, where


@contextmanager
def parent_run(
    folder: Path,
    uri: str | None,
    kind: str,
    params: dict[str, Any],
    *,
    experiment: str | None = None,
    parent_dir: Path | None = None,
    view: View | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[RecordWriter]:
    """Opens the run of FOLDER in MLflow; runs in FOLDER/trials are nested in it. The caller holds FOLDER/lock.

    Args:
        uri: of MLflow; None for none: records are kept in the folder.
        kind: the tag ``klray.kind``: study, comparison or ld3.
        params: of the parent.
        experiment: in which it is; None: one of the folder's name.
        parent_dir: the run whose MLflow run it is itself nested in; None for none.
        view: how MLflow's pages show the runs in FOLDER/trials.
        say: told where to look at the runs, as soon as MLflow has the parent's.
    """
    with ExitStack() as stack:
        tags = {"klray.kind": kind, "klray.git": git_commit(), "klray.hardware": hardware()}
        experiment = experiment or folder.name
        upload = Uploader(
            folder,
            uri,
            experiment,
            folder.name,
            tags=tags,
            parent_dir=parent_dir,
            view=view,
            on_sent=lambda state: say(where(state)),
        )
        stack.enter_context(upload)
        writer = stack.enter_context(RecordWriter(folder))
        writer.status("RUNNING")
        writer.params(params)
        # Of those some go on, and say RUNNING again.
        stack.enter_context(StudyUploads(folder, uri, experiment, stale=close_below(folder)))
        try:
            yield writer
        except BaseException as error:
            writer.status(status_after(type(error)))
            close_below(folder)
            raise
