"""PrivacyEngine: the call shapes of ``opacus.PrivacyEngine``."""

import math
import os
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from dpfast.clipping import GhostClipper
from dpfast.engine.accelerated import bare, batches_of_step
from dpfast.engine.accountant import NAMES, Accountant
from dpfast.engine.criterion import PrivateCriterion
from dpfast.engine.loader import PrivateLoader, steps_of
from dpfast.engine.module import PrivateModule
from dpfast.engine.optimizer import PrivateOptimizer
from dpfast.engine.session import Session
from dpfast.engine.settings import check_module, check_noise, check_settings
from dpfast.errors import ConfigError, DPFastError, PrivacyError
from dpfast.performance import Performance
from dpfast.privacy import Ledger, Plan
from dpfast.privacy.entropy import random_bytes
from dpfast.ranks import Ranks
from dpfast.ranks.ledger import kept_by_first
from dpfast.seeding import reseed

OPEN_STEPS = 10**9  # of a plan without a last step: more than anybody takes

Private = (
    tuple[PrivateModule, PrivateOptimizer, PrivateLoader]
    | tuple[PrivateModule, PrivateOptimizer, PrivateCriterion, PrivateLoader]
)


class PrivacyEngine:
    """Makes a training loop private, as ``opacus.PrivacyEngine`` does.

    For example::

        engine = dpfast.PrivacyEngine()
        model, optimizer, data_loader = engine.make_private(
            module=model, optimizer=optimizer, data_loader=data_loader, noise_multiplier=1.1, max_grad_norm=1.0
        )
        for images, labels in data_loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        print(engine.get_epsilon(delta=1e-5))

    accountant: "prv", "rdp", "gdp" (Opacus' names) or "pld": accounted is always by privacy loss distributions.
    secure_mode: noise and sampling come from the operating system either way; True puts sums and noise on a grid, too
        (``Plan(noise="grid")``), against attacks on floating-point noise.
    ledger: a file that every step is written to before it is taken; by default the ledger is in memory.

    Over several ranks of torch.distributed, all of which run the same loop, a batch is this rank's part of a sample
    that all of them share: ``batch_size`` of the DataLoader is that of all ranks together (with a DistributedSampler,
    or after accelerate's ``prepare``, that of each). ``DistributedDataParallel`` around the module is taken off: the
    optimizer's step adds up what is clipped. Rank 0 keeps the ledger.

    Guarantee: each update of the module's parameters is made of the clipped gradients of one fresh Poisson sample, and
    noise, and is charged before (``DPOptimizer``); ``get_epsilon`` is that of all steps charged. Gradients reach the
    parameters through ``loss.backward()`` on what the private module returned for the loader's batch, once, and in no
    other way: everything else is refused.
    """

    def __init__(
        self,
        *,
        accountant: str = "prv",
        secure_mode: bool = False,
        ledger: str | os.PathLike[str] | None = None,
    ) -> None:
        if accountant not in NAMES:
            raise ConfigError(f"accountant={accountant!r}: expected one of {', '.join(NAMES)}")
        self.accountant = Accountant()
        self.secure_mode = secure_mode
        self._path = ledger
        self._ledgers: list[Ledger] = []
        self._size: int | None = None  # of the data set

    def make_private(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        noise_multiplier: float,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        augmult: int = 1,
        performance: Performance | None = None,
        **others: Any,
    ) -> Private:
        """(module, optimizer, data_loader) made private; with ``grad_sample_mode="ghost"`` (module, optimizer,
        criterion, data_loader). From now on the random numbers of torch, numpy and ``random`` go on from a seed that
        nobody knows, whatever was set before.

        noise_multiplier: the noise's standard deviation over ``max_grad_norm``; 0 clips without noise and gives no
            privacy. There is no last step.
        loss_reduction: what ``backward()`` is called on: the "mean" or the "sum" over the rows of a (physical) batch.
            Losses that are not reduced, ``[B*K]``, may be back-propagated, too. With "sum", an update is not divided by
            the expected batch size.
        augmult: K, the rows that the training loop makes of each example of a batch (row ``i*K + k``).

        With accelerate, module, optimizer and data_loader are what ``accelerator.prepare`` returned, and as many
        batches make one sample as the ``Accelerator`` has ``gradient_accumulation_steps``.

        Raises ``ConfigError``, ``CaptureError`` or ``PrivacyError`` for what cannot be made private.
        """
        check_noise(noise_multiplier)
        budget = {"noise_multiplier": noise_multiplier} if noise_multiplier else {"target_epsilon": math.inf}
        return self._make_private(
            module,
            optimizer,
            criterion,
            data_loader,
            budget={**budget, "steps": OPEN_STEPS},
            max_grad_norm=max_grad_norm,
            augmult=augmult,
            performance=performance,
            settings={
                "batch_first": batch_first,
                "loss_reduction": loss_reduction,
                "poisson_sampling": poisson_sampling,
                "clipping": clipping,
                "noise_generator": noise_generator,
                "grad_sample_mode": grad_sample_mode,
                "wrap_model": wrap_model,
                "rand_on_empty": rand_on_empty,
                "others": others,
            },
        )

    def make_private_with_epsilon(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any = None,
        data_loader: DataLoader[Any],
        target_epsilon: float,
        target_delta: float,
        epochs: int,
        max_grad_norm: float,
        batch_first: bool = True,
        loss_reduction: str = "mean",
        poisson_sampling: bool = True,
        clipping: str = "flat",
        noise_generator: None = None,
        grad_sample_mode: str = "hooks",
        wrap_model: bool = True,
        rand_on_empty: bool = False,
        augmult: int = 1,
        performance: Performance | None = None,
        **others: Any,
    ) -> Private:
        """``make_private`` with the least noise for which ``epochs`` passes over the private loader cost at most
        (``target_epsilon``, ``target_delta``). The step after the last one is refused (``BudgetExhausted``).

        ``target_epsilon=math.inf`` clips without noise.
        """
        if not isinstance(epochs, int) or epochs < 1:
            raise ConfigError(f"epochs={epochs!r}: expected a whole number of passes over the data, 1 or more")
        if len(self.accountant):
            warnings.warn(
                "make_private_with_epsilon: steps are charged to this engine already, and their cost adds to"
                " target_epsilon",
                stacklevel=2,
            )
        return self._make_private(
            module,
            optimizer,
            criterion,
            data_loader,
            budget={
                "target_epsilon": target_epsilon,
                "target_delta": target_delta,
                "steps": epochs * steps_of(data_loader, _batches_of_step(data_loader, optimizer)),
            },
            max_grad_norm=max_grad_norm,
            augmult=augmult,
            performance=performance,
            settings={
                "batch_first": batch_first,
                "loss_reduction": loss_reduction,
                "poisson_sampling": poisson_sampling,
                "clipping": clipping,
                "noise_generator": noise_generator,
                "grad_sample_mode": grad_sample_mode,
                "wrap_model": wrap_model,
                "rand_on_empty": rand_on_empty,
                "others": others,
            },
        )

    def _make_private(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        criterion: Any,
        data_loader: DataLoader[Any],
        *,
        budget: dict[str, Any],
        max_grad_norm: float,
        augmult: int,
        performance: Performance | None,
        settings: dict[str, Any],
    ) -> Private:
        check_settings(max_grad_norm=max_grad_norm, **settings)
        module = module._module if isinstance(module, PrivateModule) else module
        module = module.module if isinstance(module, DistributedDataParallel) else module
        check_module(module)
        clipper = GhostClipper(
            module,
            max_grad_norm=max_grad_norm,
            augmult=augmult,
            clipping=settings["clipping"],
            performance=performance,
        )
        session = Session(clipper, settings["loss_reduction"], _batches_of_step(data_loader, optimizer))
        loader = PrivateLoader(data_loader, session)
        size = len(loader.dataset)  # type: ignore[arg-type]
        self._see_size(size)
        steps = loader.samples.steps
        plan = Plan(
            dataset_size=size,
            expected_batch_size=size / steps,
            max_grad_norm=max_grad_norm,
            noise="grid" if self.secure_mode else "gaussian",
            **{"target_delta": min(1e-5, 0.1 / size), **budget},
        )
        inner = optimizer.optimizer if isinstance(optimizer, PrivateOptimizer) else bare(optimizer)
        ledger = self._ledger(plan)
        session.go_on_from(ledger)
        # What is drawn by place in the batch (dropout, say) is another for all who stand behind an example that is
        # added: if others know the seed, that one example moves the gradients of all of these.
        reseed(random_bytes(72))
        private = PrivateOptimizer(inner, plan, session, ledger, max(1, size // steps))
        self.accountant.begin(plan, ledger, self._path)
        wrapped = PrivateModule(module, session)
        if settings["grad_sample_mode"] == "ghost":
            criterion = nn.CrossEntropyLoss() if criterion is None else criterion
            return wrapped, private, PrivateCriterion(criterion, session.reduction), loader
        return wrapped, private, loader

    def _see_size(self, size: int) -> None:
        if self._size not in (None, size):
            raise PrivacyError(
                f"this engine has made a data set of {self._size} examples private, and now gets one of {size}: its"
                " epsilon is that of one data set; use another PrivacyEngine for another"
            )
        self._size = size

    def _ledger(self, plan: Plan) -> Ledger:
        if self._path is not None and self._ledgers:
            raise PrivacyError(
                "a ledger on disk holds one plan: this engine has begun it. Use another PrivacyEngine with another"
                " ledger for another call of make_private; what both spend adds up"
            )
        ledger = kept_by_first(Ranks.current(), lambda: Ledger(self._path, plan), plan)
        self._ledgers.append(ledger)
        return ledger

    def close(self) -> None:
        """Release the ledger's file for others; no step can be taken afterwards."""
        for ledger in self._ledgers:
            ledger.close()

    def get_epsilon(self, delta: float) -> float:
        """Epsilon at ``delta`` of all steps charged so far."""
        return self.accountant.get_epsilon(delta)

    def save_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: None = None,
        grad_clip_scheduler: None = None,
        checkpoint_dict: dict[str, Any] | None = None,
        module_state_dict_kwargs: dict[str, Any] | None = None,
        torch_save_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Save module, optimizer and accountant by ``torch.save``, beside what ``checkpoint_dict`` holds."""
        _no_schedulers(noise_scheduler, grad_clip_scheduler)
        state = {
            **(checkpoint_dict or {}),
            "module_state_dict": module.state_dict(**(module_state_dict_kwargs or {})),
            "privacy_accountant_state_dict": self.accountant.state_dict(),
        }
        if optimizer is not None:
            state["optimizer_state_dict"] = optimizer.state_dict()
        torch.save(state, path, **(torch_save_kwargs or {}))

    def load_checkpoint(
        self,
        *,
        path: Any,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        noise_scheduler: None = None,
        grad_clip_scheduler: None = None,
        module_load_dict_kwargs: dict[str, Any] | None = None,
        torch_load_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Load what ``save_checkpoint`` saved, after ``make_private``; returns the whole checkpoint.

        Steps that are charged stay charged, whatever the checkpoint says; those that it has and this engine has not
        are charged now. ``torch_load_kwargs={"weights_only": False}`` for objects in ``checkpoint_dict`` that torch
        does not know: that runs code of the file.
        """
        _no_schedulers(noise_scheduler, grad_clip_scheduler)
        checkpoint: dict[str, Any] = torch.load(path, **{"weights_only": True, **(torch_load_kwargs or {})})
        self.accountant.load_state_dict(checkpoint["privacy_accountant_state_dict"])
        module.load_state_dict(checkpoint["module_state_dict"], **(module_load_dict_kwargs or {}))
        state = checkpoint.get("optimizer_state_dict", {})
        if optimizer is not None and state:
            optimizer.load_state_dict(state)
        elif (optimizer is not None) != bool(state):
            have, lack = ("an optimizer", "the checkpoint") if optimizer is not None else ("the checkpoint", "the call")
            warnings.warn(f"load_checkpoint: {have} has an optimizer's state, {lack} has none", stacklevel=2)
        return checkpoint

    def is_compatible(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,  # noqa: ARG002  # Opacus' signature
        data_loader: DataLoader[Any] | None = None,  # noqa: ARG002
    ) -> bool:
        """Whether nothing is known against the module before it runs."""
        try:
            self.validate(module=module)
        except DPFastError:
            return False
        return True

    def validate(
        self,
        *,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,  # noqa: ARG002  # Opacus' signature
        data_loader: DataLoader[Any] | None = None,  # noqa: ARG002
    ) -> None:
        """Raises ``CaptureError`` for a module that is known to mix examples. What else does is seen when it runs."""
        check_module(module)
        GhostClipper(module, max_grad_norm=1.0)


def _batches_of_step(loader: DataLoader[Any], optimizer: torch.optim.Optimizer) -> int:
    """Of the loader, for each update."""
    return loader.session.batches if isinstance(loader, PrivateLoader) else batches_of_step(optimizer)


def _no_schedulers(*schedulers: object) -> None:
    if any(scheduler is not None for scheduler in schedulers):
        raise ConfigError(
            "schedulers of noise and clip norm are not supported: a plan has one of each; leave them out (schedulers of"
            " the learning rate are saved in checkpoint_dict)"
        )
