"""What a recipe would take on several GPUs that need not be here: time, what is sent, memory. Nothing is run.

One physical batch is predicted as everywhere (``dpfast.runs.cluster_work``); the rest is arithmetic on it, by
``predict``. ``ClusterPlan`` holds the numbers, ``dpfast.runs.cluster_page`` writes them down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from dpfast.errors import ConfigError
from dpfast.kernels.links import NODES, Node, ring_bytes
from dpfast.kernels.rates import Rates, named
from dpfast.recipes.schema import Recipe
from dpfast.runs.cluster_work import Work, work_of

USED = 0.9  # of a GPU's memory, the most that is planned with: allocators leave gaps
WORTH = 0.8  # of what as many single GPUs would do: less is warned of
_WORD = 4  # bytes of a number that is kept, reduced or gathered: float32


def bytes_per_step(parameters: int, ranks: int, sharded: bool, *, trained: int | None = None, gathers: int = 1) -> int:
    """Bytes that one rank sends, and as many that it receives, for one logical batch, whatever K and the number of
    physical batches.

    parameters: numbers of the model; trained: of them, those with a clipped sum (by default all). sharded: cut by
    ``fully_shard``; gathers: how often its parameters are made whole (once a step, or twice for each physical batch,
    forward and backward, where shards are dropped in between).

    Counted are the numbers of float32 that collectives of the default group move, as rings do, which send the least
    that is possible: ``4 (R - 1) ceil(n / R)`` for n numbers in a reduce-scatter or an all-gather. Replicas
    reduce-scatter the sums and all-gather the noised means (together one ring all-reduce, ``2 (R - 1) / R * 4 n``);
    shards all-gather the parameters ``gathers`` times and reduce-scatter the sums.

    Not counted: what ranks tell each other on the CPU (the sample's ids, verdicts, ledger), and what is sent once (the
    first weights, checkpoints). The numbers are taken for one bucket: several, each padded to a multiple of R, send up
    to ``4 (R - 1)`` bytes more for each collective; shards, of which each parameter is padded along its first
    dimension, a row of it more. What a backend sends by another algorithm than a ring is its own affair: to compare
    with a count, count ``(R - 1) / R`` of the larger tensor of each collective, in bytes.

    Raises:
        ConfigError: no parameters or no ranks.
    """
    trained = parameters if trained is None else trained
    if parameters < 1 or ranks < 1 or not 0 <= trained <= parameters or gathers < 0:
        raise ConfigError(
            f"bytes_per_step({parameters}, {ranks}, trained={trained}, gathers={gathers}): expected 1 or more"
            " parameters and ranks, no more trained than there are, and 0 or more gathers"
        )
    return ring_bytes(trained, ranks) + (
        gathers * ring_bytes(parameters, ranks) if sharded else ring_bytes(trained, ranks)
    )


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``gpus_per_node`` GPUs of one kind.

    Raises:
        ConfigError: a GPU of which nothing is known, or numbers that no such cluster has.
    """

    nodes: int
    gpus_per_node: int
    device: str = "h200"

    def __post_init__(self) -> None:
        named(self.device)
        for name, value in (("nodes", self.nodes), ("gpus-per-node", self.gpus_per_node)):
            if value < 1:
                raise ConfigError(f"--{name} {value}: expected 1 or more")
        if self.gpus_per_node > self.node.gpus:
            raise ConfigError(
                f"--gpus-per-node {self.gpus_per_node}: a node has {self.node.gpus} {self.device.upper()} at most;"
                f" give more nodes, as in --nodes {math.ceil(self.ranks / self.node.gpus)}"
                f" --gpus-per-node {self.node.gpus}"
            )

    @property
    def ranks(self) -> int:
        """GPUs, one process for each."""
        return self.nodes * self.gpus_per_node

    @property
    def node(self) -> Node:
        return NODES[self.device]

    @property
    def rates(self) -> Rates:
        return named(self.device)

    def collective(self, numbers: int) -> float:
        """Seconds of a reduce-scatter or an all-gather of so many float32."""
        return self.node.collective(numbers, self.nodes, self.gpus_per_node)


@dataclass(frozen=True)
class Step:
    """Seconds of one private step: on the rank that has most to compute; between ranks; noise, update and running mean;
    drawing the sample and reading its images.
    """

    computing: float
    sending: float
    updating: float
    reading: float

    @property
    def seconds(self) -> float:
        return self.computing + self.sending + self.updating + self.reading


@dataclass(frozen=True)
class Way:
    """One way to use so many ``ranks``. seconds: by stage of the recipe; seconds_of_one: likewise, of one GPU. state,
    activations, reserved: bytes of a GPU. sent: bytes of a rank and step.
    """

    ranks: int
    step: Step
    seconds: dict[str, float]
    seconds_of_one: dict[str, float]
    sent: int
    state: int
    activations: int
    reserved: int
    room: int

    @property
    def efficiency(self) -> float:
        """Of the private training."""
        return self.efficiency_of("private training")

    def efficiency_of(self, *stages: str) -> float:
        """Of stages, by default all: the time of one GPU over that of all GPUs together; of none, 1."""
        one, each = (sum(by[s] for s in stages or by) for by in (self.seconds_of_one, self.seconds))
        return one / (self.ranks * each) if each else 1.0

    @property
    def memory(self) -> int:
        return self.state + self.activations + self.reserved

    @property
    def fits(self) -> bool:
        return self.memory <= USED * self.room


