"""PrivateOptimizer: a DPOptimizer that makes one step of each batch of the private loader."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpfast.engine.outputs import Reduction
from dpfast.engine.session import Session
from dpfast.errors import ConfigError, PrivacyError
from dpfast.optimizer import DPOptimizer
from dpfast.privacy import Ledger, Plan


class PrivateOptimizer(DPOptimizer):
    """The user's optimizer, with noise, a ledger, and the attributes of Opacus' ``DPOptimizer``.

    expected_batch_size: by which a step divides the noised sum where losses are means (``loss_reduction="mean"``).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        session: Session,
        ledger: Ledger,
        expected_batch_size: int,
    ) -> None:
        super().__init__(optimizer, plan, session.clipper, ledger)
        self.session = session
        guards = [p.register_post_accumulate_grad_hook(_Guard(name)) for name, p in session.clipper.parameters.items()]
        for guard in guards:
            weakref.finalize(self, guard.remove)
        self.expected_batch_size = expected_batch_size
        self._hooks: list[Callable[[PrivateOptimizer], None]] = []

    @property
    def original_optimizer(self) -> torch.optim.Optimizer:
        """The user's."""
        return self.optimizer

    @property
    def noise_multiplier(self) -> float:
        """The plan's."""
        return self.plan.noise_multiplier

    @property
    def max_grad_norm(self) -> float:
        """The plan's."""
        return self.plan.max_grad_norm

    @property
    def loss_reduction(self) -> Reduction:
        """How losses are reduced over the rows of a physical batch."""
        return self.session.reduction

    @property
    def accumulated_iterations(self) -> int:
        """Samples in a step: always one."""
        return 1

    def attach_step_hook(self, fn: "Callable[[PrivateOptimizer], None]") -> None:
        """Have ``fn(optimizer)`` called after each update."""
        self._hooks.append(fn)

    def signal_skip_step(self, do_skip: bool = True) -> None:  # noqa: ARG002  # Opacus' signature
        """Refused: which steps make an update is known from the loader."""
        raise ConfigError(
            "signal_skip_step: the private loader knows itself where a sample ends; use BatchMemoryManager from"
            " dpfast.engine in the place of Opacus'"
        )

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of a sample; nothing before its last physical batch.

        Raises ``PrivacyError`` unless exactly one batch was drawn and back-propagated since the last step, and whatever
        ``DPOptimizer.step`` raises.
        """
        if closure is None and not self._begin():
            return
        charged = self.steps_taken
        try:
            super().step(closure)
        finally:
            self.session.end_step(charged=self.steps_taken > charged)
        if self.steps_taken == self.plan.steps - 1:
            self.session.check_next()
        for hook in self._hooks:
            hook(self)

    def _begin(self) -> bool:
        """As ``Session.begin_step`` has it; what one rank refuses, all do."""
        try:
            self.session.check_settings_of(self.param_groups)
            return self.session.begin_step()
        except PrivacyError as error:
            self.ranks.agree(error)
            raise

    def _beginning(self) -> list[Any]:
        return [self.session.samples, *super()._beginning()]

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002  # torch's signature
        """Clear the sums, except between the physical batches of one sample."""
        self.session.zero_grad()

    def _spent(self) -> str:
        return (
            f"all {self.plan.steps} planned steps are spent: epochs= of make_private_with_epsilon passes over the"
            " private loader, those that were lost by an interruption included. More are another call with more epochs,"
            " and more noise, from the beginning"
        )

    def _divisor(self) -> float:
        return self.expected_batch_size if self.loss_reduction == "mean" else 1.0


class _Guard:
    """A hook that runs where autograd itself gives a parameter a gradient: the clipper never does it that way."""

    refuses = True  # for the clipper, which is suspicious of other hooks

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, parameter: Tensor) -> None:
        parameter.grad = None
        raise PrivacyError(
            f"a backward pass reached {self._name} of the private model by another way than loss.backward() on what the"
            " model returned for the loader's batch: that gradient is neither clipped nor noised, and was dropped. For"
            " gradients of inputs alone use torch.autograd.grad(value, inputs), to train without privacy a copy of the"
            " model (copy.deepcopy)"
        )
