"""Where there is no GPU, Triton's kernels run in its interpreter: to be said before triton is imported."""

import itertools
import os
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The interpreter takes seconds for what a GPU does in a millisecond: of each test of Triton's kernels every value
    of every parameter is tried there, but not every combination, and none that is ``large``. ``DPFAST_TEST_ALL=1``
    tries all.
    """
    if torch.cuda.is_available() or os.environ.get("DPFAST_TEST_ALL"):
        return
    of_triton = [item for item in items if _parameters(item).get("backend") == repr("triton")]
    groups = itertools.groupby(of_triton, key=lambda item: (item.path, item.originalname))
    left_out = {id(item): item for _, group in groups for item in _all_but_each_value_once(list(group))}
    config.hook.pytest_deselected(items=list(left_out.values()))
    items[:] = [item for item in items if id(item) not in left_out]


def _parameters(item: pytest.Item) -> dict[str, str]:
    return {name: repr(value) for name, value in item.callspec.params.items()} if hasattr(item, "callspec") else {}


def _all_but_each_value_once(cases: list[pytest.Item]) -> list[pytest.Item]:
    """But for each value of the parameter that has most of them, with others in turns, later with their first ones."""
    given = [_parameters(item) for item in cases if not item.get_closest_marker("large")]
    values = {name: list(dict.fromkeys(one[name] for one in given)) for name in given[0]}
    longest = max(values, key=lambda name: len(values[name]))
    kept = []
    for turn, value in enumerate(values[longest]):
        wanted = {name: many[turn] if turn < len(many) else many[0] for name, many in values.items()}
        like = [one for one in given if one[longest] == value]
        kept.append(max(like, key=lambda one: sum(one[name] == of for name, of in wanted.items())))
    return [item for item in cases if _parameters(item) not in kept]


@pytest.fixture(autouse=True)
def _no_private_loop_is_left():
    """One that a test leaves in the middle waits for its step, and torch.compile of another test would notice."""
    yield
    between = sys.modules.get("dpfast.engine.between")
    for mode in torch.overrides._get_current_function_mode_stack() if between else ():
        if isinstance(mode, between.Between):
            between.modes.remove(mode)
