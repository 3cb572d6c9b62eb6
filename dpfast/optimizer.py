"""DPOptimizer: the one place where a private sum becomes an update."""

import inspect
from collections.abc import Collection, Mapping
from typing import Any, Protocol, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dpfast.clipping.problems import listed
from dpfast.errors import BudgetExhausted, ConfigError, DPFastError, PrivacyError
from dpfast.kernels.fingerprint import fingerprints
from dpfast.privacy.entropy import noised
from dpfast.privacy.ledger import Ledger, all_spent
from dpfast.privacy.plan import Plan
from dpfast.ranks import RankLedger, Ranks
from dpfast.ranks.shards import is_shard, local, release, shard_of
from dpfast.ranks.sums import add_up


class Clipper(Protocol):
    """What ``DPOptimizer`` asks of a ``GhostClipper``."""

    @property
    def max_grad_norm(self) -> float: ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]: ...

    @property
    def fixed(self) -> Mapping[str, torch.Tensor]: ...

    def foreign_gradients(self) -> Collection[str]: ...

    def zero_grad(self) -> None: ...

    def show_again(self) -> None: ...


class DPOptimizer(torch.optim.Optimizer):
    """A torch optimizer whose every step adds the plan's noise and is charged to a ledger first.

    optimizer: any torch optimizer that steps without a closure, over exactly the parameters of ``clipper``.
    ledger: a ``Ledger`` of the same plan, on disk for anything that is released; by default one in memory, which
        belongs to the clipper: another DPOptimizer of the same clipper goes on with it.
    ranks: the processes whose sums are added up; by default all of torch.distributed's default group, if there is one.
        Making a DPOptimizer and every ``step`` are then collectives. ``Ranks.alone()``: this process trains by itself.

    The inner optimizer's param_groups, state, defaults, hooks and state_dict are this one's, so that
    learning-rate schedulers and checkpoints work on it. The step number is the ledger's: loading a state dict
    cannot move it.

    Guarantee: a parameter is updated from private data only through ``step``, and the n-th step uses

        grad = (sum of clipped gradients + noise_multiplier * max_grad_norm * N(0, I)) / expected_batch_size

    for every trainable parameter, with fresh noise, after the ledger holds n, and for n <= plan.steps only. The sum is
    that of all ranks (``dpfast.ranks``). The caller owes one thing: what the clippers summed since the last step is one
    fresh Poisson sample (``poisson_sample``, ``ranks.share``), each of its examples once.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        clipper: Clipper,
        ledger: Ledger | RankLedger | None = None,
        *,
        ranks: Ranks | None = None,
    ) -> None:
        # Optimizer.__init__ is left out on purpose: it would make a second set of param_groups and state.
        self.optimizer = optimizer
        self.plan = plan
        self.clipper = clipper
        self.ranks = ranks or Ranks.current()
        self.ledger: Ledger | RankLedger = _memory_ledger(clipper, plan) if ledger is None else ledger
        self._in_memory = self.ledger if ledger is None else None
        self._stepping = False
        if self.ledger.plan.fingerprint() != plan.fingerprint():
            raise PrivacyError(
                "DPOptimizer: the ledger was opened with another plan; open it with this one (the one in memory has"
                " steps of an earlier optimizer of this clipper: for another plan give a Ledger)"
            )
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"DPOptimizer: {type(optimizer).__name__} evaluates the loss several times a step (a "
                "closure), which the accounting does not cover; use SGD, Adam or another optimizer that "
                "steps once"
            )
        problems = self._clip_norm_problems() + self._coverage_problems()
        if problems:
            raise PrivacyError(_itemised("DPOptimizer: the optimizer, the plan and the clipper do not fit", problems))
        meshes = {cast(Any, p).device_mesh.size() for p in map(shard_of, clipper.parameters.values()) if is_shard(p)}
        if meshes - {self.ranks.size}:
            raise PrivacyError(
                f"DPOptimizer: the model lies in shards on {max(meshes)} processes, and {self.ranks.size} train it:"
                " expected the same ones, which take each step together (fully_shard over all, no Ranks.alone())"
            )
        if self.ranks.size > 1:
            self._meet()
        _guard(optimizer, self._only_through_step)

    def _meet(self) -> None:
        """Ranks that would not train the same model are told apart before they begin."""
        if not isinstance(self.ledger, RankLedger):
            other = not self.ranks.leads and self.ledger.path is not None  # rank 0's is the one that counts
            self.ledger = RankLedger(Ledger(None, self.plan) if other else self.ledger, self.ranks)
        trainable = self._trainable()
        shapes = {name: (tuple(p.shape), str(p.dtype)) for name, p in trainable.items()}
        self.ranks.alike("model", repr(shapes), "Build the same one on all ranks")
        values = [t for t in (*trainable.values(), *self.clipper.fixed.values()) if not is_shard(t)]
        same = "Begin with the same weights: load or broadcast them (Ranks.current().copy_from_first)"
        self.ranks.alike("weights of the model", repr(fingerprints([p.detach() for p in values])), same)

    def __getattr__(self, name: str) -> Any:
        """param_groups, state, defaults and hooks are the inner optimizer's."""
        if name == "optimizer":  # not set yet, while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        return f"DPOptimizer({self.optimizer!r}, step {self.steps_taken} of {self.plan.steps})"

    @property
    def steps_taken(self) -> int:
        """Steps charged to the ledger."""
        return self.ledger.charged_steps

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Charge one step, add noise, update, clear the gradients. A ``p.grad`` of None is a sum of 0.

        Raises PrivacyError, before anything is written or charged, with every reason at once (BudgetExhausted
        when the plan's steps are spent). Whatever fails later leaves the step charged: nothing is retried
        once noise is drawn.
        """
        with torch._C.DisableTorchFunction():  # noqa: SLF001  # inside `with clipper`, an update is no private use
            self._refuse(closure)
            charged = self.steps_taken
            try:
                self._update(charged + 1)
            finally:
                self._stepping = False
                if self.steps_taken > charged:  # also when interrupted right after the charge
                    self.zero_grad()
            if self.steps_taken == self.plan.steps - 1:  # whatever weights came to do is seen before the last step
                self.clipper.show_again()

    def _update(self, step: int) -> None:
        self.ledger.charge(step)
        trainable = self._trainable()
        scale, grid = self.plan.noise_on(sum(p.numel() for p in trainable.values()))
        add_up(trainable, lambda total: self._noised_mean(total, scale, grid), self.ranks)
        updated = {name: shard_of(p) for name, p in trainable.items()}
        for parameter in trainable.values():
            release(parameter)
        grads = {name: local(p.grad) for name, p in updated.items() if p.grad is not None}
        self.ranks.agree(not_finite(step, grads))
        self._stepping = True
        self.optimizer.step()

    def _only_through_step(self, *_: object) -> None:
        """Runs before every step of the inner optimizer."""
        if not self._stepping:
            raise PrivacyError(
                "the inner optimizer would apply a sum without noise, uncharged: call DPOptimizer.step() instead"
            )

    @torch.no_grad()
    def _noised_mean(self, total: torch.Tensor, scale: float, grid: float) -> torch.Tensor:
        """(sum + noise) / expected batch size, calculated in float64."""
        return noised(total, scale, self._divisor(), grid=grid)

    def _divisor(self) -> float:
        """Of what is noised already: whatever it is, it moves no epsilon."""
        return self.plan.expected_batch_size

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  # torch's signature
        """Clear every gradient, through the clipper, so that it knows. They are always set to None."""
        self.clipper.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into the inner optimizer. The step number stays the ledger's."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the inner optimizer; its parameters must be the clipper's."""
        self.optimizer.add_param_group(param_group)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.clipper.parameters.items() if p.requires_grad}

    def _refuse(self, closure: object) -> None:
        problems = self._problems(closure)
        spent = self.steps_taken >= self.plan.steps
        if spent:
            problems.append(self._spent())
        error = BudgetExhausted if spent else PrivacyError
        self.ranks.agree(error(_itemised("this step is refused, nothing was updated", problems)) if problems else None)
        if self.ranks.size > 1:
            cure = "Have all ranks do the same, at the same steps: settings, schedules, checkpoints, batches"
            self.ranks.alike("what this step begins with", repr(self._beginning()), cure)

    def _beginning(self) -> list[Any]:
        """What ranks that train one model have in common when they take a step; the weights are looked at in the steps
        1, 2, 4, 8, ... and the last one.
        """
        groups = [{name: _plain(value) for name, value in g.items() if name != "params"} for g in self.param_groups]
        step = self.steps_taken + 1
        looked_at = step & (step - 1) == 0 or step == self.plan.steps
        whole = [p.detach() for p in self._trainable().values() if not is_shard(shard_of(p))] if looked_at else []
        return [step, groups, fingerprints(whole)]

    def _spent(self) -> str:
        of_clipper = (
            "the ledger in memory counts for all optimizers of a clipper; tests may give each Ledger(None, plan)"
        )
        return all_spent(self.plan) if self._in_memory is None else f"{all_spent(self.plan)} ({of_clipper})"

    def _problems(self, closure: object) -> list[str]:
        found = []
        if closure is not None:
            found.append("step(closure): a closure would evaluate private data unaccounted; call step() without one")
        if self._in_memory is not None and _memory.get(self.clipper) is not self._in_memory:
            found.append("another DPOptimizer of this clipper was made since with another plan; use that one")
        if any(is_shard(p) for p in self.clipper.parameters.values()):
            found.append(
                "the model is in shards: call step() inside the `with dpfast.ranks.gathered(model)` of its sum"
            )
            return found
        foreign = list(self.clipper.foreign_gradients())
        if foreign:
            found.append(
                f"{listed(foreign)}: the gradient is not what the clipper wrote. Call clipper.backward(losses) in the"
                " place of losses.backward(), use neither GradScaler nor clip_grad_norm_, leave p.grad alone, and"
                " call zero_grad() first"
            )
        return found + self._clip_norm_problems() + self._coverage_problems()

    def _clip_norm_problems(self) -> list[str]:
        if self.clipper.max_grad_norm == self.plan.max_grad_norm:
            return []
        ours, planned = self.clipper.max_grad_norm, self.plan.max_grad_norm
        return [f"the clipper clips to max_grad_norm={ours!r}, the plan says {planned!r}; give both the same number"]

    def _coverage_problems(self) -> list[str]:
        found = []
        parameters = self.clipper.parameters
        covered = {id(shard_of(p)): name for name, p in parameters.items()}
        optimized = {id(p): p for group in self.param_groups for p in group["params"]}
        for key, p in optimized.items():
            name = covered.get(key, f"a parameter of shape {tuple(p.shape)}")
            if p.requires_grad and key not in covered:
                found.append(f"{name} is optimized but not clipped; build the clipper on the model that has it")
            elif not p.requires_grad and p.grad is not None:
                found.append(f"{name} is frozen but has a gradient; set its grad to None, or unfreeze it")
        missing = [name for name, p in parameters.items() if p.requires_grad and id(shard_of(p)) not in optimized]
        if missing:
            are = "is" if len(missing) == 1 else "are"
            found.append(
                f"{listed(missing)} {are} clipped but not optimized; give all to the optimizer, or freeze them"
            )
        return found


