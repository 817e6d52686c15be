"""Every setting of a recipe as tables, read from the configuration classes, for docs and the `moonlight` command."""

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

from moonlight.config.checks import FieldType, field_type, field_types, require_one_of
from moonlight.config.run import RunConfig

_UNITS = {  # by the last words of a key; the longest match counts
    "steps": ("steps", "steps_in_a_row", "spike_window"),
    "step": ("stop_at_step",),
    "tokens": ("tokens", "sequence_length", "max_position_embeddings"),
    "sequences": ("batch_size", "validation_sequences"),
    "epochs": ("epochs",),
    "s": ("seconds",),
    "min": ("minutes",),
    "ranks": ("parallel_size",),
    "processes": ("num_processes",),
    "threads": ("threads_per_process",),
    "elements": ("bucket_size",),
    "checkpoints": ("keep_checkpoints",),
    "TFLOP/s": ("peak_tflops",),
}
_SECTION_DEFAULT = "its defaults"
_PAGE_HEAD = """\
# Settings

A recipe is a YAML file with these keys. `base: other.yaml` inherits from another recipe, and `section.key=value` on the
command line overrides one key. `moonlight settings [SECTION]` prints this page in a terminal. Unknown keys, wrong types
and values out of range are refused before a run starts.
"""


class RecipeKey(NamedTuple):
    """One key. `type` includes the accepted range or choices; `default` is empty if the key is required."""

    name: str
    type: str
    default: str
    unit: str
    meaning: str


class RecipeSection(NamedTuple):
    """One section of a recipe. `name` is the prefix of its keys; empty for the top level."""

    name: str
    meaning: str
    keys: list[RecipeKey]


def find_section(name: str) -> list[RecipeSection]:
    """Return the section of that name with the sections inside it; "run" is the top level.

    Raises:
        UserError: the recipe has no such section.
    """
    sections = {section.name: section for section in list_sections()}
    require_one_of("SECTION", name, tuple(dict.fromkeys(key.split(".")[0] or "run" for key in sections)))
    return [section for key, section in sections.items() if (key.split(".")[0] or "run") == name]


def settings_page(sections: Sequence[RecipeSection]) -> str:
    """Return the Markdown page of these sections; docs/settings.md has all of them."""
    lines = [_PAGE_HEAD]
    for section in sections:
        lines += [f"## {section.name or 'Top level'}", "", section.meaning, ""]
        lines += ["| key | type | default | unit | meaning |", "| --- | --- | --- | --- | --- |"]
        for key in section.keys:
            default = f"`{key.default}`" if key.default not in ("", _SECTION_DEFAULT) else key.default or "required"
            lines.append(f"| `{key.name}` | {key.type} | {default} | {key.unit} | {key.meaning} |")
        lines.append("")
    return "\n".join(lines)


def list_sections(name: str = "", cls: type = RunConfig) -> list[RecipeSection]:
    """Return the section of a class, then those of the classes in its fields, in their order; by default all."""
    texts, keys, nested = field_docstrings(cls), [], []
    for field in dataclasses.fields(cls):
        accepted = field_types(cls)[field.name]
        keys.append(
            RecipeKey(
                field.name,
                _type_text(accepted),
                _default_text(field, accepted),
                _unit(field.name),
                texts.get(field.name, f"The section {field.name}, below."),
            )
        )
        if (section_class := _section_class(accepted.kind)) is not None:
            marker = {dict: ".NAME", tuple: ".N"}.get(typing.get_origin(accepted.kind), "")
            nested += list_sections(f"{name}.{field.name}{marker}".lstrip("."), section_class)
    return [RecipeSection(name, " ".join((inspect.getdoc(cls) or "").split()), keys), *nested]


def _section_class(kind: Any) -> type | None:
    """Return the dataclass that a field of this kind holds: one, several by name, or a list of them."""
    kinds = (kind, *(field_type(argument).kind for argument in typing.get_args(kind) if argument is not ...))
    return next((each for each in kinds if isinstance(each, type) and dataclasses.is_dataclass(each)), None)


def field_docstrings(cls: type) -> dict[str, str]:
    """Return the text under each field of a dataclass and its base classes, on one line."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return texts


def _type_text(accepted: FieldType) -> str:
    origin = typing.get_origin(accepted.kind)
    if accepted.choices:
        return ("list of " if origin is tuple else "") + ", ".join(f"`{choice}`" for choice in accepted.choices)
    if _section_class(accepted.kind) is not None:
        return {dict: "sections by name", tuple: "list of sections"}.get(origin, "section")
    name = "numbers by name" if origin is dict else accepted.kind.__name__
    return name + (f", {accepted.range.text}" if accepted.range else "") + (", or null" if accepted.optional else "")


def _default_text(field: "dataclasses.Field[Any]", accepted: FieldType) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _SECTION_DEFAULT if dataclasses.is_dataclass(accepted.kind) else str(field.default_factory())
    if field.default is dataclasses.MISSING:
        return ""
    names = {None: "null", True: "true", False: "false", "": '""', (): "[]"}
    is_number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
    return str(field.default) if is_number else names.get(field.default) or str(field.default)


def _unit(key: str) -> str:
    matches = [(len(end), unit) for unit, ends in _UNITS.items() for end in ends if f"_{key}".endswith(f"_{end}")]
    return max(matches)[1] if matches else ""
