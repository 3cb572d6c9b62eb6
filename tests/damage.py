"""Hypothesis strategies of damage: to bytes as they lie on a disk, to values of JSON or TOML."""

import datetime
from typing import Any

from hypothesis import strategies as st

WORDS = st.sampled_from(
    ["", "digits", "cuda", "none", "nan", "../..", "\x00", "a" * 300, "ü", "1e400", "[]", "poisson"]
)
NUMBERS = (
    st.integers(-(2**70), 2**70)
    | st.integers(-3, 70)
    | st.floats()
    | st.sampled_from(
        [0.0, -0.0, 1.0, 1e-300, 1e300, *(2**bits - end for bits in (31, 32, 53, 63, 64) for end in (0, 1))]
    )
)
PLAIN = st.none() | st.booleans() | NUMBERS | WORDS | st.text(max_size=8)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=3), max_leaves=6
)
DATES = st.just(datetime.date(2026, 1, 1))


DEEP = b"[" * 100_000


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with one to four pieces changed, cut out, put in, doubled or moved."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        piece = content[at : at + draw(st.sampled_from([1, 1, 2, 4, 17, 300]))]
        before, after = content[:at], content[at + len(piece) :]
        new = draw(
            st.binary(min_size=len(piece), max_size=len(piece))
            | st.sampled_from([b"", DEEP, piece * 2, piece[::-1], bytes(len(piece)), b"\xff" * len(piece)])
            | st.binary(max_size=8).map(lambda more, piece=piece: more + piece)  # type: ignore[misc]
        )
        content = before + new + (b"" if draw(st.integers(0, 9)) == 0 else after)
    return content


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """A value of dicts, lists and plain values with another in some place, or without it."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        if draw(st.integers(0, 4)) == 0:
            return {name: of for name, of in value.items() if name != key}
        return {**value, key: draw(altered(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], draw(altered(value[at])), *value[at + 1 :]]
    return draw(VALUES)