@dataclass(frozen=True)
class ClusterPlan:
    """``work`` on ``cluster``; what it takes in ways that differ in where parameters and their state are."""

    name: str
    cluster: Cluster
    work: Work

    @cached_property
    def alone(self) -> Way:
        """One GPU."""
        return _way(self.work, Cluster(1, 1, self.cluster.device), sharded=False)

    @cached_property
    def replicas(self) -> Way:
        """Each rank has all of the model."""
        return _way(self.work, self.cluster, sharded=False)

    @cached_property
    def shards(self) -> Way:
        """``fully_shard``: each rank keeps its part, whole only for the length of a step."""
        return _way(self.work, self.cluster, sharded=True)

    @cached_property
    def rounds(self) -> float:
        """Physical batches of the busiest rank in a step, expected."""
        return self.work.rounds(self.cluster.ranks)

    @cached_property
    def batches(self) -> float:
        """Full physical batches that make an expected step."""
        return self.work.expected_batch_size / self.work.examples_on(self.cluster.ranks)

    @property
    def idle(self) -> float:
        """Share of the GPUs' computing time that they wait: batches are whole and samples vary."""
        work, ranks = self.work, self.cluster.ranks
        busy = work.expected_batch_size / work.examples_on(ranks) * work.physical_seconds(work.examples_on(ranks))
        return max(0.0, 1 - busy / (ranks * self.replicas.step.computing))

    @property
    def deviation(self) -> float:
        """Standard deviation of the size of a Poisson sample."""
        n, b = self.work.dataset_size, self.work.expected_batch_size
        return math.sqrt(b * (1 - b / n))

    def worthwhile(self) -> Cluster:
        """The largest of such nodes, no larger than this one, whose efficiency is ``WORTH``; one GPU at least."""
        for nodes in range(self.cluster.nodes, 0, -1):
            smaller = Cluster(nodes, self.cluster.gpus_per_node, self.cluster.device)
            if _way(self.work, smaller, sharded=False).efficiency >= WORTH:
                return smaller
        for gpus in range(self.cluster.gpus_per_node - 1, 1, -1):
            smaller = Cluster(1, gpus, self.cluster.device)
            if _way(self.work, smaller, sharded=False).efficiency >= WORTH:
                return smaller
        return Cluster(1, 1, self.cluster.device)

    def warnings(self) -> list[str]:
        """What is wrong with so many GPUs, and the cure."""
        return [*self._of_batches(), *self._of_public_batches(), *self._of_memory(), *self._of_files()]

    def _of_batches(self) -> list[str]:
        if self.replicas.efficiency >= WORTH:
            return []
        work, ranks, fits = self.work, self.cluster.ranks, self.worthwhile()
        said = (
            f"the expected batch of {work.expected_batch_size:,.0f} images is small for {ranks} GPUs:"
            f" {work.expected_batch_size / ranks:,.1f} for each, and {self.replicas.efficiency:.0%} of what the GPUs"
            f" could do is done. Use {fits.ranks} GPU{'s' * (fits.ranks > 1)} (--nodes {fits.nodes} --gpus-per-node"
            f" {fits.gpus_per_node}); a larger sample rate is another plan, with another epsilon or noise"
        )
        return [said]

    def _of_public_batches(self) -> list[str]:
        there = self.replicas.efficiency_of("pre-training")
        if there >= WORTH:
            return []
        hours = [by["pre-training"] / 3600 for by in (self.replicas.seconds_of_one, self.replicas.seconds)]
        said = (
            f"pre-training, whose batch of public images is small for {self.cluster.ranks} GPUs, does {there:.0%} of"
            f" what they could: {hours[1]:,.2f} h in the place of {hours[0]:,.2f} h on one GPU. It may run by itself"
            " before, on fewer (dpfast pretrain)"
        )
        return [said]

    def _of_memory(self) -> list[str]:
        if self.replicas.fits or self.shards.fits:
            return []
        least = min(self.replicas, self.shards, key=lambda way: way.memory)
        left = int(USED * least.room) - least.state - least.reserved
        cure = (
            f"give the activations what is left (--set performance.memory_budget={left})"
            if left > 0
            else "use more GPUs, or train less of the model (--set private.method=lora)"
        )
        return [f"neither replicas nor shards fit into {least.room / 1e9:.0f} GB: {cure}"]

    def _of_files(self) -> list[str]:
        files = math.ceil(self.work.sampled / self.work.shard_size)
        if files >= self.cluster.ranks:
            return []
        each = math.ceil(self.work.sampled / self.cluster.ranks)
        said = (
            f"samples are drawn in {files} files, each by one of {self.cluster.ranks} GPUs: --set"
            f" sample.shard_size={each} keeps all of them at work"
        )
        return [said]


