"""The page of ``dpfast plan RECIPE --nodes N --gpus-per-node M``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from dpfast.progress import duration
from dpfast.runs.cluster import USED, ClusterPlan, Way
from dpfast.tables import columns


def page(plan: ClusterPlan) -> Iterator[str]:
    """Its lines."""
    cluster, kind = plan.cluster, plan.cluster.device.upper()
    nodes = f"{cluster.nodes} node{'s' * (cluster.nodes > 1)}"
    where = f"{plan.name} on {nodes} of {cluster.gpus_per_node} {kind}, {cluster.ranks} in all"
    yield f"PREDICTED, nothing was measured: {where}."
    yield ""
    yield from columns(_planned(plan), words=(0, 1))
    yield ""
    yield from columns(_compared(plan), words=(0,))
    yield ""
    yield _verdict(plan)
    yield from (f"Warning: {warning}." for warning in plan.warnings())
    yield "\nAssumptions, none of them measured:"
    yield from (f"- {line}" for line in assumptions(plan))


def _planned(plan: ClusterPlan) -> Iterator[tuple[str, str]]:
    work, ranks = plan.work, plan.cluster.ranks
    examples = work.examples_on(ranks)
    expected, passes = f"{work.expected_batch_size:,.0f}, more or less {plan.deviation:,.0f} (Poisson)", ""
    if work.size.rows < work.augmult:
        passes = f", {work.size.rows} of them at a time"
    yield "private images", f"{work.dataset_size:,}, of which a step takes {expected}"
    yield "steps", f"{work.steps:,}, whose epsilon does not depend on how many GPUs there are"
    yield "images per GPU", f"{work.expected_batch_size / ranks:,.1f} in a step, expected"
    yield (
        "physical batch",
        f"{examples:,} images of {work.augmult} rows{passes}, {work.physical_seconds(examples):.3f} s",
    )
    yield "of a step", f"{plan.batches:,.1f} physical batches, {plan.rounds:,.1f} on the busiest GPU"
    yield "waiting", f"{plan.idle:.1%} of the computing time of all GPUs: batches are whole, samples vary"
    yield "parameters", f"{work.parameters:,}, of which {work.trained:,} are trained privately"


def _compared(plan: ClusterPlan) -> Iterator[tuple[str, ...]]:
    ways = (plan.alone, plan.replicas, plan.shards)

    def row(name: str, of: Callable[[Way], str]) -> tuple[str, ...]:
        return name, *map(of, ways)

    yield "", "one GPU", "replicas", "shards"
    yield row("seconds of a step: computing", lambda way: f"{way.step.computing:,.3f}")
    yield row("  reduction, gathering", lambda way: f"{way.step.sending:,.3f}")
    yield row("  noise and update", lambda way: f"{way.step.updating:,.3f}")
    yield row("  sample and input", lambda way: f"{way.step.reading:,.3f}")
    yield row("  all", lambda way: f"{way.step.seconds:,.3f}")
    yield row("efficiency of the private step", lambda way: f"{way.efficiency:.1%}")
    yield row("MB sent by a GPU in a step", lambda way: f"{way.sent / 1e6:,.1f}")
    for stage in plan.alone.seconds:
        if plan.alone.seconds[stage]:
            yield row(f"hours: {stage}", lambda way, stage=stage: f"{way.seconds[stage] / 3600:,.2f}")  # type: ignore[misc]
    yield row("  all", lambda way: f"{sum(way.seconds.values()) / 3600:,.2f}")
    yield row("efficiency of all stages", lambda way: f"{way.efficiency_of():.1%}")
    yield row("GB of a GPU: model and state", lambda way: f"{way.state / 1e9:,.1f}")
    yield row("  activations", lambda way: f"{way.activations / 1e9:,.1f}")
    yield row("  CUDA, NCCL", lambda way: f"{way.reserved / 1e9:,.1f}")
    yield row("  all", lambda way: f"{way.memory / 1e9:,.1f}")
    yield row(f"fits into {USED:.0%} of {plan.alone.room / 1e9:.0f} GB", lambda way: "yes" if way.fits else "NO")


def _verdict(plan: ClusterPlan) -> str:
    ways = {"replicas": plan.replicas, "shards": plan.shards}
    fitting = {name: way for name, way in ways.items() if way.fits}
    if not fitting:
        return "Neither replicas nor shards fit."
    name = next(iter(fitting))  # shards are no faster to speak of, and have more that can go wrong
    took = duration(sum(fitting[name].seconds.values()))
    others = "both fit" if len(fitting) == 2 else "the other way does not fit"
    return f"Use {name} ({others}): about {took}, without classifiers and reports."


def assumptions(plan: ClusterPlan) -> Iterator[str]:
    """Sentences: what the figures rest on."""
    node, rates, kind = plan.cluster.node, plan.cluster.rates, plan.cluster.device.upper()
    yield (
        f"One {kind}: {rates.library_brain / 1e12:.0f} TFLOP/s in torch's products in bfloat16,"
        f" {1e-12 / rates.load:.1f} TB/s, {rates.memory / 1e9:.0f} GB (dpfast plan --device {plan.cluster.device} has"
        " the rest)."
    )
    yield (
        f"A GPU sends {node.within / 1e9:.0f} GB/s by NVLink within its node and {node.between / 1e9:.0f} GB/s by an"
        " InfiniBand card of its own between nodes, while it receives as much: 80% of NVIDIA's data sheets. A message"
        f" takes {1e6 * node.hop_within:.0f} us within a node, {1e6 * node.hop_between:.0f} between nodes."
    )
    yield (
        "Collectives are rings, bucket after bucket; one reduction for each logical batch. None of it is hidden behind"
        " computing."
    )
    yield (
        "Full physical batches take equally long and are taken by whoever is free; fewer rows take less of the GPU's"
        " time in proportion, but of Python's calls as many. Nobody is slowed down by another."
    )
    yield (
        f"Each rank draws the noise of its own part of the numbers, {node.noise / 1e9:.0f} billion a second; Adam and"
        " the running mean of a replica go over all of the model, of shards over their own part."
    )
    yield (
        "Shards are gathered once for each logical batch and stay whole until its update, beside a sum that is whole:"
        " they save what the optimizer and the running mean hold."
    )
    yield (
        f"One rank draws the sample ({node.entropy / 1e6:.0f} MB/s of the system's entropy, 8 bytes for each image of"
        f" the data set) while the others wait; images are read at {node.reading / 1e9:.0f} GB/s by each rank."
    )
    yield (
        "Pre-training as if data-parallel likewise: its batch in equal parts, gradients reduced once a step, a part in"
        " proportion to its rows but never faster than Python calls it."
    )
    yield (
        "Samples of the private and of the public model as if drawn in whole files, each by one GPU with all of the"
        " model; a forward pass is a third of an ordinary step, in batches as large as the physical batch."
    )
    yield (
        "Left out: probes that examples stay apart (some long steps at first, later 0.5% of the time), checkpoints,"
        " starting, interruptions, classifiers and reports."
    )
    yield (
        "Memory is of the private step; temporaries of the update are smaller than the activations, which are gone by"
        " then."
    )
