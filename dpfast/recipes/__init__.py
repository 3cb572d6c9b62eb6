"""Recipes: everything a run depends on, as TOML files checked against dataclasses."""

from dpfast.recipes.convert import flatten, to_toml
from dpfast.recipes.loader import all_keys, defaults, fingerprint, load, names, parts
from dpfast.recipes.schema import Recipe

__all__ = ["Recipe", "all_keys", "defaults", "fingerprint", "flatten", "load", "names", "parts", "to_toml"]
