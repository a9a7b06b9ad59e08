"""Writes settings.md beside this file, from the comments and defaults in klray/config.py and the entries' docstrings.

python docs/settings.py
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import io
import re
import tokenize
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from klray import config, registry
from klray.core.solvers.trajectory import Trajectory
from klray.schedules.fit_settings import FitSettings

PAGE = Path(__file__).with_suffix(".md")
HEADER = "| key | default | takes | |\n|-|-|-|-|\n"
INTRODUCTION = """# Settings

<!-- Written by docs/settings.py from klray/config.py and the docstrings of the registries' entries: change those. -->

Each key is set in a YAML file, or by `--set section.key=value`; values are YAML. An unknown key, a wrong type or a
value out of range is one line, before anything starts. `--dry-run` prints all settings of a run.
[Presets](presets.md) hold those of whole runs.

Some keys name an *entry*: one of klray's own, or `module:attribute`, [your own](adding/index.md). The settings of the
entry that is chosen are keys of the same section; choosing another entry leaves them behind.
"""
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def page() -> str:
    """The whole page, as Markdown."""
    comments = field_comments(Path(config.__file__).read_text(encoding="utf-8"))
    top = config.Config.model_fields
    sections = {name: type(field.get_default(call_default_factory=True)) for name, field in top.items()}
    plain = {name: field for name, field in top.items() if not issubclass(sections[name], BaseModel)}
    parts = [INTRODUCTION, "## Of the run\n", table("", plain, comments["Config"], {})]
    for name, section in sections.items():
        if not issubclass(section, BaseModel):
            continue
        while section.__module__ != config.__name__ or section.__name__ not in comments:
            section = section.__mro__[1]
        fields = {key: field for key, field in section.model_fields.items() if key in comments[section.__name__]}
        sets = section.SETS if issubclass(section, config.OpenSection) else {}
        parts += [f"## {name}\n", inspect.cleandoc(section.__doc__ or "") + "\n" if section.__doc__ else ""]
        parts += [table(f"{name}.", fields, comments[section.__name__], sets)]
        parts += [entries(f"{name}.{key}", kind) for key, kind in sets.items()]
    parts += ["## Options of solvers\n", "`--option key=value`, or `sampling.options`.\n", solver_options()]
    parts += ["## Settings of a learner\n", "`klray ld3 --set key=value`; defaults are those of `ld3`.\n", fit()]
    return "\n".join(part for part in parts if part)


def field_comments(source: str) -> dict[str, dict[str, str]]:
    """Of each class in ``source`` the comment beside each annotated field; "" where there is none."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                each.target.id: " ".join(lines[n] for n in range(each.lineno, each.end_lineno + 1) if n in lines)
                for each in node.body
                if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name) and each.end_lineno
            }
    return found


def table(prefix: str, fields: dict[str, FieldInfo], told: dict[str, str], sets: dict[str, str]) -> str:
    """A row for each field; raises KeyError for one that is not told of."""
    rows = []
    for key, field in fields.items():
        if not told.get(key):
            raise KeyError(f"{prefix}{key} has no description")
        takes = "an entry" if key in sets else shown(field.annotation, field.metadata)
        rows.append((f"`{prefix}{key}`", default_of(field), takes, told[key]))
    return markdown(rows)


def markdown(rows: list[tuple[str, str, str, str]]) -> str:
    """The table; neighbours of which the same is told share a row."""
    shared: list[tuple[str, str, str, str]] = []
    for row in rows:
        if shared and shared[-1][2:] == row[2:]:
            shared[-1] = (f"{shared[-1][0]}, {row[0]}", f"{shared[-1][1]}, {row[1]}", *row[2:])
        else:
            shared.append(row)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in shared]
    return HEADER + "".join(lines)


def default_of(field: FieldInfo) -> str:
    """As YAML has it."""
    if field.default is PydanticUndefined:
        return "must be given"
    return f"`{yaml_of(field.default)}`"


