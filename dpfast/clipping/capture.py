"""Intercept every use of a trainable parameter, whatever module or function it happens in.

For the length of one step a ``TorchFunctionMode`` sees each torch call. Tensors fall in three kinds:

- *tracked*: trainable parameters, and what is computed from them and constants alone (a scaled or standardised
  weight, a view, a concatenation). Derived tensors keep their graph, through which per-example gradients are pulled
  back to the parameters (``accumulate``).
- *constant*: buffers, frozen parameters, whole-number ranges and the like made during the step, and what is computed
  from constants alone. A tensor taken for a constant by mistake costs speed, never exactness: the pull-back is exact.
- *data*: everything else.

A call with tracked and data arguments is a *use*: it runs with the tracked arguments detached, so that autograd
computes input gradients as always but no weight gradient, and a ``Tap`` on its output hands (a, g) to the tape.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dpfast.clipping.fallback import fallback_use
from dpfast.clipping.problems import Problem, listed
from dpfast.clipping.rules import MIXES_ROWS, RULES
from dpfast.clipping.tape import Tape, Use
from dpfast.clipping.trees import function_name, replace_tensors, tensors_in

FACTORIES = frozenset(
    {
        torch.arange,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.eye,
        torch.linspace,
        torch.logspace,
        torch.tensor,
    }
    | {torch.scalar_tensor, torch.tril_indices, torch.triu_indices, torch.empty}
)
RANDOM = frozenset(
    {torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.rand_like, torch.randn_like}
    | {torch.randint_like, torch.dropout, nn.functional.dropout}
)


@dataclass(frozen=True)
class Tracked:
    """A tracked tensor, and the names of the parameters it is made of."""

    tensor: Tensor
    names: tuple[str, ...]


class Capture(TorchFunctionMode):
    """Active inside ``with clipper``; writes uses and problems to its ``tape``.

    ``detach``, set before the first use: whether uses run with detached parameters. Not for a batch of one example,
    whose gradient is the ordinary one: autograd computes it, and the capture only looks for what is refused.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], constants: Iterable[Tensor]) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        self.constants = WeakTensorKeyDictionary(dict.fromkeys(constants, True))
        self.restart()

    def restart(self) -> None:
        """Forget the last forward pass: a tape serves one backward pass."""
        self.tape = Tape(torch.zeros((), requires_grad=True))
        self.started, self.detach = False, True
        self.tracked = {id(p): Tracked(p, (name,)) for name, p in self.parameters.items()}
        self.derived: list[Tracked] = []

    def is_tracked(self, value: Any) -> bool:
        return isinstance(value, Tensor) and id(value) in self.tracked

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        tracked = [self.tracked[id(t)] for t in tensors if id(t) in self.tracked]
        if tracked and torch.is_grad_enabled():
            data = [t for t in tensors if id(t) not in self.tracked and t not in self.constants]
            if data:
                return self._use(func, args, kwargs, tracked)
            return self._derive(func, args, kwargs, tracked)
        if func in MIXES_ROWS:
            return self._guarded(func, args, kwargs)
        output = func(*args, **kwargs)
        self._note_constants(func, tensors, output)
        return output

    def _derive(self, func: Any, args: Any, kwargs: Any, sources: list[Tracked]) -> Any:
        """Run a call on tracked tensors and constants; what requires grad among its outputs is tracked."""
        output = func(*args, **kwargs)
        names = tuple(dict.fromkeys(name for source in sources for name in source.names))
        for tensor in tensors_in(output):
            if tensor.requires_grad and id(tensor) not in self.tracked:
                derived = Tracked(tensor, names)
                self.tracked[id(tensor)] = derived
                self.derived.append(derived)  # kept alive, so that its id stays its own
        return output

    def _use(self, func: Any, args: Any, kwargs: Any, tracked: list[Tracked]) -> Any:
        names = tuple(dict.fromkeys(name for source in tracked for name in source.names))
        use = self._rule(func, args, kwargs)
        general = use is None
        if use is None:
            use = fallback_use(func, args, kwargs, self.is_tracked, names=names)
        if isinstance(use, Problem):
            self.tape.problems.append(Problem(names, f"{function_name(func)}: {use.what}", use.cure))
            return self._harmless(func, args, kwargs)
        random_state = _random_state() if general else None
        output = self._run(func, args, kwargs)
        if output is None:
            self.tape.problems.append(
                Problem(
                    names,
                    f"{function_name(func)} writes a trainable parameter into another tensor",
                    "write it with an operation that returns a tensor (torch.where instead of indexed assignment)",
                )
            )
        if random_state is not None:
            self._check_fallback(func, names, random_state)
        targets = [id(source.tensor) for source in tracked]  # twice in one call is used twice
        if isinstance(output, Tensor):
            return self._attach(output, use, func, names, targets)
        if isinstance(output, tuple):  # each result is a use of its own: gradients add up
            uses = [
                fallback_use(func, args, kwargs, self.is_tracked, names=names, result=i) for i in range(len(output))
            ]
            results = zip(output, uses, strict=True)
            return type(output)([self._attach(o, cast(Use, u), func, names, targets) for o, u in results])
        return output

    def _attach(self, output: Any, use: Use, func: Any, names: tuple[str, ...], targets: list[int]) -> Any:
        if not self.detach or not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        return self.tape.attach(output, use, self.tape.site(function_name(func), names), targets)

    def _rule(self, func: Any, args: Any, kwargs: Any) -> Use | Problem | None:
        rule = RULES.get(func)
        if rule is None:
            return None
        try:
            return rule(self.is_tracked, *args, **kwargs)
        except TypeError:  # an overload whose arguments the rule does not know
            return None

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not self.detach:
            return func(*args, **kwargs)

        def detached(t: Tensor) -> Tensor:
            return t.detach() if id(t) in self.tracked else t

        return func(*replace_tensors(args, detached), **replace_tensors(kwargs, detached))

    def _guarded(self, func: Any, args: Any, kwargs: Any) -> Any:
        problem = RULES[func](self.is_tracked, *args, **kwargs)
        if isinstance(problem, Problem):
            self.tape.problems.append(problem)
            return self._harmless(func, args, kwargs)
        return func(*args, **kwargs)

    def _harmless(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Let the forward pass go on after a problem, so that all problems are found, without touching any state."""
        if func in MIXES_ROWS:
            return args[0].clone()

        def copied(t: Tensor) -> Tensor:
            return t.detach().clone() if id(t) in self.tracked else t

        return func(*replace_tensors(args, copied), **replace_tensors(kwargs, copied))

    def _note_constants(self, func: Any, tensors: list[Tensor], output: Any) -> None:
        made_from_constants = all(t in self.constants for t in tensors) if tensors else func in FACTORIES
        for t in tensors_in(output):
            if made_from_constants and func not in RANDOM:
                self.constants[t] = True
            elif t in self.constants:  # data written into it in place
                del self.constants[t]

    def _check_fallback(self, func: Any, names: tuple[str, ...], random_state: Tensor) -> None:
        """The fallback runs the call again: it must not be random. Say once that it is slow."""
        if not torch.equal(random_state, _random_state()):
            self.tape.problems.append(
                Problem(
                    names,
                    f"{function_name(func)} draws random numbers, and dpfast has no rule for it",
                    "move the dropout out of the call, or set its rate to 0",
                )
            )
        warnings.warn(
            f"dpfast has no rule for {function_name(func)} with {listed(names)}: its per-example gradients come from a"
            " vmapped vector-Jacobian product, which is correct and slow",
            stacklevel=4,
        )


def _random_state() -> Tensor:
    """Of the CPU's generator and, where there are any in use, of the current GPU's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)
