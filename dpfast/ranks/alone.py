"""What one rank does by itself: in a collective it would wait for the others for ever."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from dpfast.errors import ConfigError

_COLLECTIVES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "_dtensor")  # the namespaces of their ops


class Alone(TorchDispatchMode):
    """``with Alone(who):`` collectives of torch.distributed, also those of a model in shards, raise ``ConfigError``."""

    def __init__(self, who: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._who = who

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in _COLLECTIVES:
            raise ConfigError(
                f"{self._who} called {func}, which waits for all ranks, of which the others do something else. What"
                " needs them all (full_tensor(), a call or a checkpoint of a model in shards, barrier()) belongs after"
                " fit(), on every rank"
            )
        return func(*args, **(kwargs or {}))
