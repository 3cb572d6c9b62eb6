"""Runs: stages done once, resumed after any interruption, never paid for twice; two outputs."""

import json
import math
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.data import real_digits
from dpfast.errors import ConfigError, FileError, RunLocked
from dpfast.privacy import Ledger, Plan, read_ledger
from dpfast.progress import coarse_duration, duration
from dpfast.recipes import load, parts
from dpfast.report.internal import ROWS
from dpfast.runs import inputs, pipeline
from dpfast.runs.directory import RunDirectory
from dpfast.runs.metrics import Results
from dpfast.runs.pipeline import execute, open_run
from dpfast.runs.stages import Stage
from dpfast.runs.terminal import TerminalProgress

TINY = (
    "name=tiny", "widths=[8, 8]", "norm_groups=4", "public_count=40", "pretrain.steps=3", "pretrain.batch_size=8",
    "private.steps=4", "private.sample_rate=0.05", "private.augmult=2", "target_epsilon=1", "sample.count=20",
    "sample.steps=2", "shard_size=10", "baseline.steps=4", "baseline.sample_rate=0.05", "baseline.augmult=1",
    "extractor_steps=2", "evaluate.steps=2", "seeds=2", "counts=[10]",
)  # fmt: skip
EDM = ("process=edm", "sampler=heun")
PLAN = Plan(dataset_size=10, expected_batch_size=1, max_grad_norm=1.0, steps=5, target_delta=1e-3, noise_multiplier=1.0)


def silent(step, total, message):
    pass


class Recorder(TerminalProgress):
    """Says nothing, remembers all, and raises when a stage reaches a step."""

    def __init__(self, stop=None):
        super().__init__()
        self.said, self.steps, self._current, self._stop = [], [], "", stop

    def stage(self, name, *, resumed=False):
        self._current = name

    def say(self, text):
        self.said.append(text)

    def __call__(self, step, total, message):
        self.steps.append((self._current, step))
        if (self._current, step) == self._stop:
            raise KeyboardInterrupt


# The parts


def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from dpfast.runs.directory import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=tmp_path)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(RunLocked, match=rf"process {other.pid}.*--name"), RunDirectory(tmp_path).locked():
            pass
    finally:
        other.kill()
        other.communicate()
    with RunDirectory(tmp_path).locked():  # the lock of a killed process is gone
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def stage(folder, value=1, ledger=False, new=None, defaults=None):
    path = folder / "train" / "ledger.jsonl" if ledger else None
    values, outputs = {"private.steps": value, **(new or {})}, [folder / "out"]
    options = {"outputs": outputs, "defaults": defaults, "ledger": path}
    return Stage("train", folder / "train", values, title="training", act=fail, **options)


def finish(entry, output):
    with entry.working(silent):
        output.write_text("made")


def test_a_stage_is_done_once_and_redone_when_its_recipe_changes(tmp_path):
    finish(stage(tmp_path), tmp_path / "out")
    assert stage(tmp_path).done()
    assert not stage(tmp_path, value=2).done()
    with stage(tmp_path, value=2).working(silent):
        assert not (tmp_path / "out").exists()
    assert not stage(tmp_path, value=2).done(), "its output is missing"


def test_a_stage_whose_output_was_deleted_is_done_again(tmp_path):
    finish(stage(tmp_path), tmp_path / "out")
    (tmp_path / "out").unlink()
    assert not stage(tmp_path).done()


def fail(entry, error, before=lambda: None):
    with entry.working(silent):
        before()
        raise error


def test_seconds_add_up_over_interruptions(tmp_path):
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error):
            fail(stage(tmp_path), error, lambda: time.sleep(0.03))
    assert 0.06 <= stage(tmp_path).seconds < 5
    assert not stage(tmp_path).done()


@pytest.mark.parametrize("charged", [0, 1])
def test_a_changed_recipe_is_refused_once_budget_is_spent(tmp_path, charged):
    def spend():
        with Ledger(tmp_path / "train" / "ledger.jsonl", PLAN) as ledger:
            for step in range(charged):
                ledger.charge(step + 1)

    with pytest.raises(KeyboardInterrupt):
        fail(stage(tmp_path, ledger=True), KeyboardInterrupt, spend)
    stage(tmp_path, ledger=True).check()
    changed = stage(tmp_path, value=2, ledger=True)
    if not charged:
        changed.check()
        return
    with pytest.raises(ConfigError, match=r"private\.steps was 1, is now 2[\s\S]*--name"):
        changed.check()
    with pytest.raises(ConfigError), changed.working(silent):
        pass
    assert read_ledger(tmp_path / "train" / "ledger.jsonl").charged_steps == charged


