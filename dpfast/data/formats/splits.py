"""Names of splits in names of files, folders and arrays."""

import re
from pathlib import PurePath

_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def split_name(word: str) -> str | None:
    """``validation`` -> ``val``; None for what names no split."""
    return _WORDS.get(word.lower())


def split_of(path: PurePath) -> str:
    """``data/test-00000-of-00001.parquet`` -> ``test``: the last split that a path names; ``train`` for none."""
    words = [word for part in path.parts for word in re.split(r"[^a-zA-Z]+", part)]
    return next((name for word in reversed(words) if (name := split_name(word))), "train")