def _way(work: Work, cluster: Cluster, *, sharded: bool) -> Way:
    one, step = Cluster(1, 1, cluster.device), _step(work, cluster, sharded=sharded)
    return Way(
        ranks=cluster.ranks,
        step=step,
        seconds=_seconds(work, cluster, step, sharded=sharded),
        seconds_of_one=_seconds(work, one, _step(work, one, sharded=False), sharded=False),
        sent=bytes_per_step(work.parameters, cluster.ranks, sharded, trained=work.trained),
        state=state_bytes(work.parameters, work.trained, cluster.ranks if sharded else 1),
        activations=work.activations,
        reserved=cluster.node.reserved,
        room=cluster.rates.memory,
    )


def _seconds(work: Work, cluster: Cluster, step: Step, *, sharded: bool) -> dict[str, float]:
    """By stage."""
    return {
        "pre-training": work.pretrain_steps * _public_step(work, cluster, sharded=sharded),
        "private training": work.steps * step.seconds,
        "sampling": _sampling(work, cluster.ranks),
    }


def state_bytes(parameters: int, trained: int, shards: int = 1) -> int:
    """Of a rank's parameters, clipped sum, Adam's two moments and running mean, in float32, during a step.

    shards: in how many parts parameters, moments and mean are cut; 1: not. Of cut ones there is, beside a rank's own
    shards, the whole that was gathered for the step. The sum is whole either way.
    """
    kept = 2 * parameters + 2 * trained  # parameters and mean; moments
    whole = trained + (parameters if shards > 1 else 0)
    return _WORD * (whole + math.ceil(kept / shards))


def _step(work: Work, cluster: Cluster, *, sharded: bool) -> Step:
    images = min(work.rounds(cluster.ranks) * work.examples_on(cluster.ranks), work.expected_batch_size)
    return Step(
        computing=work.computing(cluster.ranks),
        sending=_sending(work, cluster, sharded=sharded),
        updating=_noising(work, cluster) + _updating(work, cluster, sharded=sharded),
        reading=8 * work.dataset_size / cluster.node.entropy + images * work.image_bytes / cluster.node.reading,
    )


def _sending(work: Work, cluster: Cluster, *, sharded: bool) -> float:
    """A reduce-scatter of the sums, and an all-gather of the means or of the parameters."""
    return cluster.collective(work.trained) + cluster.collective(work.parameters if sharded else work.trained)


def _noising(work: Work, cluster: Cluster) -> float:
    """Of a rank's own part: drawn, added, written."""
    numbers, rates = work.trained / cluster.ranks, cluster.rates
    drawn = numbers / cluster.node.noise + numbers * _WORD * (rates.load + rates.store)
    return drawn + math.ceil(work.tensors / cluster.ranks) * rates.call


def _updating(work: Work, cluster: Cluster, *, sharded: bool) -> float:
    """Adam and the running mean: numbers read and written once, of the whole model on each replica."""
    rates, parts = cluster.rates, cluster.ranks if sharded else 1
    read, written = 4 * work.trained + 2 * work.parameters, 3 * work.trained + work.parameters
    return _WORD * (read * rates.load + written * rates.store) / parts


def _public_step(work: Work, cluster: Cluster, *, sharded: bool) -> float:
    """Ordinary data-parallel training: the batch in equal parts, gradients in place of sums, no noise."""
    if not work.pretrain_steps:
        return 0.0
    rows = math.ceil(work.pretrain_batch / cluster.ranks)
    sending = 2 * cluster.collective(work.parameters)
    reading = rows * work.image_bytes / cluster.node.reading
    return work.forward_and_backward(rows) + sending + _updating(work, cluster, sharded=sharded) + reading


def _sampling(work: Work, ranks: int) -> float:
    """Whole files, each drawn by one rank that has all of the model; a forward pass is a third of an ordinary step."""
    files = math.ceil(work.sampled / work.shard_size)
    images = min(math.ceil(files / ranks) * work.shard_size, work.sampled)
    return work.sets * images * work.calls * work.ordinary.seconds / work.rows / 3


def predict(name: str, work: Work, *, nodes: int, gpus_per_node: int, device: str = "h200") -> ClusterPlan:
    """The plan of ``work`` there; pure arithmetic.

    Raises:
        ConfigError: as ``Cluster``.
    """
    return ClusterPlan(name, Cluster(nodes, gpus_per_node, device), work)


def plan_cluster(recipe: Recipe, *, nodes: int, gpus_per_node: int, device: str = "h200") -> ClusterPlan:
    """The plan of a recipe there; of published data sets that are not here, only the sizes are used.

    Raises:
        ConfigError: as ``Cluster``, or a recipe that cannot be used.
        CaptureError: a model or objective that cannot be planned.
    """
    cluster = Cluster(nodes, gpus_per_node, device)
    return ClusterPlan(recipe.name, cluster, work_of(recipe, device))