_memory: WeakKeyDictionary[Clipper, Ledger] = WeakKeyDictionary()


def _memory_ledger(clipper: Clipper, plan: Plan) -> Ledger:
    """The ledger in memory of all optimizers of ``clipper``: a new optimizer is no new budget."""
    ledger = _memory.get(clipper)
    if ledger is None or (not ledger.charged_steps and ledger.plan.fingerprint() != plan.fingerprint()):
        ledger = _memory[clipper] = Ledger(None, plan)
    return ledger


def not_finite(step: int, noised: Mapping[str, torch.Tensor]) -> DPFastError | None:
    """What is wrong, if anything. It may depend on the data: it tells what noised gradients do."""
    sums = [grad.sum() for grad in noised.values()]  # not finite if anything is, and quickly computed
    if not sums or torch.stack([one.to(sums[0]) for one in sums]).isfinite().all():
        return None
    for name, grad in noised.items():
        if not torch.isfinite(grad).all():
            return DPFastError(
                f"step {step}: the noised gradient of {name} ({grad.dtype}) is not finite; use a wider dtype for the"
                " parameters, or a smaller max_grad_norm"
            )
    return None


def _plain(value: Any) -> Any:
    """Of a setting of an optimizer: the learning rate may be a tensor."""
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _itemised(what: str, problems: list[str]) -> str:
    return f"{what}:\n" + "\n".join(f"  - {problem}" for problem in problems)


def _guard(optimizer: torch.optim.Optimizer, hook: Any) -> None:
    """Make ``hook`` the one guard of the inner optimizer's steps, in place of an earlier DPOptimizer's."""
    earlier = getattr(optimizer, "_dpfast_guard", None)
    if earlier is not None:
        earlier.remove()
    optimizer._dpfast_guard = optimizer.register_step_pre_hook(hook)  # type: ignore[attr-defined]  # noqa: SLF001