@pytest.mark.parametrize(
    ("value", "defaults", "was"),
    [
        ("flat", {"private.clipping": "flat"}, None),
        ("automatic", {"private.clipping": "flat"}, "'flat'"),
        ("flat", {}, "None"),
    ],
)
def test_a_key_that_is_newer_than_the_record_is_no_change_at_its_default(tmp_path, value, defaults, was):
    old = stage(tmp_path, ledger=True)
    finish(old, tmp_path / "out")
    with Ledger(tmp_path / "train" / "ledger.jsonl", PLAN) as ledger:
        ledger.charge(1)
    new = stage(tmp_path, ledger=True, new={"private.clipping": value}, defaults=defaults)
    assert new.done() == (was is None)
    if was is None:
        new.check()
        assert new.parts == old.parts, "checkpoints carry their fingerprint"
    else:
        with pytest.raises(ConfigError, match=rf"private\.clipping was {was}, is now '{value}'"):
            new.check()
    changed = stage(tmp_path, value=2, ledger=True, new={"private.clipping": value}, defaults=defaults)
    with pytest.raises(ConfigError, match=r"private\.steps was 1, is now 2"):
        changed.check()


def test_a_damaged_ledger_counts_as_spent(tmp_path):
    finish(stage(tmp_path, ledger=True), tmp_path / "out")
    (tmp_path / "train" / "ledger.jsonl").write_text("nonsense\n")
    with pytest.raises(ConfigError, match="already spent"):
        stage(tmp_path, value=2, ledger=True).check()


def test_a_lost_record_of_spent_budget_is_named(tmp_path):
    finish(stage(tmp_path, ledger=True), tmp_path / "out")
    with Ledger(tmp_path / "train" / "ledger.jsonl", PLAN) as ledger:
        ledger.charge(1)
    (tmp_path / "train" / "stage.json").write_text("{")
    with pytest.raises(ConfigError, match=r"already spent[\s\S]*unknown: \S*stage\.json is missing or damaged"):
        stage(tmp_path, ledger=True).check()


def test_results_are_kept_as_they_come(tmp_path):
    Results(tmp_path / "r.json")["a"] = 1.0
    assert "a" in Results(tmp_path / "r.json")
    with pytest.raises(FileError, match="lacks 'b'; delete it"):
        Results(tmp_path / "r.json")["b"]
    for content in ("[1, 2]", '{"a": 1'):
        (tmp_path / "r.json").write_text(content)
        with pytest.raises(FileError, match=r"r\.json is damaged.*delete it and run the same command again"):
            Results(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3 s"), (75, "1 min 15 s"), (7260, "2 h 1 min"), (1e8, "1,157 days")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.9, "under a minute"), (60, "about 1 minute"), (170, "about 3 minutes"), (7300, "about 2 hours")],
)
def test_coarse_duration(seconds, text):
    assert coarse_duration(seconds) == text


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    reporter = TerminalProgress(sys.stdout)
    reporter.stage("train")
    for step in range(1, 5):
        reporter(step, 4, "private training")
    assert capsys.readouterr().out == "  private training 3/4, about 6 s left\n"


# Whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished tiny run, interrupted once in each of its long stages."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    for stop in (("pretrain", 2), ("train", 2), ("baseline", 3)):
        with pytest.raises(KeyboardInterrupt):
            execute(load("digits", TINY), folder, Recorder(stop))
    arguments = [part for setting in TINY for part in ("--set", setting)]
    result = CliRunner().invoke(app, ["run", "digits", "--runs", str(folder), *arguments])
    assert result.exit_code == 0, result.output
    (folder / "output.txt").write_text(result.stdout)
    return folder


def test_the_command_ends_with_the_table_and_the_reports(runs):
    text = (runs / "output.txt").read_text()
    for said in ("360 real test images", *(row.name for row in ROWS), "epsilon 1 "):
        assert said in text
    for folder in ("release", "internal"):
        assert str(runs / "tiny" / folder / "report.html") in text


