"""Several ranks of torch.distributed: what they compute, send and refuse, and how they go on after a kill."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import rank_worker
from dpfast.data.keyed import RowKeys
from dpfast.privacy import read_ledger
from dpfast.runs.cluster import bytes_per_step

WORKER = Path(rank_worker.__file__)
KINDS = ("replicas", "shards")
pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What each rank of so many returned from a task: one run of each."""

    @cache
    def once(task: str, ranks: int, *, folder: Path | None = None, restarts: int = 0, kind: str = "") -> list[Any]:
        folder = folder or tmp_path_factory.mktemp(f"{task}-{ranks}")
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launch += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        settings = {"RANK_KIND": kind, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        done = subprocess.run(
            [sys.executable, *launch, WORKER, task, folder], env=os.environ | settings, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-6000:]
        return [torch.load(folder / f"{task}-{rank}.pt", weights_only=True) for rank in range(ranks)]

    return once


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> Tensor:
    return torch.cat([(before[name] - after[name]).flatten() for name in before])


# The sum


def expected_sum(ids: list[int]) -> Tensor:
    """Of the first step, by autograd alone, one example after another in float64."""
    model, batch = rank_worker.network(), [rank_worker.Points()[i] for i in ids]
    images = torch.stack([image for image, _ in batch]).repeat_interleave(rank_worker.K, 0)
    labels = torch.tensor([label for _, label in batch]).repeat_interleave(rank_worker.K)
    keys = RowKeys(0, torch.tensor(ids), 1, rank_worker.K)
    rows = images + 0.1 * keys.normal(2, 5, 5, stream="noise")

    def losses(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return nn.functional.cross_entropy(model(inputs[0]), inputs[1], reduction="none")

    sums = oracle.per_example(model, losses, (rows, labels), augmult=rank_worker.K, max_grad_norm=0.5).sums
    return torch.cat([sums[name].flatten() for name, _ in model.named_parameters()])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_give_the_clipped_sum_of_one_process(run, ranks, kind):
    first = rank_worker.network().state_dict()
    for found in run("steps", ranks):
        total = moved(first, found[kind]["after"][0]).double() * rank_worker.plan().expected_batch_size
        expected = expected_sum(rank_worker.SAMPLES[0])
        assert (total - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_training_of_ranks_is_that_of_one(run, ranks, kind):
    """Four steps, over samples of which one is empty and one has fewer examples than ranks; and the averaged model."""
    alone = run("steps", 1)[0]["replicas"]
    for found in run("steps", ranks):
        for ours, expected in zip(found[kind]["after"], alone["after"], strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
        for name, value in alone["averages"].items():
            torch.testing.assert_close(found[kind]["averages"][name], value, rtol=1e-5, atol=1e-6)
            assert torch.equal(found[kind]["again"][name], found[kind]["after"][-1][name])


@pytest.mark.parametrize("ranks", [2, 4])
def test_all_replicas_hold_the_same_weights(run, ranks):
    first, *others = (found["replicas"]["after"][-1] for found in run("steps", ranks))
    for other in others:
        assert all(torch.equal(other[name], value) for name, value in first.items())


# The noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_noise_of_all_ranks_together_has_the_planned_covariance(run, ranks, kind):
    """In units of sigma C: every number of variance 1, no two numbers and no two draws alike."""
    drawn = run("noise", ranks)[0][kind]
    draws, numbers = drawn.shape
    assert drawn.mean().abs() < 5 / (draws * numbers) ** 0.5
    assert abs(drawn.square().mean() - 1) < 5 * (2 / (draws * numbers)) ** 0.5
    variances = drawn.square().mean(0)
    assert (variances - 1).abs().max() < 6 * (2 / draws) ** 0.5
    alike = torch.corrcoef(drawn.T).fill_diagonal_(0).abs().max()
    assert alike < 7 / draws**0.5, "two numbers share their noise"
    repeated = torch.corrcoef(drawn).fill_diagonal_(0).abs().max()
    assert repeated < 7 / numbers**0.5, "two steps share their noise"


def test_noise_is_the_same_on_all_replicas(run):
    first, second = run("noise", 2)
    assert torch.equal(first["replicas"], second["replicas"])


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_of_rank_0_hear_norms_of_the_whole(run, kind):
    first, second = (found[kind] for found in run("logged", 2))
    assert (first["steps"], second["steps"]) == (4, 0)
    assert first["norm"] == pytest.approx(float(first["weights"].norm()), rel=1e-5)
    assert first["distance"] == pytest.approx(float((first["weights"] - first["averages"]).norm()), rel=1e-4)


# What is sent


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sends_one_reduction_of_the_parameters(run, ranks, kind):
    """Whatever K and the number of physical batches; what else is sent does not grow with the model."""
    for found in run("traffic", ranks):
        seen = {name: result["bytes"] for name, result in found.items() if name.startswith(kind)}
        numbers = next(iter(found.values()))["numbers"]
        assert len(seen) == 4
        for sent in seen.values():
            reduced = sent.pop("_reduce_scatter_base_")
            gathered = sent.pop("_allgather_base_") * ranks  # each rank gives its part
            assert 4 * numbers <= reduced < 4 * numbers * 1.02 + 4096
            assert 4 * numbers <= gathered < 4 * numbers * 1.02 + 4096
            assert sum(sent.values()) < 4096
            planned = bytes_per_step(numbers, ranks, kind == "shards")
            assert planned <= (reduced + gathered) * (ranks - 1) / ranks < planned * 1.02 + 4096


# Interruption


@pytest.mark.parametrize("kind", ["replicas, rank 1", "shards, rank 0"])
def test_a_killed_rank_leaves_a_truthful_ledger(run, tmp_path, kind):
    """torchrun starts the group again: the step that was charged is spent and lost, no step is taken twice."""
    for found in run("killed", 2, folder=tmp_path, restarts=1, kind=kind):
        assert found["charged"] == 4
        assert found["lost"] == 1
        assert found["life"] == 1  # steps that the second life took: the last one
    assert read_ledger(tmp_path / "state" / "ledger.jsonl").charged_steps == 4


@pytest.mark.parametrize(("ranks", "kind"), [(1, "replicas"), (2, "replicas"), (4, "shards")])
def test_a_checkpoint_of_shards_goes_on_with_other_ranks(run, tmp_path, ranks, kind):
    stopped = run("half", 2, folder=tmp_path)[0]
    for found in run("resumed", ranks, folder=tmp_path, kind=kind):
        step, weights = found["began"]
        assert step == 3
        assert all(torch.equal(weights[name], value) for name, value in stopped["weights"].items())
        assert (found["charged"], found["lost"]) == (4, 0)
        assert found["statement"] == pytest.approx(rank_worker.plan().epsilon(4))


# The end


def test_a_trainer_that_outlives_its_process_group_keeps_no_thread_of_it(run):
    """One that lets go of a tensor while Python ends would abort the process."""
    for rank, found in enumerate(run("lasting", 2)):
        assert any("gloo" in name for name in found["before"])
        assert not [name for name in found["after"] if "gloo" in name]
        assert f"ConfigError: rank {rank} of 2: the process group is gone" in found["said"]


# A loop of one's own


def test_a_loop_of_ones_own_shares_samples_and_a_ledger(run):
    first, second = run("own_loop", 2)
    for one, other in zip(first["parts"], second["parts"], strict=True):
        assert not set(one.tolist()) & set(other.tolist())
        assert abs(len(one) - len(other)) <= 1
    assert first["charged"] == second["charged"] == 2
    assert all(torch.equal(first["weights"][name], value) for name, value in second["weights"].items())


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("not gathered", "call step() inside the `with dpfast.ranks.gathered(model)`"),
        ("capture of shards", "enter `with dpfast.ranks.gathered(model)` first"),
        ("a gradient of one rank", "refused"),
        ("alone with shards", "PrivacyError: DPOptimizer: the model lies in shards on 2 processes, and 1 train it"),
        ("rounded shards", "compute in bfloat16 under torch.autocast"),
        ("another rate", "what this step begins with: rank 1 has another than rank 0"),
        ("other weights later", "what this step begins with: rank 1 has another than rank 0"),
        ("other weights", "ConfigError: weights of the model: rank 1 has another than rank 0"),
        ("another plan", "ConfigError: plan: rank 1 has another than rank 0"),
        ("another data set", "ConfigError: data set: rank 1 has another than rank 0"),
        ("other settings", "ConfigError: settings: rank 1 has another than rank 0"),
        ("a callback's collective", "belongs after fit(), on every rank"),
        ("wrapped", "give the module in it"),
        ("a locked ledger", "in use by another process"),
    ],
)
def test_every_rank_refuses_what_one_has_to(run, case, words):
    for found in run("own_loop", 2):
        assert words in found["refused"][case]
        assert found["still"] == 2


# PrivacyEngine


@pytest.mark.parametrize("kind", ["whole", "in parts", "wrapped"])
def test_a_loop_of_the_engine_is_that_of_one_process(run, kind):
    """Also where ranks have different numbers of physical batches, or none."""
    (alone,), both = run("engine", 1), run("engine", 2)
    assert sum(found[kind]["seen"] for found in both) == alone[kind]["seen"] == sum(map(len, rank_worker.SAMPLES))
    for found in both:
        assert found[kind]["charged"] == len(rank_worker.SAMPLES)
        for name, value in alone["whole"]["weights"].items():
            torch.testing.assert_close(found[kind]["weights"][name], value, rtol=1e-5, atol=1e-6)


def test_the_engine_refuses_ranks_with_other_examples(run):
    for found in run("engine", 2):
        assert "ConfigError: data set: rank 1 has another than rank 0" in found["refused"]


def test_the_engine_refuses_a_step_of_parts_of_two_samples(run):
    first, second = (found["skipped"] for found in run("engine", 2))
    assert "optimizer.step() was not called for the last one" in second
    assert first != "nothing"
