"""Every setting of a recipe as tables, read from the configuration classes, for docs and the `moonlight` command."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moonlight.config.checks import field_type, field_types, require_one_of
from moonlight.config.run import RunConfig

UNITS = {  # by the end of a key; the longest that fits
    "steps": "steps",
    "steps_in_a_row": "steps",
    "tokens": "tokens",
    "seconds": "s",
    "minutes": "min",
    "epochs": "epochs",
    "batch_size": "sequences",
    "validation_sequences": "sequences",
    "sequence_length": "tokens",
    "max_position_embeddings": "tokens",
    "parallel_size": "ranks",
    "num_processes": "processes",
    "threads_per_process": "threads",
    "bucket_size": "elements",
    "stop_at_step": "step",
    "spike_window": "steps",
    "peak_tflops": "TFLOP/s",
    "keep_checkpoints": "checkpoints",
}

SECTION_DEFAULT = "its defaults"

PAGE_HEAD = """\
# Settings

A recipe is a YAML file with these keys. `base: other.yaml` inherits from another recipe, and `section.key=value` on the
command line overrides one key. `moonlight settings [SECTION]` prints this page in a terminal. Unknown keys, wrong types
and values out of range are refused before a run starts.
"""


@dataclass(frozen=True)
class Setting:
    """One key of a section."""

    key: str
    type: str
    """With the accepted range or choices."""
    default: str
    """Empty if the key is required."""
    unit: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """One section of a recipe."""

    name: str
    """As written in front of its keys; empty for the top level."""
    meaning: str
    settings: tuple[Setting, ...]


def list_sections() -> list[Section]:
    """Return every section with every key, in the order of the classes; the top level first."""
    sections = [_section("", RunConfig)]
    for field in dataclasses.fields(RunConfig):
        kind = _section_class(typing.get_type_hints(RunConfig)[field.name])
        if kind is not None:
            name = f"{field.name}.NAME" if field.name == "stages" else field.name
            sections.append(_section(name, kind))
            sections += _nested_sections(name, kind)
    return sections


def find_section(name: str) -> list[Section]:
    """Return the section of that name with the sections inside it.

    Raises:
        UserError: there is no such section; the names are listed.
    """
    sections = list_sections()
    names = [section.name.split(".")[0] or "run" for section in sections]
    require_one_of("SECTION", name, tuple(dict.fromkeys(names)))
    return [section for section, own_name in zip(sections, names, strict=True) if own_name == name]


def settings_page(sections: Sequence[Section]) -> str:
    """Return the Markdown page of these sections: docs/settings.md has all."""
    return "\n".join([PAGE_HEAD, *map(_markdown, sections)])


def _markdown(section: Section) -> str:
    lines = [
        f"## {section.name or 'Top level'}",
        "",
        section.meaning,
        "",
        "| key | type | default | unit | meaning |",
        "| --- | --- | --- | --- | --- |",
    ]
    for setting in section.settings:
        default = f"`{setting.default}`" if setting.default else "required"
        default = default.replace(f"`{SECTION_DEFAULT}`", SECTION_DEFAULT)
        kind = setting.type.replace("|", "\\|")
        lines.append(f"| `{setting.key}` | {kind} | {default} | {setting.unit} | {setting.meaning} |")
    return "\n".join([*lines, ""])


def _section(name: str, cls: type) -> Section:
    meanings = field_docstrings(cls)
    settings = []
    for field in dataclasses.fields(cls):
        accepted = field_types(cls)[field.name]
        meaning = meanings.get(field.name) or f"The section {field.name}, below."
        default = _default(field)
        if default and dataclasses.is_dataclass(accepted.kind) and not accepted.optional:
            default = SECTION_DEFAULT
        settings.append(Setting(field.name, _type_text(accepted), default, _unit(field.name), meaning))
    return Section(name, " ".join((inspect.getdoc(cls) or "").split()), tuple(settings))


def _nested_sections(name: str, cls: type) -> list[Section]:
    nested = []
    for key, accepted in field_types(cls).items():
        kind = _section_class(accepted.kind)
        if kind is not None:
            marker = "NAME" if typing.get_origin(accepted.kind) is dict else "N"
            nested.append(_section(f"{name}.{key}.{marker}", kind))
    return nested


def _section_class(hint: Any) -> type | None:
    """Return the dataclass that a field holds: one, several by name, or a list of them."""
    kind = field_type(hint).kind
    for candidate in (kind, *typing.get_args(kind)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, of its base classes too, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def _type_text(accepted: Any) -> str:
    origin = typing.get_origin(accepted.kind)
    if accepted.choices:
        text = ", ".join(f"`{choice}`" for choice in accepted.choices)
        return f"list of {text}" if origin is tuple else text
    if _section_class(accepted.kind) is not None:
        return {dict: "sections by name", tuple: "list of sections"}.get(origin, "section")
    name = {dict: "numbers by name", tuple: "list"}.get(origin) or accepted.kind.__name__
    return name + (f", {accepted.range.text}" if accepted.range else "") + (", or null" if accepted.optional else "")


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return {"": '""', (): "[]"}.get(value) or str(value) if isinstance(value, str | tuple) else str(value)


def _unit(key: str) -> str:
    fitting = [ending for ending in UNITS if key == ending or key.endswith(f"_{ending}")]
    return UNITS[max(fitting, key=len)] if fitting else ""