def test_an_interrupted_run_charges_every_step_once(runs):
    ledger = read_ledger(runs / "tiny" / "state" / "train" / "ledger.jsonl")
    assert ledger.charged_steps == ledger.plan.steps == 4
    baseline = read_ledger(runs / "tiny" / "internal" / "baselines" / "dp_classifier" / "ledger.jsonl")
    assert baseline.charged_steps == 4


def test_metrics_hold_what_later_tools_read(runs):
    metrics = json.loads((runs / "tiny" / "internal" / "metrics.json").read_text())
    assert 0.99 < metrics["epsilon_spent"] <= 1
    assert (metrics["delta"], metrics["steps"], metrics["augmult"]) == (1e-4, 4, 2)
    assert metrics["noise_multiplier"] > 0
    assert set(metrics["accuracy"]) >= {"synthetic", "public_only", "real", "dp_classifier"}
    assert set(metrics["frechet"]) == {"synthetic", "public_only", "extractor"}
    assert set(metrics["seconds"]) == {"pretrain", "train", "sample", "baseline", "evaluate", "report"}
    assert all(value > 0 for value in metrics["seconds"].values())
    assert metrics["epsilon_composed"] > metrics["epsilon_spent"]
    assert len(metrics["accuracy_by_seed"]["synthetic"]) == 2
    assert [point["count"] for point in metrics["accuracy_by_count"]] == [10, 20]
    assert metrics["accuracy_by_count"][-1]["accuracies"] == metrics["accuracy_by_seed"]["synthetic"]
    for name, scores in metrics["scores"].items():
        assert (scores["real_images"], scores["synthetic_images"]) == (1437, 20)
        assert (scores["fid"], scores["extractor"]) == (metrics["frechet"][name], metrics["frechet"]["extractor"])


