"""Recipes on disk: YAML with `base:` inheritance and dotted overrides, checked against `moonlight.config.run`."""

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moonlight.config.checks import field_type
from moonlight.config.model import ModelConfig
from moonlight.config.run import RunConfig
from moonlight.errors import UserError

_MAX_INT = 2**31 - 1
_MAX_TOKENS = 10**15


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a recipe file and apply `section.key=value` overrides.

    Raises:
        UserError: unreadable file, unknown key (the nearest known one is named), wrong type, value out of range.
    """
    tree = _read_tree(Path(path), ())
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UserError(f"override {override!r}: write it as section.key=value, for example train.seed=7")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"override {override!r}: {_first_line(error)}") from None
    try:
        plain = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {path}: {_first_line(error)}") from None
    return parse_run_config(plain)


def parse_run_config(tree: Any) -> RunConfig:
    """Build a RunConfig from nested plain values, with every key and type checked."""
    return _build(RunConfig, tree, "")


def parse_model_config(tree: Any) -> ModelConfig:
    """Build the architecture section alone, with every key and type checked."""
    return _build(ModelConfig, tree, "model.")


def to_yaml(config: RunConfig) -> str:
    """Return the resolved recipe as YAML, with every default."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)


def _read_tree(path: Path, seen: tuple[Path, ...]) -> Any:
    """Return the YAML tree of `path`, merged over that of its `base:`, which is relative to `path`."""
    path = path.resolve()
    if path in seen:
        raise UserError(f"{path}: its base: includes itself")
    try:
        tree = OmegaConf.load(path)
    except OSError as error:  # also when the file holds one value instead of a mapping
        raise UserError(f"recipe {path}: {error.strerror or error}; give the path of a YAML recipe") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"recipe {path} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"recipe {path}: the top level must be a mapping with keys such as model, data and train")
    base = tree.pop("base", None)
    if base is None:
        return tree
    return OmegaConf.merge(_read_tree(path.parent / str(base), (*seen, path)), tree)


def _build(cls: type, tree: Any, prefix: str) -> Any:
    """Build a dataclass from a mapping."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{prefix.rstrip('.') or 'recipe'} is {tree!r}: a mapping of keys is expected here")
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in tree:
        if key not in fields:
            raise UserError(f"unknown recipe key {prefix}{key}: {_hint(str(key), prefix, fields)}")
    values = {}
    for name, field in fields.items():
        is_collection = typing.get_origin(hints[name]) in (dict, tuple)
        if name in tree and not (is_collection and tree[name] is None):  # null removes those of the base
            values[name] = _convert(hints[name], tree[name], f"{prefix}{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"recipe key {prefix}{name} is missing: it has no default")
    return cls(**values)


def _hint(key: str, prefix: str, known: Iterable[str]) -> str:
    """Suggest a key for an unknown one: the same key of another section, or the nearest of this one."""
    for section, hint in typing.get_type_hints(RunConfig).items():
        cls = next(iter(typing.get_args(hint)), hint)
        if dataclasses.is_dataclass(cls) and key in {field.name for field in dataclasses.fields(cls)}:
            return f"did you mean {section}.{key}?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{near[0]}?" if near else f"accepted are {', '.join(known)}"


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Check one value against its type. Integers are accepted as floats, and so is 1e-4, which is text in YAML 1.1."""
    accepted = field_type(hint)
    kind = accepted.kind
    if value is None and accepted.optional:
        return None
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        return _build(kind, value, f"{name}.")
    if typing.get_origin(kind) is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is {value!r}: a mapping of names is expected here")
        item_hint = typing.get_args(kind)[1]
        return {str(key): _convert(item_hint, item, f"{name}.{key}") for key, item in value.items()}
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{name} is {value!r}: a list is expected here")
        item_hint = typing.get_args(kind)[0]
        return tuple(_convert(item_hint, item, f"{name}[{index}]") for index, item in enumerate(value))
    largest = _MAX_TOKENS if name.endswith("_tokens") else _MAX_INT
    if type(value) is int and abs(value) > largest:
        raise UserError(f"{name} is {value}: at most {largest} is accepted")
    if kind is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} is {value}: a finite number is expected")
    if type(value) is kind:
        return value
    raise UserError(f"{name} is {value!r}: expected {kind.__name__}{' or null' if accepted.optional else ''}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
