"""Every way in which a DP-SGD is known to break, as a bug that can be planted in dpfast, and who notices it.

``python tests/mutants.py`` writes the table of docs/mutants.md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import plants
from plants import Plant, anew, factors, noised, norms_of_convolutions, norms_of_linear_maps, scaled, swap

PAGE = Path(__file__).resolve().parents[1] / "docs" / "mutants.md"


@dataclass(frozen=True)
class Mutant:
    """seen_in: a library, with the number of its public issue where there is one, or "textbook". catcher: one of
    ``catchers``, by name.
    """

    name: str
    seen_in: str
    catcher: str
    plant: Plant


MUTANTS = (
    # What an example may weigh
    Mutant("no clipping", "textbook", "sensitivity", factors(lambda sq, c, w: torch.ones_like(sq))),
    Mutant(
        "max_grad_norm is ignored", "Opacus #664", "sensitivity", factors(lambda sq, c, w: (1 / sq.sqrt()).clamp(max=1))
    ),
    Mutant("every layer is clipped to C by itself", "FlashDP", "sensitivity", anew(plants.by_layer)),
    Mutant(
        "the factor of a norm that is not a number stays 1",
        "Opacus, fastDP",
        "sensitivity",
        factors(lambda sq, c, w: torch.where(sq.isfinite(), w, 1.0)),
    ),
    Mutant(
        "every augmentation is clipped as an example of its own",
        "textbook",
        "sensitivity",
        swap(("clipping.clipper.GhostClipper.augmult", lambda _: lambda self: 1)),
    ),
    Mutant(
        "norms of the mean over K evaluations, but their sum is taken",
        "Opacus #461",
        "sensitivity",
        plants.written(lambda clipper: clipper.augmult),
    ),
    Mutant(
        "the sum over K evaluations in the place of their mean",
        "Opacus #461",
        "definition",
        swap(("clipping.passes.Pass._backward", plants.summed_losses)),
    ),
    # Norms
    Mutant(
        "norms leave out a layer",
        "textbook",
        "sensitivity",
        norms_of_convolutions(lambda sq, a, g, spec, b: sq if spec.groups > 1 else 0 * sq),
    ),
    Mutant(
        "norms leave out a bias", "textbook", "sensitivity", swap(("clipping.terms.Joined.sq", plants.without_a_bias))
    ),
    Mutant(
        "norms of a grouped convolution are of its first group",
        "fastDP",
        "sensitivity",
        norms_of_convolutions(plants.of_first_group),
    ),
    Mutant(
        "norms of a convolution take channels_last memory for contiguous",
        "Opacus 1.6.0",
        "sensitivity",
        norms_of_convolutions(plants.as_if_contiguous),
    ),
    Mutant(
        "the norm of a bias of 3-D inputs is of its positions apart",
        "Opacus #751",
        "sensitivity",
        anew(plants.bias_by_position),
    ),
    Mutant(
        "a linear layer has no norm where its input is 4-D",
        "Opacus",
        "sensitivity",
        norms_of_linear_maps(lambda sq, a, *g: 0 * sq if a.shape[2] == 3 else sq),
    ),
    Mutant(
        "the norm of a module called twice is of its last call",
        "fastDP, private_vision",
        "sensitivity",
        anew(lambda: plants.of_uses(lambda before, sq: sq)),
    ),
    Mutant(
        "the squared norms of two calls of a module are added up",
        "textbook",
        "sensitivity",
        anew(lambda: plants.of_uses(lambda before, sq: sq if before is None else before + sq)),
    ),
    Mutant(
        "the gradient of a module called twice is of one call",
        "fastDP, private_vision",
        "definition",
        swap(("clipping.accumulate.Accumulation._add_partial", plants.overwritten)),
    ),
    Mutant("norms are those of the step before", "textbook", "sensitivity", anew(plants.of_last_call)),
    Mutant(
        "norms are accumulated twice, as by an autotuner's first call",
        "FlashNorm",
        "definition",
        norms_of_convolutions(lambda sq, *_: 2 * sq),
    ),
    Mutant(
        "norms are accumulated into memory that was not cleared",
        "FlashNorm, FlashDP",
        "definition",
        norms_of_convolutions(lambda sq, a, *_: sq + a.flatten()[: len(sq)]),
    ),
    Mutant(
        "a Gram that rounding turns negative counts as 0",
        "Opacus, fastDP",
        "sensitivity",
        swap(("kernels.linear.gram_sq_norms", plants.rough_gram)),
    ),
    Mutant(
        "the root of a Gram that rounding turns negative is taken",
        "Opacus, fastDP",
        "sensitivity",
        swap(
            ("kernels.linear.gram_sq_norms", plants.root_of_gram),
            ("clipping.rule.clip_factors", lambda _: lambda sq, c, **_: (c / sq.sqrt()).clamp(max=1)),
            ("kernels.linear.weighted_sum", plants.weighted_at_once),
        ),
    ),
    # Sums
    Mutant("a physical batch is added twice", "Opacus #707", "sensitivity", plants.written(lambda clipper: 2)),
    Mutant(
        "a physical batch is run again after it was added",
        "textbook",
        "canaries",
        swap(("trainer.DPTrainer._run", plants.twice)),
    ),
    Mutant(
        "sum and noise are divided by the number drawn",
        "several",
        "whole_step",
        anew(lambda: plants.by_number_drawn(lambda real, n, x, scale, divisor: real(x, scale, n))),
    ),
    Mutant(
        "the mean over those drawn, with noise for the expected number",
        "several",
        "whole_step",
        anew(lambda: plants.by_number_drawn(lambda real, n, x, scale, divisor: real(x * divisor / n, scale, divisor))),
    ),
    Mutant(
        "noise is scaled by the number drawn",
        "several",
        "whole_step",
        anew(lambda: plants.by_number_drawn(lambda real, n, x, scale, divisor: real(x, scale * n / divisor, divisor))),
    ),
    Mutant("sums are not cleared after a step", "textbook", "canaries", anew(plants.kept_sums)),
    # Noise
    Mutant("no noise", "textbook", "noise", noised(lambda real, x, scale, divisor: x / divisor)),
    Mutant("no noise on a parameter", "textbook", "noise", anew(plants.all_but_every_second)),
    Mutant(
        "no noise on an empty batch",
        "Opacus #164",
        "noise",
        noised(lambda real, x, scale, divisor: real(x, scale * bool(x.any()), divisor)),
    ),
    Mutant("noise for a clip norm of 1", "textbook", "noise", scaled(lambda plan: plan.noise_multiplier)),
    Mutant("noise for a multiplier of 1", "textbook", "noise", scaled(lambda plan: plan.max_grad_norm)),
    Mutant(
        "the variance is taken for the deviation",
        "textbook",
        "noise",
        scaled(lambda plan: (plan.noise_multiplier * plan.max_grad_norm) ** 2),
    ),
    Mutant(
        "the scale depends on whether there is a seed",
        "fastDP",
        "noise",
        noised(lambda real, x, scale, divisor: real(x, scale / (1 + (torch.initial_seed() == 0)), divisor)),
    ),
    Mutant("two steps share their noise", "textbook", "noise", anew(lambda: plants.known_noise(lambda n, x: n % 2))),
    Mutant(
        "parameters of one shape share their noise",
        "textbook",
        "noise",
        anew(lambda: plants.known_noise(lambda n, x: (n // 2, x.shape))),
    ),
    Mutant("noise is drawn right after manual_seed(0)", "DPImageBench", "noise", noised(plants.seeded_noise)),
    Mutant("trainings of one seed share their noise", "Opacus (FSDP)", "noise", noised(plants.global_noise)),
    Mutant("nan_to_num of gradient plus noise", "fastDP", "whole_step", plants.erased_noise()),
    Mutant(
        "the last bits of noise tell what it was added to",
        "most (Mironov 2012)",
        "last_bits",
        noised(lambda real, *of: real(*of)),
    ),
    Mutant(
        "noise on a grid is added to sums beside it",
        "textbook",
        "last_bits",
        swap(("optimizer.noised", plants.noise_on_grid_alone)),
    ),
    # Steps and samples
    Mutant(
        "no step on an empty batch",
        "Opacus #522",
        "noise",
        swap(("optimizer.DPOptimizer.step", plants.only_with_gradients)),
    ),
    Mutant(
        "an empty batch ends the training",
        "Opacus #161",
        "noise",
        swap(("trainer.DPTrainer._microbatches", plants.no_empty_batches)),
    ),
    Mutant("shuffled epochs in the place of Poisson samples", "most training loops", "canaries", anew(plants.epochs)),
    Mutant(
        "samples of one size in the place of Poisson samples",
        "most training loops",
        "canaries",
        anew(plants.of_one_size),
    ),
    Mutant(
        "a higher sample rate than planned",
        "textbook",
        "canaries",
        swap(("trainer.poisson_sample", lambda real: lambda size, rate: real(size, 1.2 * rate))),
    ),
    Mutant(
        "samples with replacement in the place of Poisson samples",
        "textbook",
        "canaries",
        anew(plants.with_replacement),
    ),
    # Accounts
    Mutant("accounting with another batch size", "several", "accounting", plants.accounted(sample_rate=0.25)),
    Mutant(
        "delta is replaced", "DPImageBench", "accounting", swap(("privacy.plan.Plan.__post_init__", plants.other_delta))
    ),
    Mutant(
        "exchanged examples are accounted as added ones",
        "textbook",
        "accounting",
        plants.accounted(neighboring="add_remove"),
    ),
    Mutant("other releases are left out of epsilon", "textbook", "accounting", plants.accounted(others=())),
    Mutant(
        "the ledger is a step behind",
        "textbook",
        "accounting",
        swap(("privacy.ledger.Ledger.epsilon", lambda _: lambda self: self.plan.epsilon(self.charged_steps - 1))),
    ),
    Mutant(
        "a step is charged after its update",
        "textbook",
        "accounting",
        swap(("optimizer.DPOptimizer._update", plants.charged_late)),
    ),
    Mutant(
        "a step beyond the plan",
        "textbook",
        "accounting",
        swap(
            ("optimizer.DPOptimizer._refuse", lambda _: lambda self, closure: None),
            ("privacy.ledger.Ledger.charge", plants.unlimited),
        ),
    ),
    Mutant(
        "a noised choice without noise",
        "DPImageBench",
        "choice",
        swap(("privacy.entropy.noised", lambda _: lambda x, scale, divisor: x / divisor)),
    ),
    Mutant(
        "a noised choice is not charged", "textbook", "choice", plants.silent("privacy.ledger.Ledger.charge_release")
    ),
    Mutant("a score on private images is shown, unaccounted", "DPDM and others", "silence", anew(plants.score_shown)),
    Mutant(
        "a resumed training repeats its noise",
        "textbook",
        "resumption",
        anew(lambda: plants.known_noise(lambda n, x: n, per_process=True)),
    ),
    Mutant(
        "a resumed training takes lost steps again, unaccounted",
        "textbook",
        "resumption",
        swap(("trainer.DPTrainer._ledger", plants.ledger_of_checkpoint)),
    ),
    Mutant(
        "a resumed training does not tell of lost steps",
        "textbook",
        "resumption",
        swap(("trainer.DPTrainer._resume", plants.uncounted)),
    ),
    # What should have been refused
    Mutant(
        "BatchNorm is let through",
        "most",
        "refusals",
        swap(
            ("clipping.capture.Capture._guarded", lambda _: lambda self, func, args, kwargs: func(*args, **kwargs)),
            ("clipping.calls.ModelCalls.show", lambda _: lambda self, rows: ""),
            ("clipping.ownership.weigh", plants.unweighed),
        ),
    ),
    Mutant(
        "a loss that mixes examples is let through",
        "most",
        "refusals",
        swap(("clipping.ownership.weigh", plants.unweighed)),
    ),
    Mutant(
        "losses divided by their number are let through", "most", "refusals", plants.silent("trainer.show_objective")
    ),
    Mutant(
        "a gradient that was not clipped is used",
        "textbook",
        "refusals",
        plants.silent("clipping.clipper.GhostClipper.foreign_gradients"),
    ),
    Mutant(
        "parameters that were replaced since are trained on",
        "Opacus #820",
        "refusals",
        plants.silent("optimizer.DPOptimizer._coverage_problems"),
    ),
    Mutant(
        "a clip norm that is not the plan's",
        "Opacus #664",
        "refusals",
        plants.silent("optimizer.DPOptimizer._clip_norm_problems"),
    ),
)


def table() -> str:
    rows = [f"| {one.name} | {one.seen_in} | `{one.catcher}` |" for one in MUTANTS]
    return "\n".join(["| bug | seen in | caught by |", "|---|---|---|", *rows])


if __name__ == "__main__":
    sys.path.append(str(PAGE.parents[1]))  # the folder ``benchmarks`` is not installed
    from benchmarks.results import write_between_markers

    write_between_markers(PAGE, "mutants", table())