def test_the_release_is_complete_and_every_part_carries_its_statement(runs):
    release = runs / "tiny" / "release"
    for folder in (release, release / "model", release / "samples"):
        statement = json.loads((folder / "privacy.json").read_text())
        assert statement["steps_charged"] == 4
        assert (folder / "PRIVACY.md").read_text().startswith("# Privacy statement")
    assert {path.name for path in release.iterdir()} == {
        "model", "samples", "privacy.json", "PRIVACY.md", "report.html",
    }  # fmt: skip
    shard = np.load(release / "samples" / "shard-00000.npz")
    assert shard["images"].shape == (10, 1, 8, 8)
    assert (release / "samples" / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_every_folder_that_must_stay_says_so(runs):
    marked = {path.parent.name for path in (runs / "tiny").rglob("DO_NOT_RELEASE.txt")}
    assert marked == {"internal", "state"}
    assert "keep it in the house" in (runs / "tiny" / "state" / "DO_NOT_RELEASE.txt").read_text()


def test_the_baseline_says_what_releasing_both_costs(runs):
    folder = runs / "tiny" / "internal" / "baselines" / "dp_classifier"
    metrics = json.loads((runs / "tiny" / "internal" / "metrics.json").read_text())
    (composition,) = json.loads((folder / "privacy.json").read_text())["compositions"]
    assert composition["epsilon"] == metrics["epsilon_composed"] > metrics["epsilon_spent"]
    shown = math.ceil(1000 * metrics["epsilon_composed"]) / 1000
    said = f"Released together with {composition['other']}, from the same images: epsilon = {shown:g}"
    assert said in (folder / "PRIVACY.md").read_text()
    assert "Released together" not in (runs / "tiny" / "release" / "PRIVACY.md").read_text()


def test_the_released_files_can_be_read_by_whom_the_umask_lets(runs):
    mask = os.umask(0)
    os.umask(mask)
    files = [path for path in (runs / "tiny" / "release").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}


def test_nothing_measured_on_private_images_is_released(runs):
    release, metrics = runs / "tiny" / "release", json.loads((runs / "tiny/internal/metrics.json").read_text())
    text = "".join(p.read_text() for p in release.rglob("*") if p.suffix in (".html", ".json", ".md"))
    distances = [value for value in metrics["frechet"].values() if isinstance(value, float)]
    assert [value for value in distances if str(value)[:7] in text] == []
    assert not re.search(r"accurac(y|ies) (of|on)", text, re.IGNORECASE)
    assert metrics["frechet"]["extractor"] not in text
    assert real_digits("train").fingerprint() not in text
    assert str(runs) not in text


def test_samples_drawn_anew_leave_no_report_of_the_old_ones(runs):
    reports = [runs / "tiny" / folder / "report.html" for folder in ("release", "internal")]
    execute(load("digits", [*TINY, "sample.count=40"]), runs, Recorder(), until="sample")
    assert [path for path in reports if path.exists()] == []
    execute(load("digits", TINY), runs, Recorder())
    assert all(path.exists() for path in reports)


def test_the_released_model_loads_with_diffusers(runs):
    from diffusers import DDPMScheduler, UNet2DModel

    folder = runs / "tiny" / "release" / "model"
    model = UNet2DModel.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    said = json.loads((folder / "classes.json").read_text())
    assert said == {"classes": list("0123456789"), "no class (guidance)": model.config["num_class_embeds"] - 1}
    scheduler = DDPMScheduler.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        output = model(torch.zeros(1, 1, 8, 8), 5, torch.tensor([10])).sample
    assert output.isfinite().all()
    assert scheduler.config.prediction_type == load("digits").diffusion.prediction


def test_damaged_results_are_named_and_deleting_them_helps(runs):
    results = runs / "tiny" / "internal" / "results.json"
    results.write_text(results.read_text()[:40])
    with pytest.raises(FileError, match=r"results\.json is damaged.*delete it"):
        execute(load("digits", TINY), runs, Recorder())
    results.unlink()
    recorder = Recorder()
    execute(load("digits", TINY), runs, recorder)
    assert {name for name, _ in recorder.steps} == {"evaluate", "report"}


def test_changing_the_evaluation_trains_nothing_private_again(runs):
    recorder = Recorder()
    execute(load("digits", [*TINY, "seeds=1"]), runs, recorder)
    assert {name for name, _ in recorder.steps} == {"evaluate", "report"}
    assert [line for line in recorder.said if "done before" in line] == [
        f"{name}: done before" for name in ("pretrain", "train", "sample", "baseline")
    ]
    assert len(json.loads((runs / "tiny/internal/metrics.json").read_text())["accuracy_by_seed"]["real"]) == 1


def test_more_samples_cost_no_privacy(runs):
    recorder = Recorder()
    execute(load("digits", [*TINY, "sample.count=30"]), runs, recorder, until="sample")
    assert {name for name, _ in recorder.steps} == {"sample"}
    assert len(list((runs / "tiny" / "release" / "samples").glob("shard-*.npz"))) == 3
    assert (runs / "tiny" / "release" / "samples" / "PRIVACY.md").exists()


@pytest.mark.parametrize(
    "change", ["target_epsilon=2", "pretrain.steps=4", "seed=1", "private.learning_rate=1e-3", "fold=1"]
)
def test_what_a_spent_budget_depends_on_cannot_change(runs, change):
    key = change.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{key} was .*, is now [\s\S]*--name"):
        execute(load("digits", [*TINY, change]), runs, Recorder())


def test_other_private_images_under_the_same_recipe_are_refused(runs, monkeypatch):
    others = inputs.private_data(load("digits", TINY))
    others.images[0, 0, 0, 0] ^= 1
    monkeypatch.setattr(inputs, "private_data", lambda recipe: others)
    with pytest.raises(ConfigError, match="private images was"):
        execute(load("digits", TINY), runs, Recorder())


def test_who_draws_samples_does_not_matter(runs):
    execute(load("digits", TINY), runs, Recorder(), until="sample")
    other = load("digits", [*TINY, 'sample.devices=["cpu", "cpu"]', "sample.compile=true"])
    assert open_run(other, runs).stages["sample"].done()


def test_other_test_images_are_measured_anew(runs, monkeypatch):
    monkeypatch.setattr(inputs, "test_data", lambda recipe: real_digits("test").select(range(300)))
    assert not open_run(load("digits", TINY), runs).stages["evaluate"].done()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sample.count=25", "multiple of the 10 classes"),
        ("sample.steps=2000", "sampling steps"),
        ("timesteps=[[1.0, 500, 2000]]", "timestep mixture"),
        ("process=edm", r"sample\.sampler = 'ddim': expected 'heun' .*--set sample\.sampler=heun"),
        ("sampler=heun", r"sample\.sampler = 'heun': expected 'ddim' or 'ddpm' .*--set sample\.sampler=ddim"),
        ((*EDM, "timesteps=[[1.0, 0, 500]]"), r"private\.timesteps = \[\[1.0, 0.0, 500.0\]\]: expected \[\]"),
        ((*EDM, "sample.steps=1"), "HeunSampler: steps=1: expected 2 or more"),
        ("norm_groups=3", "norm_groups"),
        ("performance.device=nowhere", "performance.device = 'nowhere': it cannot be used here"),
        pytest.param(
            "performance.device=cuda",
            r"performance\.device = 'cuda'.*--set performance\.device=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_would_fail_late_is_refused_before_anything_is_spent(tmp_path, change, said):
    changes = [change] if isinstance(change, str) else change
    with pytest.raises(ConfigError, match=said):
        open_run(load("digits", [*TINY, *changes]), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop", [("pretrain", 3), ("train", 2)])
def test_a_run_goes_on_that_was_begun_before_there_was_a_key(tmp_path, monkeypatch, stop):
    """Stopped in pre-training once its checkpoint is there, and in the training once budget is spent."""
    new = ("diffusion.process", "diffusion.sigma_data", "diffusion.p_mean", "diffusion.p_std")
    with monkeypatch.context() as before:
        before.setattr(pipeline, "parts", lambda *of: {k: v for k, v in parts(*of).items() if k not in new})
        with pytest.raises(KeyboardInterrupt):
            execute(load("digits", TINY), tmp_path, Recorder(stop))
    if stop[0] == "train":
        with pytest.raises(ConfigError, match=r"diffusion\.process was 'ddpm', is now 'edm'\n.*--name"):
            execute(load("digits", [*TINY, *EDM]), tmp_path, Recorder())
    recorder = Recorder()
    execute(load("digits", TINY), tmp_path, recorder, until="train")
    assert not [name for name, _ in recorder.steps if name == "pretrain"], "nothing of it is done again"
    assert read_ledger(tmp_path / "tiny" / "state" / "train" / "ledger.jsonl").charged_steps == 4


def test_an_edm_run_from_recipe_to_images(tmp_path):
    """Whoever has its release folder draws from it with diffusers alone."""
    from diffusers import EDMEulerScheduler, UNet2DModel

    settings = [*TINY, *EDM, "sigma_data=0.4", "guidance=1.5", "sample.steps=3", "baseline.steps=1", "seeds=1"]
    with pytest.raises(KeyboardInterrupt):
        execute(load("digits", settings), tmp_path, Recorder(("train", 2)))
    folder = execute(load("digits", settings), tmp_path, Recorder()).directory.model
    recorder = Recorder()
    execute(load("digits", settings), tmp_path, recorder, until="sample")
    assert recorder.said == [f"{name}: done before" for name in ("pretrain", "train", "sample")]
    for change in ("sigma_data=0.5", "p_mean=-1"):
        with pytest.raises(ConfigError, match=rf"{change.partition('=')[0]} was .*, is now"):
            open_run(load("digits", [*settings, change]), tmp_path)
    model = UNet2DModel.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    scheduler = EDMEulerScheduler.from_pretrained(folder, local_files_only=True)
    assert scheduler.config.sigma_data == 0.4
    scheduler.set_timesteps(3)
    images = scheduler.init_noise_sigma * torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model(scheduler.scale_model_input(images, t), t, torch.tensor([3, 4])).sample
            images = scheduler.step(output, t, images).prev_sample
    assert images.isfinite().all()
    assert images.abs().max() < 10  # of the order of pixels, not of sigma_max


def test_a_run_without_pretraining_says_so(tmp_path):
    recipe = load("digits", [*TINY, "pretrain.steps=0", "baseline.steps=1", "private.steps=1", "seeds=1"])
    run = execute(recipe, tmp_path, Recorder())
    page = run.directory.release_report.read_text()
    assert "there was no pre-training" in page
    assert "Public pre-training: loss" not in page


def test_a_run_without_noise_does_not_call_itself_a_release(tmp_path):
    execute(load("digits", [*TINY, "target_epsilon=inf", "baseline.steps=1", "private.steps=1", "seeds=1"]),
            tmp_path, Recorder())  # fmt: skip
    assert not (tmp_path / "tiny" / "release").exists()
    assert (tmp_path / "tiny" / "not-private" / "DO_NOT_RELEASE.txt").exists()
    page = (tmp_path / "tiny" / "not-private" / "report.html").read_text()
    assert "NOT PRIVATE" in page
    assert json.loads((tmp_path / "tiny/internal/metrics.json").read_text())["epsilon_spent"] == "inf"
