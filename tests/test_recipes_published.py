"""The recipes of published data sets: from files in their real formats to the reports, at the smallest size."""

import json
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

from dpfast.cli import app
from dpfast.data import ImageSet
from dpfast.data.prepare import prepare_store
from dpfast.data.standin import write_stand_in
from dpfast.data.store_writer import StoreWriter
from dpfast.diffusion.loading import load_unet
from dpfast.diffusion.models import CAMELYON17, CIFAR10, MNIST
from dpfast.errors import ConfigError, DataError, FileError
from dpfast.recipes import load
from dpfast.runs import inputs
from dpfast.runs.describe import describe_plan
from dpfast.runs.pipeline import execute, open_run
from test_runs import Recorder

SETS = {
    "mnist-small": ("mnist",),
    "cifar10-small": ("cifar10", "imagenet32"),
    "camelyon17-small": ("camelyon17", "imagenet32"),
}
LEAST = (
    "widths=[8, 8]", "norm_groups=4", "model.attention=[]", "pretrain.steps=2", "pretrain.batch_size=4",
    "private.steps=2", "private.sample_rate=0.1", "private.augmult=2", "target_delta=1e-3", "sample.count=20",
    "sample.steps=2", "shard_size=10", "baseline.steps=2", "baseline.sample_rate=0.1", "baseline.augmult=1",
    "extractor_steps=2", "evaluate.steps=2", "evaluate.batch_size=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("mnist", "cifar10", "imagenet32", "camelyon17"):
        write_stand_in(name, folder / "source" / name, train=100, test=40)
        prepare_store(name, folder / "source" / name, folder / name, partial=True)
    shutil.copytree(folder / "cifar10", folder / "copy")
    manifest = folder / "copy/store.json"
    manifest.write_text(manifest.read_text().replace('"name": "cifar10"', '"name": "copy"'))
    return folder


@pytest.mark.parametrize("name", SETS)
def test_from_files_to_reports(name, stores, tmp_path):
    count = ["public_count=40"] if name == "mnist-small" else []
    run = execute(load(name, [*LEAST, *count, f"data.folder={stores}"]), tmp_path, Recorder())
    metrics = json.loads(run.directory.metrics.read_text())
    assert {"synthetic", "public_only", "real", "dp_classifier"} <= metrics["accuracy"].keys()
    assert metrics["epsilon_spent"] <= 10
    page = run.directory.release_report.read_text()
    assert str(stores) not in page
    knew = "nothing: there was no pre-training" if name == "mnist" else "public images only"
    assert f"when it knew {knew}" in page
    model = load_unet(run.directory.model)
    assert model.config["num_class_embeds"] == run.private.num_classes + 1
    assert ("public_classifier" in metrics["accuracy"]) == (name == "mnist-small")  # ImageNet has other classes


def test_other_public_images_of_the_same_name_begin_anew(stores, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(stores, folder, ignore=shutil.ignore_patterns("source"))
    settings = [*LEAST, f"data.folder={folder}"]
    run = execute(load("cifar10-small", settings), tmp_path / "runs", Recorder(), until="pretrain")
    assert run.stages["pretrain"].done()
    moved = folder.rename(tmp_path / "elsewhere")
    assert (
        open_run(load("cifar10-small", [*LEAST, f"data.folder={moved}"]), tmp_path / "runs").stages["pretrain"].done()
    )
    shutil.rmtree(moved / "imagenet32")
    write_stand_in("imagenet32", tmp_path / "other", train=100, test=40, seed=1)
    prepare_store("imagenet32", tmp_path / "other", moved / "imagenet32", partial=True)
    again = open_run(load("cifar10-small", [*LEAST, f"data.folder={moved}"]), tmp_path / "runs")
    assert not again.stages["pretrain"].done()


def test_some_of_the_public_images_are_of_all_classes(tmp_path):
    """Of a store that is sorted by class; each once, the same for the same seed."""
    numbers = np.arange(1000)
    pixels = np.zeros((1000, 3, 32, 32), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = numbers // 256, numbers % 256
    with StoreWriter(tmp_path / "imagenet32", name="imagenet32", classes=tuple("0123456789")) as writer:
        writer.add("train", 1000, [(pixels, numbers // 100)])
        writer.finish(source=[])

    def drawn(count, *settings):
        return inputs.public_data(load("cifar10", [f"data.folder={tmp_path}", f"public_count={count}", *settings]))

    some = drawn(100)
    assert some.labels.bincount(minlength=10).min() > 0
    places = 256 * some.images[:, 0, 0, 0].long() + some.images[:, 0, 0, 1]
    assert len(places.unique()) == len(some) == 100
    assert some.labels.equal(places // 100)
    assert some.images.untyped_storage().nbytes() == 100 * 3 * 32 * 32
    assert some.fingerprint() == drawn(100).fingerprint() != drawn(100, "seed=1").fingerprint()
    assert drawn(0).fingerprint() == drawn(1000).fingerprint() == drawn(1001).fingerprint()


@pytest.mark.parametrize("method", ["attention", "lora"])
def test_other_ways_to_fine_tune(method, stores, tmp_path):
    """The released model opens in plain diffusers, whatever was trained."""
    settings = [*LEAST, f"data.folder={stores}", "model.attention=[1]", f"private.method={method}", "private.rank=2"]
    run = execute(load("cifar10-small", [*settings, "clipping=automatic"]), tmp_path, Recorder(), until="train")
    before, after = (load_unet(path).state_dict() for path in (run.directory.public_model, run.directory.model))
    assert before.keys() == after.keys()
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved
    assert all("attentions" in name or "class_embedding" in name for name in moved)


@pytest.mark.parametrize(("name", "spec"), [("cifar10", CIFAR10), ("camelyon17", CAMELYON17), ("mnist", MNIST)])
def test_networks_are_the_presets(name, spec):
    recipe = load(name)
    for key, value in vars(recipe.model).items():
        assert getattr(spec, key) == value, key


@pytest.mark.parametrize(
    ("name", "images", "renyi"), [("cifar10", 50_000, 2.62), ("camelyon17", 302_436, 0.80), ("mnist", 60_000, 2.44)]
)
def test_the_noise_of_the_full_recipes(name, images, renyi, tmp_path):
    """Planned without data: Renyi accounting asks for what others found, privacy loss distributions for less."""
    run = open_run(load(name, ["data.folder=nowhere"]), tmp_path, elsewhere=True)
    assert len(run.private) == images
    said = dict(describe_plan(run.recipe))["noise multiplier"]
    used, others = map(float, re.fullmatch(r"([\d.]+), by .* would ask for ([\d.]+)\)", said).groups())
    assert others == pytest.approx(renyi, rel=0.02)
    assert used == run.plan.noise_multiplier < others
    with pytest.raises(ConfigError, match=f"data.private = 'zeros:{name}'.*zeros are to plan with"):
        open_run(run.recipe, tmp_path)


def test_a_dry_run_predicts_for_each_kind_of_device(stores, tmp_path):
    words = ["run", "cifar10-small", "--dry-run", "--runs", str(tmp_path)]
    words += [part for setting in (*LEAST, f"data.folder={stores}") for part in ("--set", setting)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"on this CPU +predicted without classifiers: about .*: pretrain .*, train .*, sample .* MB", result.stdout
    )
    assert re.search(r"on h200 +predicted", result.stdout)
    assert "measured on a few steps" in result.stdout
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_here_can_be_planned_for(tmp_path):
    settings = (*LEAST, "data.folder=nowhere", "performance.device=cuda", "public_count=40", "target_delta=1e-5")
    result = CliRunner().invoke(
        app,
        [
            "run",
            "mnist-small",
            "--dry-run",
            "--runs",
            str(tmp_path),
            *(part for setting in settings for part in ("--set", setting)),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "as many images as are published" in result.stderr
    assert "measured" not in result.stdout


@pytest.mark.parametrize(("gone", "there"), [("imagenet32", "cifar10"), ("cifar10", "imagenet32")])
def test_images_of_zeros_stand_for_missing_stores_alone(gone, there, stores, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / there).symlink_to(stores / there)
    settings = [*LEAST, "target_delta=1e-6", f"data.folder={tmp_path / 'data'}"]
    run = open_run(load("cifar10-small", settings), tmp_path, elsewhere=True)
    assert {run.recipe.data.private, run.recipe.data.public} == {f"zeros:{gone}", there}
    sizes = {"cifar10": 50_000, "imagenet32": 1_281_167} | {there: 100}
    private, public = run.private, inputs.public_data(run.recipe)
    assert [len(private), len(public)] == [sizes["cifar10"], sizes["imagenet32"]]
    assert [bool(private.images[:5].any()), bool(public.images[:5].any())] == [there == "cifar10", gone == "cifar10"]


def test_images_of_zeros_are_not_read_to_be_planned_with(tmp_path, monkeypatch):
    """Camelyon17 would be 0.9 GB of them."""
    monkeypatch.setattr(ImageSet, "fingerprint", lambda self: pytest.fail(f"{len(self)} images were read"))
    run = open_run(load("camelyon17", ["data.folder=nowhere"]), tmp_path, elsewhere=True)
    others = inputs.private_data(load("camelyon17", ["data.private=zeros:cifar10"]))
    assert run.private.fingerprint() == inputs.private_data(run.recipe).fingerprint() != others.fingerprint()
    assert run.private.images.untyped_storage().nbytes() == 1


def test_only_published_data_can_be_planned_for_without_them(tmp_path):
    for change, said in (
        ("data.public=mine", "no store in nowhere/mine"),
        ("data.public=zeros:mine", "'mine'; name one"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_run(load("cifar10", ["data.folder=nowhere", change]), tmp_path, elsewhere=True)


def test_a_private_store_without_a_test_split_is_refused(stores, tmp_path):
    with StoreWriter(tmp_path / "data" / "mine", name="mine", classes=("a", "b")) as writer:
        writer.add("train", 2, [(np.zeros((2, 3, 32, 32), np.uint8), np.arange(2))])
        writer.finish(source=[])
    (tmp_path / "data" / "imagenet32").symlink_to(stores / "imagenet32")
    settings = [*LEAST, "data.private=mine", f"data.folder={tmp_path / 'data'}"]
    with pytest.raises(DataError, match=r"mine: no split 'test', on which accuracies .*only train; add .*test/.*again"):
        execute(load("cifar10-small", settings), tmp_path / "runs", Recorder())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.private=cifar100"], "dpfast data prepare cifar100 --source"),
        (["data.public=mnist"], "--size 32"),
        (["data.public=cifar10"], "without any protection"),
        (["data.public=copy"], "without any protection"),
        (["data.public=digits"], "without any protection"),
        (["private.method=attention"], "no attention"),
        (["data.public=fonts", "public_count=10"], "grey and square"),
        (["data.fold=1"], "only digits have folds"),
        (["public_count=100000"], r"public_count = 100000: there are \d+; 0 is for all"),
        (["private.shift=32"], "private.shift = 32: expected less than the 32 pixels"),
    ],
)
def test_data_that_do_not_fit_are_refused(changes, said, stores, tmp_path):
    with pytest.raises(ConfigError, match=said):
        open_run(load("cifar10-small", [*LEAST, f"data.folder={stores}", *changes]), tmp_path)


def test_a_damaged_store_is_not_trained_on(stores, tmp_path):
    shutil.copytree(stores, tmp_path / "data")
    images = tmp_path / "data" / "cifar10" / "train" / "images.npy"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    with pytest.raises(FileError, match=r"images.npy: expected sha256"):
        execute(load("cifar10-small", [*LEAST, f"data.folder={tmp_path}/data"]), tmp_path / "runs", Recorder())
    assert not (tmp_path / "runs" / "cifar10-small" / "state" / "train").exists()
