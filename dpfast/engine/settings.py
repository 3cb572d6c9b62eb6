"""What an Opacus script may ask for that is not to be had, or is so anyway: refused with the cure."""

import math
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel

from dpfast.errors import CaptureError, ConfigError

_MODES = ("hooks", "functorch", "ew", "ghost")
_NORMS = (nn.modules.batchnorm._BatchNorm,)  # all of them, SyncBatchNorm included


def check_settings(
    *,
    max_grad_norm: Any,
    batch_first: bool,
    loss_reduction: str,
    poisson_sampling: bool,
    clipping: str,
    noise_generator: Any,
    grad_sample_mode: str,
    wrap_model: bool,
    rand_on_empty: bool,
    others: dict[str, Any],
) -> None:
    """Raises ``ConfigError`` with every setting that cannot be used, and what to do instead."""
    problems = []

    def check(good: bool, problem: str) -> None:
        if not good:
            problems.append(problem)

    number = isinstance(max_grad_norm, (int, float)) and not isinstance(max_grad_norm, bool)
    check(number, "max_grad_norm: one number, for all layers together; norms layer by layer are not supported")
    check(
        clipping in ("flat", "automatic"),
        f'clipping={clipping!r}: expected "flat" (or dpfast\'s "automatic"); per-layer and adaptive clipping are not'
        " supported: leave it out",
    )
    check(
        poisson_sampling,
        "poisson_sampling=False: epsilon is that of Poisson samples, and shuffled batches have another; leave it out",
    )
    check(
        noise_generator is None,
        "noise_generator: noise comes from the operating system, and no seed reaches it; leave it out (in tests:"
        " dpfast.testing.injected_entropy)",
    )
    check(batch_first, "batch_first=False: expected rows along the first dimension; transpose inside the module")
    check(loss_reduction in ("mean", "sum"), f'loss_reduction={loss_reduction!r}: expected "mean" or "sum"')
    check(
        grad_sample_mode in _MODES,
        f"grad_sample_mode={grad_sample_mode!r}: expected one of {', '.join(_MODES)} (dpfast chooses how to compute)",
    )
    check(
        wrap_model,
        "wrap_model=False: the module that make_private returns is what to call; it has the attributes of yours",
    )
    check(not rand_on_empty, "rand_on_empty=True: empty batches have 0 rows, and the model copes; leave it out")
    problems.extend(f"{name}: not a setting of dpfast's; leave it out" for name in others)
    if problems:
        raise ConfigError("make_private: " + "; ".join(problems))


def check_noise(noise_multiplier: Any) -> None:
    """Raises ``ConfigError``."""
    number = isinstance(noise_multiplier, (int, float)) and not isinstance(noise_multiplier, bool)
    if not number or not 0 <= noise_multiplier < math.inf:
        raise ConfigError(f"noise_multiplier={noise_multiplier!r}: expected a number, 0 (no privacy) or more")


def check_module(module: nn.Module) -> None:
    """Raises ``CaptureError`` for modules that cannot be trained privately, with what to do instead."""
    if isinstance(module, DataParallel):
        raise CaptureError(
            "a DataParallel cuts the batch between devices in one process: give make_private the module inside of it"
            " (model.module), and start a process for each device with torchrun"
        )
    problems = []
    norms = [
        name
        for name, m in module.named_modules()
        if isinstance(m, _NORMS) and any(p.requires_grad for p in m.parameters()) | m.training
    ]
    if norms:
        problems.append(
            f"batch norm ({', '.join(norms[:5])}{', ...' * (len(norms) > 5)}) takes statistics over the examples of a"
            " batch: replace it by nn.GroupNorm before the optimizer is made (opacus.validators.ModuleValidator.fix"
            " does), or freeze it in eval mode"
        )
    recurrent = [name for name, m in module.named_modules() if type(m) in (nn.LSTM, nn.GRU, nn.RNN)]
    if recurrent:
        problems.append(
            f"{', '.join(recurrent[:5])}: nn.LSTM, nn.GRU and nn.RNN compute all time steps in one call, which hides"
            " the weights' gradients by example; use the cells (nn.LSTMCell in a loop), or opacus.layers.DPLSTM, DPGRU,"
            " DPRNN"
        )
    if problems:
        raise CaptureError("this module cannot be trained privately: " + "; ".join(problems))
