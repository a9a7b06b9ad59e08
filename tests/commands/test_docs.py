"""The site's pages: the settings page is not stale, commands' flags are all told, files and Python in them work."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from klray.config import load_config
from klray.study.space import load_space

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def settings() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_settings", DOCS / "settings.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_settings_page_is_what_the_code_says(settings: ModuleType) -> None:
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == settings.page(), "run python docs/settings.py"


def test_a_setting_without_a_comment_is_refused(settings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told = settings.field_comments(
        "class Budget:\n    unit: str = 'images'  # what is counted\n    amount: float = 1.0\n"
    )
    assert told == {"Budget": {"unit": "what is counted", "amount": ""}}
    real = settings.field_comments
    monkeypatch.setattr(settings, "field_comments", lambda source: real(source) | told)
    with pytest.raises(KeyError, match=r"budget\.amount has no description"):
        settings.page()


@pytest.mark.parametrize("name", ["train", "tune", "compare", "sample", "evaluate", "ld3", "check", "upload"])
def test_every_flag_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"klray.{name}").parse(["--help"])
    flags = set(re.findall(r"^  (--[a-z0-9-]+)", capsys.readouterr().out, flags=re.MULTILINE))
    text = (DOCS / "commands.md").read_text(encoding="utf-8")
    section = text.split(f"\n## klray {name}\n")[1].split("\n## ")[0]
    missing = {flag for flag in flags - {"--help"} if not re.search(rf"{flag}\b(?!-)", section)}
    assert missing == set()


def test_every_page_is_in_the_navigation() -> None:
    found: list[str] = []

    def collect(node: object) -> None:
        for each in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
            collect(each)
        if isinstance(node, str):
            found.append(node)

    collect(yaml.safe_load((DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(found) == sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


def test_files_that_pages_show_are_valid(tmp_path: Path) -> None:
    space, whole = blocks("space_files.md", "yaml")
    (tmp_path / "space.yaml").write_text(space)
    assert load_space(tmp_path / "space.yaml").trials == 12
    assert whole.startswith("--8<--")
    (config,) = blocks("presets.md", "yaml")
    (tmp_path / "photos.yaml").write_text(config)
    assert load_config(str(tmp_path / "photos.yaml")).data.image_size == 64


@pytest.mark.slow
def test_the_python_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks("python.md", "python")
    assert code
    exec(compile("\n".join(code), "python.md", "exec"), {})


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(DOCS / "first_hour.ipynb", 4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit it without outputs"
    monkeypatch.setenv("KLRAY_CACHE", str(tmp_path / "cache"))
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=resources).execute()
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 3
