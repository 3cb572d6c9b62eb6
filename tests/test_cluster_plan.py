"""What a recipe is predicted to take on several GPUs: the arithmetic against another, the page, what is refused."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.clipping.planner import Total
from dpfast.errors import ConfigError
from dpfast.kernels.links import BUCKET, HGX_H200, NODES, ring_bytes
from dpfast.kernels.rates import DEVICES, H200
from dpfast.physical import Size
from dpfast.runs.cluster import Cluster, bytes_per_step, plan_cluster, predict, state_bytes
from dpfast.runs.cluster_page import assumptions, page
from dpfast.runs.cluster_work import Work

WORK = Work(
    dataset_size=50_000,
    expected_batch_size=16_384,
    steps=200,
    augmult=128,
    size=Size(5, 128),
    rows=640,
    private=Total(working=0.2, calling=0.1, peak=38 * 10**9),
    ordinary=Total(working=0.16, calling=0.1, peak=40 * 10**9),
    activations=38 * 10**9,
    parameters=80_000_000,
    trained=80_000_000,
    tensors=320,
    image_bytes=3072,
    pretrain_steps=1000,
    pretrain_batch=1024,
    sampled=50_000,
    shard_size=5000,
    calls=100,
)
SMALL = replace(WORK, dataset_size=300, expected_batch_size=30)


def cluster(nodes: int, gpus_per_node: int, work: Work = WORK):
    return predict("test", work, nodes=nodes, gpus_per_node=gpus_per_node)


def rings(numbers: int, ranks: int) -> int:
    """Bytes that rank 0 sends in a reduce-scatter of ``numbers``, passed on around a ring chunk by chunk."""
    row = math.ceil(numbers / ranks)
    sent, held = 0, [{chunk: {rank} for chunk in range(ranks)} for rank in range(ranks)]
    for hop in range(ranks - 1):
        before = [{chunk: set(of) for chunk, of in each.items()} for each in held]
        for rank in range(ranks):
            chunk = (rank - hop) % ranks
            held[(rank + 1) % ranks][chunk] |= before[rank][chunk]
            sent += 4 * row * (rank == 0)
    assert all(each[(rank + 1) % ranks] == set(range(ranks)) for rank, each in enumerate(held))
    return sent


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("numbers", [1, 7, 48, 1000])
def test_bytes_are_those_that_go_around_a_ring(ranks, numbers):
    assert ring_bytes(numbers, ranks) == rings(numbers, ranks)
    assert bytes_per_step(numbers, ranks, False) == bytes_per_step(numbers, ranks, True) == 2 * rings(numbers, ranks)
    assert bytes_per_step(numbers, ranks, True, gathers=6) == 7 * rings(numbers, ranks)


def test_bytes_of_what_is_not_trained_are_gathered_and_not_summed():
    assert bytes_per_step(1000, 4, False, trained=100) == 2 * 3 * 4 * 25
    assert bytes_per_step(1000, 4, True, trained=100) == 3 * 4 * 25 + 3 * 4 * 250


@pytest.mark.parametrize(
    ("parameters", "ranks", "options"), [(0, 2, {}), (5, 0, {}), (5, 2, {"trained": 6}), (5, 2, {"gathers": -1})]
)
def test_bytes_of_nothing_are_refused(parameters, ranks, options):
    with pytest.raises(ConfigError, match="expected 1 or more parameters and ranks"):
        bytes_per_step(parameters, ranks, True, **options)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("ranks", [1, 4, 30, 100])
def test_computing_is_the_mean_of_drawn_samples(ranks, given):
    """Physical batches, as the trainer cuts a sample into them, are given out one by one to who is free first."""
    n, b = SMALL.dataset_size, SMALL.expected_batch_size
    work = replace(SMALL, size=Size(16, 128), private=Total(working=1.6, calling=0.1, peak=0), given=given)
    largest = 16 if given else min(16, math.ceil(b / ranks))
    assert work.examples_on(ranks) == largest
    generator, seconds, rounds = torch.Generator().manual_seed(0), [], []
    for _ in range(2000):
        size = int((torch.rand(n, generator=generator) < b / n).sum())
        free, taken = [0.0] * ranks, [0] * ranks
        for examples in cut(size, largest):
            first = free.index(min(free))
            free[first] += max(0.1, 0.1 * examples)
            taken[first] += 1
        seconds.append(max(free))
        rounds.append(max(taken))
    assert work.computing(ranks) == pytest.approx(sum(seconds) / len(seconds), rel=0.02)
    assert work.rounds(ranks) == pytest.approx(sum(rounds) / len(rounds), rel=0.02)


def cut(examples, largest):
    """Sizes of physical batches: full ones, and the least of a half, a quarter, an eighth that holds what is left."""
    rest = examples % largest
    smaller = [largest // 2**i for i in range(4) if largest // 2**i >= max(rest, 1)]
    return [largest] * (examples // largest) + [min(smaller)] * (rest > 0)


def test_one_gpu_sends_nothing():
    plan = cluster(1, 1)
    for way in (plan.alone, plan.replicas, plan.shards):
        assert way.step.sending == way.sent == 0
        assert way.efficiency == 1
        assert way.step == plan.alone.step
    assert plan.idle == pytest.approx(0, abs=1e-3)


def test_a_step_by_hand():
    """2 x 8 GPUs, of whole physical batches of which nearly every GPU has the same number."""
    plan, p = cluster(2, 8), 80e6
    assert plan.batches == 16_384 / 5
    assert plan.replicas.step.computing == pytest.approx(0.2 * (16_384 / (5 * 16) + 0.5), rel=1e-3)
    # NVLink limits a ring through both nodes less than eight cards of 40 GB/s do; ten buckets of 15 hops of 15 us
    reduction = 2 * (15 / 16 * 4 * p / 320e9 + math.ceil(p / BUCKET) * 15 * 15e-6)
    assert plan.replicas.step.sending == pytest.approx(reduction)
    noise = p / 16 / 3e10 + p / 16 * 8 / 4e12 + 20 * 3e-5
    update = 10 * 4 * p / 4e12
    assert plan.replicas.step.updating == pytest.approx(noise + update)
    assert plan.shards.step.updating == pytest.approx(noise + update / 16)
    assert plan.replicas.step.reading == pytest.approx(8 * 50_000 / 3e8 + (1024 + 2.5) * 3072 / 1e9, rel=1e-3)
    assert plan.replicas.seconds["private training"] == 200 * plan.replicas.step.seconds


def test_pretraining_and_sampling_by_hand():
    plan = cluster(2, 8)
    step = plan.replicas.seconds["pre-training"] / 1000
    sending = plan.replicas.step.sending
    assert step == pytest.approx(0.1 + sending + 40 * 80e6 / 4e12 + 64 * 3072 / 1e9)  # no faster than it is called
    assert plan.alone.seconds["pre-training"] / 1000 == pytest.approx(0.16 * 1024 / 640, rel=0.02)
    each = 100 * 0.16 / 640 / 3
    assert plan.alone.seconds["sampling"] == pytest.approx(2 * 50_000 * each)
    assert plan.replicas.seconds["sampling"] == pytest.approx(2 * 5000 * each)  # ten files: the others have none
    assert cluster(1, 4).replicas.seconds["sampling"] == pytest.approx(2 * 3 * 5000 * each)
    assert cluster(1, 1, replace(WORK, pretrain_steps=0)).alone.seconds["pre-training"] == 0


def test_memory_by_hand():
    """Of replicas parameters, sum, two moments, mean; of shards a share, but the whole of two for a step."""
    assert state_bytes(100, 100) == 4 * 500
    assert state_bytes(100, 10) == 4 * (100 + 10 + 20 + 100)
    assert state_bytes(100, 100, shards=4) == 4 * (200 + 100)
    plan = cluster(2, 8)
    assert plan.replicas.memory == 38 * 10**9 + 2 * 10**9 + 20 * 80 * 10**6
    assert plan.shards.memory == 38 * 10**9 + 2 * 10**9 + 4 * 80 * 10**6 * (2 + 4 // 16) + 4 * 80 * 10**6 * 4 // 16
    assert plan.replicas.fits


def test_shards_fit_where_replicas_do_not():
    plan = cluster(2, 8, replace(WORK, parameters=5 * 10**9, trained=5 * 10**9))
    assert not plan.replicas.fits
    assert plan.shards.fits
    assert not plan._of_memory()
    assert "Use shards (the other way does not fit)" in "\n".join(page(plan))


def test_neither_fits():
    plan = cluster(2, 8, replace(WORK, activations=130 * 10**9))
    (warning,) = plan._of_memory()
    budget = int(warning.split("memory_budget=")[1].rstrip(")"))
    assert plan.shards.state + plan.shards.reserved + budget <= 0.9 * H200.memory
    assert "Neither replicas nor shards fit." in "\n".join(page(plan))
    (hopeless,) = cluster(1, 2, replace(WORK, parameters=10**11, trained=10**11))._of_memory()
    assert "method=lora" in hopeless


@pytest.mark.parametrize("work", [WORK, SMALL])
def test_more_gpus_never_take_longer_to_compute(work):
    plans = [cluster(1, gpus, work) for gpus in (1, 2, 4, 8)] + [cluster(nodes, 8, work) for nodes in (2, 3, 8, 64)]
    for less, more in itertools.pairwise(plans):
        for way in ("replicas", "shards"):
            fewer, many = getattr(less, way), getattr(more, way)
            assert many.step.computing <= fewer.step.computing
            assert many.step.reading <= fewer.step.reading
            assert many.sent >= fewer.sent
            assert many.seconds["sampling"] <= fewer.seconds["sampling"]
            assert 0 < many.efficiency <= 1
        assert more.shards.state <= less.shards.state or less.cluster.ranks == 1
        assert more.replicas.state == less.replicas.state
        assert 0 <= more.idle < 1


def test_links_between_nodes_are_no_faster_than_within():
    for gpus in (1, 2, 8):
        assert HGX_H200.bandwidth(2, gpus) <= HGX_H200.bandwidth(1, gpus)
    assert HGX_H200.bandwidth(2, 1) == HGX_H200.between
    assert HGX_H200.collective(10**8, 2, 4) > HGX_H200.collective(10**8, 1, 8) > 0


def test_every_gpu_with_rates_has_a_node():
    assert NODES.keys() == DEVICES.keys()


def test_too_many_gpus_for_the_batch_are_warned_of():
    """The cluster that is named instead is worth it, and one node more is not."""
    plan = cluster(64, 8, replace(WORK, expected_batch_size=1000))
    (warning, *_) = plan.warnings()
    assert "the expected batch of 1,000 images is small for 512 GPUs" in warning
    assert "2.0 for each" in warning
    fits = plan.worthwhile()
    assert f"--nodes {fits.nodes} --gpus-per-node {fits.gpus_per_node}" in warning
    assert cluster(fits.nodes, 8, plan.work).replicas.efficiency >= 0.8
    assert not any("expected batch" in text for text in cluster(2, 8).warnings())
    tiny = replace(WORK, expected_batch_size=2.0)
    assert cluster(2, 8, tiny).worthwhile() == Cluster(1, 1)


def test_fewer_files_than_gpus_are_warned_of():
    assert any("sample.shard_size=3125" in warning for warning in cluster(2, 8).warnings())
    enough = cluster(2, 8, replace(WORK, shard_size=3125, pretrain_steps=0))
    assert enough.warnings() == []


def test_pretraining_that_needs_no_such_cluster_is_warned_of():
    plan = cluster(2, 8)
    one, many = (way.seconds["pre-training"] for way in (plan.alone, plan.replicas))
    assert plan.replicas.efficiency_of("pre-training") == pytest.approx(one / many / 16)
    assert plan.alone.efficiency_of() == 1
    assert any("(dpfast pretrain)" in warning for warning in plan.warnings())
    assert not any("pretrain" in warning for warning in cluster(1, 1).warnings())


def test_the_assumed_links_are_told():
    text = "\n".join(assumptions(cluster(2, 8)))
    assert "360 GB/s by NVLink" in text
    assert "40 GB/s by an InfiniBand card" in text


@pytest.mark.parametrize("name", ["cifar10", "camelyon17", "mnist"])
def test_the_page_of_each_recipe(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no data
    result = CliRunner().invoke(app, ["plan", name, "--nodes", "2", "--gpus-per-node", "8"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = result.stdout
    for words in (
        f"PREDICTED, nothing was measured: {name} on 2 nodes of 8 H200, 16 in all",
        "private images", "images per GPU", "physical batch", "waiting", "seconds of a step: computing",
        "reduction, gathering", "noise and update", "sample and input", "efficiency of the private step",
        "hours: private training", "hours: sampling", "GB of a GPU: model and state", "Use replicas (both fit)",
        "Assumptions, none of them measured", "80% of NVIDIA's data sheets",
    ):  # fmt: skip
        assert words in text
    assert ("hours: pre-training" in text) == (name != "mnist")  # which has no public data
    figures = {line[:31].strip(): line[31:].split() for line in text.splitlines()}
    alone, replicas, _ = (float(x.replace(",", "")) for x in figures["hours: private training"])
    assert 1 <= alone / replicas <= 16
    assert float(figures["efficiency of the private step"][1].rstrip("%")) == pytest.approx(
        100 * alone / replicas / 16, rel=0.02
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cifar10", "--nodes", "2"], "expected both --nodes and --gpus-per-node"),
        (["cifar10", "--gpus-per-node", "2"], "expected both --nodes and --gpus-per-node"),
        (["--nodes", "2", "--gpus-per-node", "8"], "expected a recipe"),
        (["cifar10", "--nodes", "0", "--gpus-per-node", "8"], "--nodes 0: expected 1 or more"),
        (["cifar10", "--nodes", "2", "--gpus-per-node", "-1"], "--gpus-per-node -1: expected 1 or more"),
        (["cifar10", "--nodes", "1", "--gpus-per-node", "16"], "as in --nodes 2 --gpus-per-node 8"),
        (["cifar10", "--nodes", "2", "--gpus-per-node", "8", "--device", "h300"], "expected h200"),
        (
            ["cifar10", "--nodes", "2", "--gpus-per-node", "8", "--kernels"],
            "--kernels: a plan for several GPUs has none",
        ),
    ],
)
def test_what_no_cluster_is_says_so(words, said):
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code == 2
    assert said in result.stderr
    assert not result.stdout


def test_a_recipe_whose_examples_go_in_passes(monkeypatch):
    """All passes of an example count: K rows take what they take, however few go at a time."""
    from dpfast.recipes import load

    monkeypatch.setenv("DPFAST_PROFILE", "usual")
    settings = ["private.augmult=64", "performance.memory_budget=1_000_000", "widths=[8]", "norm_groups=4"]
    settings += ["model.attention=[]", "mid_attention=false"]
    plan = plan_cluster(load("digits", settings), nodes=1, gpus_per_node=2)
    work = plan.work
    assert (work.size.examples, work.rows) == (1, work.size.rows)
    assert work.size.rows < 64
    whole = plan_cluster(
        load("digits", [*settings, "performance.memory_budget=none", "microbatch=1"]), nodes=1, gpus_per_node=2
    )
    assert work.physical_seconds(1) > whole.work.physical_seconds(1) > 0
    assert work.given is False
    assert whole.work.given is True
    assert f"{work.size.rows} of them at a time" in "\n".join(page(plan))
