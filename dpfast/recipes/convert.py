"""Plain TOML values to typed tables and back; errors name the key, what was expected and what came."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dpfast.errors import ConfigError


def nearest(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`` (nearest: 'x')`` for the entry of ``known`` most like ``word``, or an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (nearest: {prefix + found[0]!r})" if found else ""


def build(table: type[Any], values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass ``table``.

    Raises:
        ConfigError: a key is unknown, missing, of the wrong type, or out of its range.
    """
    entries: dict[str, Field[Any]] = {entry.name: entry for entry in fields(table)}
    for key in values:
        if key not in entries:
            hint = nearest(key, entries, prefix) or f"; known keys: {', '.join(entries)}"
            raise ConfigError(f"unknown recipe key {prefix + key!r}{hint}")
    missing = [prefix + k for k, e in entries.items() if k not in values and e.default is MISSING]
    if missing:
        raise ConfigError(
            f'the recipe lacks {", ".join(missing)}; add them, or put `base = "digits"` in its first line'
            " to inherit what it leaves out"
        )
    hints = get_type_hints(table)
    converted = {k: convert(v, hints[k], prefix + k) for k, v in values.items()}
    for key, value in converted.items():
        _check_range(prefix + key, value, entries[key])
    return table(**converted)


def _check_range(key: str, value: Any, entry: Field[Any]) -> None:
    accepts = entry.metadata.get("accepts")
    if accepts is not None and value is not None and not accepts(value):  # NaN is accepted by no range
        raise ConfigError(f"recipe key {key} = {value!r}: expected {entry.metadata['expected']}")


def convert(value: Any, hint: Any, key: str) -> Any:
    """``value`` as the type ``hint``: an int passes for a float, "inf" for infinity, a list for a tuple."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise wrong_type(key, f"a table [{key}]", value)
        return build(hint, value, f"{key}.")
    if origin in (Union, types.UnionType):
        return None if value is None else convert(value, arguments[0], key)
    if origin is Literal:
        if value not in arguments:
            choices = " or ".join(repr(a) for a in arguments)
            raise ConfigError(f"recipe key {key} = {value!r}: expected {choices}{nearest(str(value), arguments)}")
        return value
    if origin is tuple:
        return _tuple(value, arguments, key)
    if hint is float:
        return _float(value, key)
    if type(value) is not hint:
        raise wrong_type(key, _NAMES[hint], value)
    return value


def _float(value: Any, key: str) -> float:
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_type(key, "a number", value)
    return float(value)


def _tuple(value: Any, arguments: tuple[Any, ...], key: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise wrong_type(key, "a list", value)
    if arguments[-1] is Ellipsis:
        kinds = [arguments[0]] * len(value)
    elif len(value) == len(arguments):
        kinds = list(arguments)
    else:
        raise ConfigError(f"recipe key {key} = {value!r}: expected {len(arguments)} values, got {len(value)}")
    return tuple(convert(v, kind, f"{key}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds, strict=True)))


_NAMES: dict[type, str] = {
    int: "a whole number",
    str: "text",
    bool: "true or false",
    float: "a number",
    list: "a list",
    dict: "a table",
}


def wrong_type(key: str, expected: str, value: Any) -> ConfigError:
    """The error for a value of the wrong type."""
    came = _NAMES.get(type(value), type(value).__name__)
    return ConfigError(f"recipe key {key}: expected {expected}, got {value!r} ({came})")


def flatten(table: Any, prefix: str = "") -> dict[str, Any]:
    """All values of a dataclass as ``{"private.steps": 80, ...}``, in the order of its fields."""
    flat: dict[str, Any] = {}
    for entry in fields(table):
        value = getattr(table, entry.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{entry.name}.")
        else:
            flat[prefix + entry.name] = value
    return flat


def to_toml(table: Any) -> str:
    """A dataclass of scalars and tables as TOML; values that are None are left out."""
    lines: list[str] = []
    for key, value in flatten(table).items():
        section, _, name = key.rpartition(".")
        heading = f"[{section}]"
        if section and heading not in lines:
            lines += ["", heading]
        if value is not None:
            lines.append(f"{name} = {_literal(value)}")
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")  # which TOML alone escapes
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:.1f}"
    return repr(value)