def yaml_of(value: Any) -> str:
    """A plain value in YAML's words."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(yaml_of, value))}]"
    words: dict[Any, str] = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else f"{value}"


def shown(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """A type and its bounds in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return shown(inner[0], inner[1:])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        *others, last = (shown(each, metadata if each is not type(None) else ()) for each in inner)
        return f"{', '.join(others)} or {last}"
    if origin is list:
        return f"a list of {shown(inner[0])}"
    if origin is tuple:
        return f"{len(inner)} {shown(inner[0])}s"
    if origin is dict:
        return "keys with values"
    words = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "`true`, `false`",
        type(None): "`null`",
        Path: "a file",
    }
    limits = [
        f"{sign} {getattr(each, name):.12g}"
        for each in metadata
        for name, sign in BOUNDS.items()
        if hasattr(each, name)
    ]
    return " ".join([words[annotation], ", ".join(limits)]).strip()


def entries(key: str, kind: str) -> str:
    """The entries of a set, each with the first sentence of its docstring, and their settings."""
    section = key.partition(".")[0]
    lines, tables = [f"`{key}`, {'an' if kind[0] in 'aeiou' else 'a'} {kind}:\n"], dict[str, list[str]]()
    for name in registry.names(kind):
        doc = inspect.getdoc(documented(registry.entry(kind, name))) or ""
        lines.append(f"- `{name}`: {summary(doc)}")
        if own := registry.settings_of(kind, name).model_fields:
            tables.setdefault(table(f"{section}.", dict(own), arguments_told(doc), {}), []).append(f"`{name}`")
    lines += [f"\nSettings of {', '.join(names)}:\n\n{each}" for each, names in tables.items()]
    return "\n".join(lines).rstrip() + "\n"


def documented(entry: Any) -> Any:
    """Where an entry's docstring stands."""
    entry = getattr(entry, "sample", entry)
    return entry.func if isinstance(entry, functools.partial) else entry


def summary(doc: str) -> str:
    """The first sentence, or the first paragraph where that ends otherwise."""
    paragraph = " ".join(doc.split("\n\n")[0].split())
    sentence = re.match(r".*?(?<!eq)\.(?= [A-Z]|$)", paragraph)
    return (sentence.group() if sentence else paragraph).replace("``", "`")


def arguments_told(doc: str, heading: str = "Args") -> dict[str, str]:
    """Names under ``Args:`` to what is said of them; ``a, b: text`` is said of both."""
    block = re.search(rf"^{heading}:\n((?:    .*\n?|\n(?=    ))+)", doc, flags=re.MULTILINE)
    told: dict[str, str] = {}
    for item in re.split(r"^    (?! )", block.group(1), flags=re.MULTILINE) if block else []:
        names, _, text = item.partition(": ")
        told |= {name.strip(): " ".join(text.split()).replace("``", "`").rstrip(".") for name in names.split(",")}
    return told


def solver_options() -> str:
    """Each option once, with the solvers that have it."""
    shared = arguments_told(inspect.getdoc(Trajectory) or "")
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, solver, options in _solvers():
        told = shared | arguments_told(inspect.getdoc(documented(solver)) or "")
        for option, default in options.items():
            found.setdefault((option, yaml_of(default), told[option]), []).append(name)
    rows = [
        (f"`{option}`", f"`{default}`", ", ".join(f"`{name}`" for name in names), told)
        for (option, default, told), names in found.items()
    ]
    return markdown(rows).replace("| takes |", "| of |")


def _solvers() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    for name in registry.names("solver"):
        solver = registry.entry("solver", name)
        yield name, solver, solver.options


def fit() -> str:
    """The fields of FitSettings, by its docstring."""
    told = arguments_told(inspect.getdoc(FitSettings) or "", "Attributes")
    hints = typing.get_type_hints(FitSettings)
    fields = dataclasses.fields(FitSettings)
    return markdown(
        [(f"`{each.name}`", f"`{yaml_of(each.default)}`", shown(hints[each.name]), told[each.name]) for each in fields]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
