"""A recipe on several ranks: what each stage shares, what one process would have made, what a kill leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_worker
from dpfast.privacy import read_ledger
from dpfast.recipes import load
from dpfast.runs.pipeline import open_run
from dpfast.runs.work import draw_samples

WORKER = Path(run_worker.__file__)
COMMAND = WORKER.with_name("command_worker.py")
TINY = (
    "name=tiny", "widths=[8, 8]", "norm_groups=4", "public_count=40", "pretrain.steps=3", "pretrain.batch_size=5",
    "private.steps=4", "private.sample_rate=0.05", "private.augmult=2", "target_epsilon=1", "sample.count=30",
    "sample.steps=2", "shard_size=10", "baseline.steps=2", "baseline.sample_rate=0.05", "baseline.augmult=1",
    "extractor_steps=2", "evaluate.steps=2", "seeds=2", "counts=[10]",
)  # fmt: skip
SETTINGS = [part for setting in TINY for part in ("--set", setting)]
pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.timeout(600)]


def launch(*command: str | Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    torchrun += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *torchrun, *command], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """What two ranks found, by rank, and one process; and their folders."""
    torch.set_num_threads(1)
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    done = launch(WORKER, "pieces", two)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [torch.load(two / f"pieces-{rank}.pt", weights_only=True) for rank in range(2)]
    return ranks, run_worker.pieces(one), two, one


# Pieces


def test_ranks_draw_the_images_of_one_process_each_once(pieces):
    (first, second), alone, two, one = pieces
    names = sorted(path.name for path in (one / "shards").iterdir())
    assert len(names) == 8  # seven shards and the manifest
    assert sorted(path.name for path in (two / "shards").iterdir()) == names
    assert all((one / "shards" / name).read_bytes() == (two / "shards" / name).read_bytes() for name in names)
    assert first["shards"]["drawn"] + second["shards"]["drawn"] == alone["shards"]["drawn"] == 7
    assert first["shards"]["there"] == second["shards"]["there"] == 26, "nobody leaves before all are drawn"


def test_rank_0_alone_hears_how_far_all_are(pieces):
    (first, second), alone, *_ = pieces
    assert alone["shards"]["heard"] == [(done, 26) for done in range(2, 27, 2)]
    heard = first["shards"]["heard"]
    assert heard == sorted(heard)
    assert heard[-1] == (26, 26)
    assert second["shards"]["heard"] == []


def test_ranks_that_would_draw_other_images_are_refused(pieces):
    (first, second), *_ = pieces
    for found in (first, second):
        assert "samples: rank 1 has another than rank 0" in found["shards"]["refused"]


@pytest.mark.parametrize("size", ["5", "1"])
def test_pretraining_on_ranks_is_that_of_one(pieces, size):
    """Of five images a rank has three, the other two; of one it has none."""
    (first, second), alone, *_ = pieces
    expected = alone["pretraining"][size]
    for found in (first["pretraining"][size], second["pretraining"][size]):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, value in expected["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(found["weights"][name], first["pretraining"][size]["weights"][name])


def test_pretraining_that_was_stopped_goes_on_from_the_checkpoint_of_rank_0(pieces):
    ranks, *_ = pieces
    assert [found["pretraining"]["checkpoint"] for found in ranks] == [True, False]
    for found in (rank["pretraining"] for rank in ranks):
        assert found["again"]["losses"] == found["5"]["losses"]
        assert all(torch.equal(found["again"]["weights"][name], t) for name, t in found["5"]["weights"].items())


def test_ranks_train_each_classifier_of_a_study_once(pieces):
    (first, second), alone, *_ = pieces
    assert first["studying"]["found"] == second["studying"]["found"] == alone["studying"]["found"]
    assert first["studying"]["trained"] + second["studying"]["trained"] == alone["studying"]["trained"] == 4
    assert first["studying"]["kept"] == 8, "rank 0 has all: accuracies and probabilities"
    assert second["studying"]["kept"] == 2 * second["studying"]["trained"]
    assert first["studying"]["same"]


# Whole runs


@pytest.fixture(scope="module", params=["undisturbed", "killed"])
def run(request, tmp_path_factory):
    """A finished tiny run on two ranks: how, its folder of runs, and what the command said."""
    folder = tmp_path_factory.mktemp("runs")
    command = ["run", "digits", "--runs", str(folder), *SETTINGS]
    if request.param == "killed":
        done = launch(WORKER, "killed", folder, *command, restarts=2)
    else:
        done = launch(COMMAND, folder, *command)
    assert done.returncode == 0, done.stderr[-6000:]
    return request.param, folder, done


def test_a_run_on_ranks_is_complete(run):
    _, folder, _ = run
    tiny = folder / "tiny"
    assert {path.name for path in (tiny / "release").iterdir()} == {
        "model", "samples", "privacy.json", "PRIVACY.md", "report.html",
    }  # fmt: skip
    ledger = read_ledger(tiny / "state" / "train" / "ledger.jsonl")
    assert ledger.charged_steps == ledger.plan.steps == 4
    assert read_ledger(tiny / "internal" / "baselines" / "dp_classifier" / "ledger.jsonl").charged_steps == 2
    assert json.loads((tiny / "release" / "privacy.json").read_text())["steps_charged"] == 4
    metrics = json.loads((tiny / "internal" / "metrics.json").read_text())
    assert [point["count"] for point in metrics["accuracy_by_count"]] == [10, 30]
    assert {name: len(values) for name, values in metrics["accuracy_by_seed"].items()} == {
        "synthetic": 2, "public_only": 2, "real": 2,
    }  # fmt: skip
    assert set(metrics["scores"]) == {"synthetic", "public_only"}
    assert all(stage.done() for stage in open_run(load("digits", TINY), folder).stages.values())
    assert not list((tiny / "state" / "evaluate").glob("rank-*")), "what ranks kept is in the results"


def test_the_samples_of_ranks_are_those_that_one_process_draws(run, tmp_path):
    _, folder, _ = run
    alone = open_run(load("digits", TINY), folder)
    draw_samples(alone, alone.recipe, alone.directory.model, tmp_path, lambda *_: None)
    names = [path.name for path in tmp_path.glob("shard-*.npz")]
    assert len(names) == 3
    for name in names:
        assert (tmp_path / name).read_bytes() == (alone.directory.samples / name).read_bytes()


def test_rank_0_alone_speaks(run):
    how, _, done = run
    if how == "killed":
        pytest.skip("torchrun says more of a kill")
    assert done.stdout.count("360 real test images") == 1
    for stage in ("pretrain", "train", "sample", "baseline", "evaluate", "report"):
        assert done.stderr.count(f"\n{stage}: done in") == 1
    assert "Traceback" not in done.stderr


def test_no_thread_of_the_process_group_is_left_to_abort_the_command_when_python_ends(run):
    how, folder, _ = run
    if how == "killed":
        pytest.skip("the threads of the undisturbed run were noted")
    for rank in range(2):
        left = (folder / f"threads-{rank}").read_text().split()
        assert left
        assert not [name for name in left if "gloo" in name]


def test_a_killed_run_measures_nothing_again_that_a_rank_has_kept(run):
    how, folder, done = run
    if how == "undisturbed":
        pytest.skip("nothing was killed")
    kept, missing = ((folder / name).read_text().splitlines() for name in ("kept", "missing"))
    assert not set(kept) & set(missing)
    assert done.stderr.count("\ntrain: done in") == 1
    assert done.stderr.count("\ntrain: done before") == 1, "the second kill came after the training"


# Errors


def test_an_error_of_all_ranks_is_said_once(tmp_path):
    done = launch("-m", "dpfast", "run", "digits", "--runs", tmp_path, "--set", "sample.count=25")
    assert done.returncode != 0
    assert done.stderr.count("multiple of the 10 classes") == 1
    assert not list(tmp_path.rglob("recipe.toml"))


def test_an_error_of_one_rank_is_said_by_that_rank():
    done = launch(WORKER, "alone", ".")
    assert done.returncode != 0
    assert done.stderr.count("only here") == 1
    assert "Connection" not in done.stderr
