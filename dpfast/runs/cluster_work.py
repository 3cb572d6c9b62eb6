"""What a recipe has to do, and what one GPU is predicted to take for the parts of it that GPUs share."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpfast.clipping.planner import Total
from dpfast.physical import Size
from dpfast.privacy.plan import Plan
from dpfast.recipes.schema import Recipe


@dataclass(frozen=True)
class Work:
    """What is to be done, and what one GPU takes for parts of it.

    size: of a physical batch on one GPU; given: whether the recipe says so, or several GPUs have smaller ones where the
    expected batch has no more images for each. private, ordinary: a pass of it, of ``rows`` rows, and the ordinary step
    of as many. activations: bytes at the peak of a physical batch, beyond the model. tensors:
    trained parameters; image_bytes: of an example. pretrain_steps, pretrain_batch: of pre-training, 0 for none.
    sampled: images drawn, in files of ``shard_size``, in ``calls`` of the model each (guidance counted); sets: how many
    times (of the private and of the public model).
    """

    dataset_size: int
    expected_batch_size: float
    steps: int
    augmult: int
    size: Size
    rows: int
    private: Total
    ordinary: Total
    activations: int
    parameters: int
    trained: int
    tensors: int
    image_bytes: int
    pretrain_steps: int
    pretrain_batch: int
    sampled: int
    shard_size: int
    calls: int
    sets: int = 2
    given: bool = False

    def examples_on(self, ranks: int) -> int:
        """Of a full physical batch, where so many ranks share the work, as ``DPTrainer`` has it."""
        few = math.ceil(self.expected_batch_size / ranks)
        return self.size.examples if self.given else min(self.size.examples, few)

    def physical_seconds(self, examples: int) -> float:
        """Of a physical batch, all passes of it: in proportion to its rows, but no less than Python's calls take."""
        return math.ceil(self.augmult / self.size.rows) * _scaled(self.private, examples / self.size.examples)

    def rounds(self, ranks: int) -> float:
        """Physical batches of the rank that has most in a step, expected: E[ceil(S / (m R))] of Poisson samples S."""
        together = self.examples_on(ranks) * ranks
        return float(sum(share * -(-size // together) for size, share in self._samples()))

    def computing(self, ranks: int) -> float:
        """Seconds until all physical batches of a step are done, expected.

        Full ones take equally long and whoever is free takes the next: R at a time. The last, smaller one is taken with
        others, or is a round by itself, of the size that it is padded to.
        """
        full = self.examples_on(ranks)
        whole = self.physical_seconds(full)
        seconds = 0.0
        for size, share in self._samples():
            batches, rest = divmod(size, full)
            rounds, more = divmod(batches, ranks)
            last = whole if more else self.physical_seconds(padded(rest, full)) if rest else 0.0
            seconds += share * (rounds * whole + last)
        return seconds

    def _samples(self) -> list[tuple[int, float]]:
        """Sizes of Poisson samples, and how likely they are; those left out are so by less than 1e-12 together."""
        from scipy.stats import binom

        of = binom(self.dataset_size, self.expected_batch_size / self.dataset_size)
        sizes = range(int(of.ppf(5e-13)), int(of.isf(5e-13)) + 1)
        return list(zip(sizes, of.pmf(sizes).tolist(), strict=True))

    def forward_and_backward(self, rows: int) -> float:
        """Seconds of an ordinary step of so many rows."""
        return _scaled(self.ordinary, rows / self.rows)


def padded(examples: int, full: int) -> int:
    """Of what a physical batch of so many examples is padded to: halves of a full one, down to an eighth."""
    size = full
    while size // 2 >= max(examples, full // 8, 1):
        size //= 2
    return size


def _scaled(total: Total, share: float) -> float:
    """Seconds of a share of its rows: the GPU's work in proportion, Python's calls whole."""
    return max(total.working * share, total.calling)


def work_of(recipe: Recipe, device: str) -> Work:
    """The work of a recipe, a physical batch of it predicted for one GPU ``device``."""
    from dpfast.runs import build, inputs
    from dpfast.runs.foresee import physical_batch, trainer_to_plan

    recipe = inputs.planned(recipe)
    private = inputs.private_data(recipe)
    plan: Plan = build.plan(recipe, len(private))
    trainer = trainer_to_plan(recipe, private, plan)
    size, step = physical_batch(recipe, trainer, private, device)
    parameters = list(trainer.model.parameters())
    trained = [p.numel() for p in parameters if p.requires_grad]
    return Work(
        dataset_size=plan.dataset_size,
        expected_batch_size=plan.expected_batch_size,
        steps=plan.steps,
        augmult=trainer.augmult,
        size=size,
        rows=size.examples * size.rows,
        private=step.private,
        ordinary=step.ordinary,
        activations=step.peak,
        parameters=sum(p.numel() for p in parameters),
        trained=sum(trained),
        tensors=len(trained),
        image_bytes=math.prod(private.image_shape),
        pretrain_steps=recipe.pretrain.steps,
        pretrain_batch=recipe.pretrain.batch_size,
        sampled=recipe.sample.count,
        shard_size=recipe.sample.shard_size,
        calls=build.sampling(recipe).calls * (1 if recipe.sample.guidance == 1 else 2),
        given=recipe.performance.microbatch is not None or recipe.performance.form == "example",
    )
