"""Independent pieces of an evaluation, which ranks take as they become free."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dpfast.ranks import Ranks

Task = Callable[[], Mapping[str, Any]]  # what is found, by name: the task's own name is among them


class Results(Protocol):
    """Named results, numbers and texts: a dict, or one that is kept in a file."""

    def __contains__(self, key: str, /) -> bool: ...

    def __getitem__(self, key: str, /) -> Any: ...

    def __setitem__(self, key: str, value: Any, /) -> None: ...


def work_off(tasks: Mapping[str, Task], results: Results, ranks: Ranks) -> None:
    """Put what each task finds into ``results``, if its name is not there yet. A collective.

    results: rank 0's say what is to be done, and hold everything in the end; those of another rank get, at once, what
    that rank has found.
    """
    missing = ranks.first(lambda: [name for name in tasks if name not in results])
    mine: dict[str, Any] = {}
    for number in ranks.take(len(missing)):
        name = missing[number]
        found = tasks[name]()
        for key in sorted(found, key=lambda key: key == name):  # last what says that it is done
            mine[key] = results[key] = found[key]
    for others in ranks.tell(mine)[1:]:
        if ranks.leads:
            for key, value in others.items():
                results[key] = value
