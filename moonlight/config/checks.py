"""Checks of recipe values. Each error names the key, its value and what is accepted; all are `UserError`.

A field states its own range as its type: `Positive[int]`, `NonNegative[float]`, `Fraction`, or a `Literal` of choices.
`check_fields` compares every field of a section with its type; the loader and the settings page read the same types.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from moonlight.errors import UserError


@dataclass(frozen=True)
class Range:
    """A range of numbers."""

    text: str
    """For errors and the settings page, such as "greater than 0"."""
    contains: Callable[[float], bool]


T = TypeVar("T", bound=float | None)
Positive = Annotated[T, Range("greater than 0", lambda value: value > 0)]
NonNegative = Annotated[T, Range("at least 0", lambda value: value >= 0)]
Fraction = Annotated[float, Range("at least 0 and less than 1", lambda value: 0 <= value < 1)]


@dataclass(frozen=True)
class FieldType:
    """Values that a field accepts, read from its annotation."""

    kind: Any
    """The plain type: int, float, str, bool, a section's class, dict[str, X] or tuple[X, ...]."""
    optional: bool
    """True if null is accepted too."""
    choices: tuple[Any, ...]
    """The accepted values of a `Literal`, or of a tuple's items; empty otherwise."""
    range: Range | None


def field_type(hint: Any) -> FieldType:
    """Split an annotation into plain type, choices and range."""
    value_range = None
    if typing.get_origin(hint) is Annotated:
        hint, value_range = typing.get_args(hint)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    (kind,) = (kind for kind in kinds if kind is not types.NoneType)
    is_tuple = typing.get_origin(kind) is tuple
    item = typing.get_args(kind)[0] if is_tuple else kind
    choices = typing.get_args(item) if typing.get_origin(item) is Literal else ()
    if choices:
        kind = tuple[str, ...] if is_tuple else str
    return FieldType(kind, types.NoneType in kinds, choices, value_range)


@cache
def field_types(cls: type) -> dict[str, FieldType]:
    """Return the type of every field of a section's class, in their order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: field_type(hints[field.name]) for field in dataclasses.fields(cls)}


def check_fields(section: str, config: object) -> None:
    """Raise UserError for the first field of a section whose value is out of its range or not one of its choices."""
    for name, accepted in field_types(type(config)).items():  # type: ignore[arg-type]  # a type is hashable
        value = getattr(config, name)
        if accepted.choices and typing.get_origin(accepted.kind) is tuple:
            for item in value:
                require(
                    item in accepted.choices,
                    f"{section}.{name} names {item!r}: accepted are {', '.join(map(repr, accepted.choices))}",
                )
        elif accepted.choices:
            require_one_of(f"{section}.{name}", value, accepted.choices)
        elif accepted.range and value is not None:
            text = accepted.range.text + (", or null" if accepted.optional else "")
            require(accepted.range.contains(value), f"{section}.{name} is {value}: it must be {text}")


def require(condition: bool, message: str) -> None:
    """Raise `message` unless `condition`."""
    if not condition:
        raise UserError(message)


def require_one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    """Raise UserError unless the value is one of those accepted."""
    require(value in accepted, f"{name} is {value!r}: accepted are {', '.join(map(repr, accepted))}")
