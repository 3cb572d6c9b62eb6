"""How a private step is computed: settings that may change its speed, memory and rounding, and nothing else."""

from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from dpfast.errors import ConfigError

Form = Literal["auto", "gram", "direct", "materialise", "example"]
Dtype = Literal["float32", "bfloat16"]

_MOST_EXAMPLES = 1 << 20  # of a physical batch: more are a mistake


@dataclass(frozen=True, kw_only=True)
class Performance:
    """Settings that cannot move epsilon (those live in ``Plan``).

    form: how per-example norms are found. ``gram``, ``direct`` and ``materialise`` are explained in
        ``dpfast.kernels.linear``; ``example`` runs an ordinary backward pass for a batch of one example (``DPTrainer``
        then makes such batches; a larger batch is computed as ``direct``); ``auto`` chooses a form for each use of a
        parameter (and ``DPTrainer`` takes ``example`` where a physical batch is one).
    microbatch: examples (each with its K augmentations) per physical batch in ``DPTrainer``; None lets it choose.
    memory_budget: bytes of tensors that a step may hold at a time beyond the model; None means no limit. ``DPTrainer``
        makes physical batches that are predicted to fit. In a loop of your own, whose batches are given, it only moves
        the choice of ``auto``: forms whose gradients fit if any do, else those that keep the least.
    device: where ``DPTrainer`` runs the model.
    dtype: what ``DPTrainer`` computes the objective in, by ``torch.autocast``; parameters, sums and noise stay as they
        are. In a loop of your own, that is the loop's.
    compile: whether calls of the model inside ``with clipper`` are compiled (``torch.compile``, once for each batch
        size). A model that is compiled already needs no setting.
    """

    form: Form = "auto"
    microbatch: int | None = None
    memory_budget: int | None = None
    device: str = "cpu"
    dtype: Dtype = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise ConfigError(f"Performance(form={self.form!r}): expected one of {', '.join(get_args(Form))}")
        if self.dtype not in get_args(Dtype):
            raise ConfigError(f"Performance(dtype={self.dtype!r}): expected one of {', '.join(get_args(Dtype))}")
        for name in ("microbatch", "memory_budget"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and float(value) >= 1):
                unit = " of bytes" if name == "memory_budget" else ""
                raise ConfigError(f"Performance({name}={value!r}): expected a positive number{unit} or None")
        if self.microbatch is not None and self.microbatch > _MOST_EXAMPLES:
            raise ConfigError(f"Performance(microbatch={self.microbatch!r}): expected {_MOST_EXAMPLES} or less")
