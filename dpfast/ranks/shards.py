"""Models that ``torch.distributed.fsdp.fully_shard`` has cut (FSDP2): parameters and optimizer state in shards.

A step needs the whole: parameters are gathered once for each logical batch, and cut again before the update. In
between each rank holds the parameters and its own clipped sum in full, as one reduction a step asks for; the state of
the optimizer, the averaged model and, between steps, the parameters stay in shards.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from dpfast.errors import ConfigError


def is_shard(t: Tensor) -> bool:
    """Whether it is a DTensor: a part of a tensor here, the rest on other ranks."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has cut it, also while it is gathered."""
    return bool(_parts_of(model))


def _parts_of(model: nn.Module) -> list[Any]:
    module = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(module, "FSDPModule", None)
    return [] if kind is None else [part for part in model.modules() if isinstance(part, kind)]


# What a step switches off of the hooks of fully_shard, by the names of torch's attributes.
_SWITCHES = ("post_forward_mesh_info", "reshard_after_backward", "reduce_grads", "all_reduce_grads")


def _groups_of(part: Any) -> list[Any]:
    """The parameter groups of a module that ``fully_shard`` was applied to."""
    state = part._get_fsdp_state()  # noqa: SLF001  # torch has setters alone
    groups = getattr(state, "_fsdp_param_groups", None)
    found = [state._fsdp_param_group] if groups is None else groups  # noqa: SLF001  # before torch 2.12
    return [group for group in found if group is not None]


def check_shards(model: nn.Module) -> None:
    """Raises ConfigError for a mixed-precision policy, which would round parameters or clipped sums."""
    for part in _parts_of(model):
        for group in _groups_of(part):
            policy = group.mp_policy
            if any(of is not None for of in (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)):
                raise ConfigError(
                    f"fully_shard(mp_policy={policy}): expected none; compute in bfloat16 under torch.autocast, or with"
                    ' Performance(dtype="bfloat16")'
                )


class Gathered:
    """The whole parameters of a model, until ``release``."""

    def __init__(self, model: nn.Module) -> None:
        self._parts = _parts_of(model)
        before = dict(model.named_parameters())
        _check(before)
        check_shards(model)
        groups = [group for part in self._parts for group in _groups_of(part)]
        self._before = [(group, name, getattr(group, name)) for group in groups for name in _SWITCHES]
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            part.set_requires_gradient_sync(False, recurse=False)
            part.unshard()
        self.is_whole = bool(self._parts)
        for name, p in model.named_parameters():
            if p is not before[name]:
                _SHARDS[p] = (before[name], self)

    def release(self) -> None:
        """Cut them again; each rank keeps its shards."""
        if self.is_whole:
            self.is_whole = False
            for part in self._parts:
                part.set_reshard_after_forward(True, recurse=False)  # or it would not, after a forward pass alone
                part.reshard()
            for group, name, value in self._before:
                setattr(group, name, value)


# By whole parameter: its shard, and the last time that it was gathered.
_SHARDS: Any = WeakTensorKeyDictionary()


def shard_of(p: nn.Parameter) -> nn.Parameter:
    """What the optimizer has of a whole parameter: the shard, or the parameter itself where nothing was cut."""
    return cast(nn.Parameter, _SHARDS[p][0] if p in _SHARDS else p)


def release(p: nn.Parameter) -> None:
    """Cut the model that a whole parameter belongs to."""
    if p in _SHARDS:
        _SHARDS[p][1].release()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """For one logical batch: ``with clipper`` blocks and the step that ends them see whole parameters.

    A collective. Of a model that is not cut it does nothing. ``DPOptimizer.step`` inside of it cuts the model again
    before it updates the shards.

    Raises ConfigError for shards along another dimension than the first, over a mesh of several dimensions, or of
    mixed precision (compute in bfloat16 under ``torch.autocast``).
    """
    held = Gathered(model)
    try:
        yield
    finally:
        held.release()


