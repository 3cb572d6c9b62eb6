"""Recipes from TOML files, with single values replaced from the command line."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_type_hints

from dpfast.errors import ConfigError
from dpfast.files import is_file
from dpfast.recipes.convert import build, flatten, nearest
from dpfast.recipes.schema import Recipe

_FOLDER = Path(__file__).parent
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def names() -> list[str]:
    """The recipes that come with dpfast."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(recipe: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """A recipe by name or by the path of a TOML file, with ``overrides`` like ``"private.steps=40"`` applied.

    A key may be given without its table where that is unambiguous (``target_epsilon=1``). A file may begin
    with ``base = "digits"`` and then states only what differs.

    Raises:
        ConfigError: no such recipe, not TOML, or a key or value that cannot be used.
    """
    values = _read(_find(str(recipe)), seen=())
    for override in overrides:
        _apply(values, override)
    built = cast(Recipe, build(Recipe, values))
    if not _NAME.fullmatch(built.name):
        raise ConfigError(f"recipe key name = {built.name!r}: expected letters, digits, '-', '_' or '.'")
    return built


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that change when any of ``parts`` (JSON values) does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def parts(recipe: Recipe, *sections: str) -> dict[str, Any]:
    """The values of the named tables or keys, flattened, as JSON would give them back."""
    flat = {k: v for k, v in flatten(recipe).items() if k in sections or k.rpartition(".")[0] in sections}
    return cast(dict[str, Any], json.loads(json.dumps(flat)))


def defaults(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What the schema says of keys that are left out, for every table that ``parts`` hold whole; flattened likewise."""
    found: dict[str, Any] = {}
    for name, table in get_type_hints(Recipe).items():
        keys = {f"{name}.{entry.name}": entry.default for entry in fields(table)} if is_dataclass(table) else {}
        if keys.keys() <= parts.keys():
            found |= {key: value for key, value in keys.items() if value is not MISSING}
    return cast(dict[str, Any], json.loads(json.dumps(found)))


def _find(recipe: str) -> Path:
    bundled = _FOLDER / f"{recipe}.toml"
    if "/" not in recipe and is_file(bundled):
        return bundled
    path = Path(recipe)
    if path.suffix == ".toml" and is_file(path):
        return path
    if path.suffix == ".toml":
        raise ConfigError(f"no recipe file {recipe}: expected an existing .toml file")
    raise ConfigError(
        f"no recipe {recipe!r}{nearest(recipe, names())}: expected one of {', '.join(names())}"
        " or the path of a .toml file"
    )


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise ConfigError(f"recipe {path} is its own base")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"recipe {path} is not valid TOML: {error}") from error
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"recipe {path}: base = {base!r}: expected the name of a recipe")
    beside = path.parent / base
    merged = _read(beside if beside.suffix == ".toml" and is_file(beside) else _find(base), (*seen, path))
    _merge(merged, values)
    return merged


def _merge(into: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = (part.strip() for part in override.partition("="))
    if any("\ud800" <= letter <= "\udfff" for letter in override):  # bytes of the command line that are no text
        raise ConfigError(f"--set {override!r}: expected text in UTF-8")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected key=value, for example --set target_epsilon=1")
    *sections, name = _full_key(key).split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value here, not a table")
    if text == "none":
        values.pop(name, None)
    else:
        values[name] = _value(text)


def _full_key(key: str) -> str:
    known = all_keys()
    if key in known:
        return key
    owners = [k for k in known if k.rpartition(".")[2] == key]
    if len(owners) == 1:
        return owners[0]
    if owners:
        raise ConfigError(f"--set {key}=...: which one? {' or '.join(owners)}")
    tails = {k.rpartition(".")[2] for k in known}
    close = difflib.get_close_matches(key, [*known, *tails], n=1, cutoff=0.5)
    matching = [k for k in known if close and close[0] in (k, k.rpartition(".")[2])]
    hint = f"; nearest: {' or '.join(matching)}" if matching else ""
    raise ConfigError(f"unknown recipe key {key!r}{hint}")


def all_keys(table: type[Any] = Recipe, prefix: str = "") -> list[str]:
    """Every key a recipe may hold, as ``private.steps``."""
    hints = get_type_hints(table)
    keys: list[str] = []
    for entry in fields(table):
        hint = hints[entry.name]
        if is_dataclass(hint) and isinstance(hint, type):
            keys += all_keys(hint, f"{prefix}{entry.name}.")
        else:
            keys.append(prefix + entry.name)
    return keys


def _value(text: str) -> Any:
    """A TOML value, or the text itself where it is none (so that quotes may be left out)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, KeyError):
        return text