def _check(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, p in parameters.items():
        if is_shard(p):
            shard = cast(Any, p)
            placements = tuple(shard.placements)
            if shard.device_mesh.ndim != 1 or not placements[0].is_shard(0):
                raise ConfigError(
                    f"{name} lies on a mesh of {shard.device_mesh.ndim} dimensions as {placements}: expected"
                    " fully_shard(model) over all ranks, in shards along the first dimension"
                )


def as_shard(numbers: Tensor, like: nn.Parameter) -> Tensor:
    """The first of ``numbers [n]``, as a gradient of the shard ``like``."""
    from torch.distributed.tensor import DTensor

    shard = cast(Any, like)
    local = shard.to_local()
    mine = numbers[: local.numel()].view(local.shape)
    return DTensor.from_local(
        mine, shard.device_mesh, shard.placements, run_check=False, shape=shard.shape, stride=shard.stride()
    )


# Checkpoints: whole tensors in the file, whatever number of ranks there was, or will be.


def full_state(state: Any, *, keep: bool = True) -> Any:
    """A state dict with whole tensors on the CPU in the place of shards. A collective where there are any: one after
    another is gathered. keep: where not, there is None in its place.
    """
    if isinstance(state, Mapping):
        return {key: full_state(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(full_state(value, keep=keep) for value in state)
    if not (isinstance(state, Tensor) and is_shard(state)):
        return state
    whole = cast(Any, state).full_tensor()
    return whole.cpu() if keep else None


def load_full_state(part: Any, state: Any) -> None:
    """``part.load_state_dict(state)``, of whose whole tensors each rank takes its shards."""
    if isinstance(part, torch.optim.Optimizer):
        state = {**state, "state": _optimizer_shards(part, state["state"])}
    elif isinstance(part, nn.Module) and is_sharded(part):
        like = part.state_dict()
        state = {name: _cut(value, like[name]) if name in like else value for name, value in state.items()}
    part.load_state_dict(state)


def _optimizer_shards(optimizer: torch.optim.Optimizer, state: Mapping[int, Any]) -> dict[int, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {}
    for number, values in state.items():
        p = parameters[number]
        same = {key: _cut(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v for key, v in values.items()}
        cut[number] = same
    return cut


def _cut(whole: Any, like: Tensor) -> Any:
    if not is_shard(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    shard = cast(Any, like)
    local = shard.to_local()
    return distribute_tensor(whole.to(local.device), shard.device_mesh, shard.placements, src_data_rank=None)


class Average:
    """An exponential moving average of a model in shards, with the state dict of torch's ``AveragedModel``."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._model, self._decay = model, decay
        self._updates = 0
        self._means = {name: p.detach().clone() for name, p in model.named_parameters()}

    @property
    def means(self) -> list[Tensor]:
        """In the order of the model's parameters."""
        return list(self._means.values())

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """With the parameters as they are now."""
        for name, p in model.named_parameters():
            mean, now = local(self._means[name]), local(p)
            if self._updates:
                mean.lerp_(now, 1 - self._decay)
            else:
                mean.copy_(now)
        self._updates += 1

    @contextmanager
    def swapped_in(self) -> Iterator[nn.Module]:
        """The model with the averages for its parameters."""
        kept = {name: p.detach().clone() for name, p in self._model.named_parameters()}
        try:
            self._give(self._means)
            yield self._model
        finally:
            self._give(kept)

    def state_dict(self) -> dict[str, Any]:
        """Keys as ``AveragedModel`` has them."""
        named = {**self._model.state_dict(), **self._means}
        return {"n_averaged": torch.tensor(self._updates), **{f"module.{name}": t for name, t in named.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What ``full_state(state_dict())`` has saved, or ``AveragedModel``."""
        for name, mean in self._means.items():
            local(mean).copy_(local(_cut(state[f"module.{name}"], mean)))
        self._updates = int(state["n_averaged"])

    @torch.no_grad()
    def _give(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._model.named_parameters():
            local(p).copy_(local(values[name]))


def local(t: Tensor) -> Tensor:
    """What of it is here."""
    return cast(Any, t).to_local() if is_shard(t) else t.detach()
