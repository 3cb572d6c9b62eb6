"""Samplers: exact on a model whose answer is known, resumable by shard."""

import copy
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dpfast.data.export import write_class_folders
from dpfast.data.shards import load_shards
from dpfast.diffusion import NoiseSpec, UNetSpec, build_scheduler, build_unet
from dpfast.diffusion.sampler import generate, generate_shards, sampling_scheduler
from dpfast.errors import ConfigError, DataError, FileError

SHAPE = (1, 4, 4)
CLASSES = ("a", "b")


class PointModel(nn.Module):
    """The exact v for data that are one constant image per class: ``level[label]`` in every pixel."""

    def __init__(self, scheduler, levels):
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels))
        self.alphas = scheduler.alphas_cumprod
        self.calls: list[int] = []

    def forward(self, noisy, t, labels):
        self.calls.append(len(noisy))
        signal = self.alphas[t].sqrt()[:, None, None, None]
        sigma = (1 - signal**2).sqrt()
        clean = self.levels[labels][:, None, None, None].expand_as(noisy)
        noise = (noisy - signal * clean) / sigma
        return signal * noise - sigma * clean


@pytest.fixture
def scheduler():
    return build_scheduler(NoiseSpec())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_are_the_images_the_model_knows(scheduler, sampler):
    model = PointModel(scheduler, [-0.5, 0.5, 0.0])
    labels = torch.tensor([0, 1, 1, 0, 1])
    state = torch.get_rng_state()
    images = generate(
        model, scheduler, labels, image_shape=SHAPE, num_classes=2, sampler=sampler, steps=30, batch_size=2
    )
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.where(labels == 0, 64, 191)[:, None, None, None].expand(-1, *SHAPE)
    assert images.dtype == torch.uint8
    assert (images.int() - expected).abs().max() <= 1


def test_guidance_doubles_the_batch_only_when_it_acts(scheduler):
    labels = torch.tensor([0, 1, 0])
    for guidance, rows in [(1.0, 3), (1.5, 6)]:
        model = PointModel(scheduler, [-0.5, 0.5, 0.0])
        images = generate(model, scheduler, labels, image_shape=SHAPE, num_classes=2, steps=5, guidance=guidance)
        assert model.calls == [rows] * 5
        # Guided prediction of the clean image: null + guidance * (level - null), null = 0.
        expected = round((guidance * 0.5 + 1) * 127.5)
        assert abs(int(images[1].max()) - expected) <= 1


def test_seeds_and_empty_requests(scheduler):
    model = build_unet(UNetSpec(image_size=4, widths=(8,), norm_groups=4), seed=0)
    labels = torch.arange(6) % 2

    def sample(**options):
        return generate(model, scheduler, labels, image_shape=SHAPE, num_classes=10, steps=3, **options)

    assert torch.equal(sample(seed=1), sample(seed=1))
    assert not torch.equal(sample(seed=1), sample(seed=2))
    assert generate(model, scheduler, labels[:0], image_shape=SHAPE, num_classes=10).shape == (0, *SHAPE)


def test_first_step_is_the_noisiest(scheduler):
    for sampler in ("ddim", "ddpm"):
        derived = sampling_scheduler(scheduler, sampler, 25)
        assert int(derived.timesteps[0]) == 999
        assert len(derived.timesteps) == 25
        assert derived.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(("sampler", "steps", "message"), [("euler", 5, "ddim"), ("ddim", 0, "1000")])
def test_bad_sampler(scheduler, sampler, steps, message):
    with pytest.raises(ConfigError, match=message):
        sampling_scheduler(scheduler, sampler, steps)


def shards(scheduler, folder, *, levels=(-0.5, 0.5, 0.0), progress=lambda *_: None, **options):
    settings = {"count": 10, "shard_size": 4, "image_shape": SHAPE, "classes": CLASSES, "steps": 3, "seed": 1}
    model = PointModel(scheduler, list(levels))
    result = generate_shards(model, scheduler, folder, **(settings | options), progress=progress)
    return model, result


def test_the_order_of_what_diffusers_notes_does_not_matter(scheduler, tmp_path):
    """It differs from process to process."""
    shards(scheduler, tmp_path)
    other = copy.deepcopy(scheduler)
    other.register_to_config(_use_default_values=["trained_betas", "thresholding"])
    again, _ = shards(other, tmp_path)
    assert not again.calls


def test_shards_are_balanced_and_resumable(scheduler, tmp_path):
    first, whole = shards(scheduler, tmp_path / "a")
    assert whole.labels.bincount().tolist() == [5, 5]
    assert whole.classes == CLASSES
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "manifest.json", "shard-00000.npz", "shard-00001.npz", "shard-00002.npz",
    ]  # fmt: skip
    again, same = shards(scheduler, tmp_path / "a")
    assert first.calls
    assert not again.calls
    assert same.load().fingerprint() == whole.load().fingerprint() == load_shards(tmp_path / "a").fingerprint()


@pytest.mark.parametrize("devices", [["cpu"], ["cpu", "cpu"]])
def test_devices_share_the_shards(scheduler, tmp_path, devices):
    """Who draws a shard does not matter."""
    _, whole = shards(scheduler, tmp_path / "a")
    _, shared = shards(scheduler, tmp_path / "b", devices=devices)
    assert shared.load().fingerprint() == whole.load().fingerprint()


def test_an_error_in_one_shard_ends_the_sampling(scheduler, tmp_path):
    def stop(done, *_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shards(scheduler, tmp_path, devices=["cpu", "cpu"], progress=stop)
    _, whole = shards(scheduler, tmp_path)
    assert len(whole.load()) == 10


@pytest.mark.parametrize("devices", [[], ["cpu", "cpu"]])
def test_batches_are_reported_while_shards_are_drawn(scheduler, tmp_path, devices):
    """Of all devices together, in the thread that asked for them; a shard that is there counts as one."""
    heard, threads = [], set()

    def progress(*told):
        heard.append(told)
        threads.add(threading.get_ident())

    shards(scheduler, tmp_path, batch_size=1, devices=devices, progress=progress)
    assert heard == [(done, 10, "sampling") for done in range(1, 11)]
    assert threads == {threading.get_ident()}
    (tmp_path / "shard-00001.npz").unlink()
    heard.clear()
    shards(scheduler, tmp_path, batch_size=1, progress=progress)
    assert [done for done, *_ in heard] == [4, 5, 6, 7, 8, 10]


def test_a_shard_counts_as_drawn_once_it_is_written(scheduler, tmp_path):
    written = []

    def progress(done, *_):
        written.append((done, len(list(tmp_path.glob("*.npz")))))

    shards(scheduler, tmp_path, shard_size=10, batch_size=5, progress=progress)
    assert written == [(5, 0), (10, 1)]


@pytest.fixture
def interrupts():
    """Ctrl-C is heard, as not in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("devices", [[], ["cpu", "cpu"]])
def test_an_interrupt_waits_for_one_batch_of_each_device(scheduler, tmp_path, monkeypatch, devices):
    """Ctrl-C in the second of a hundred; what is then made is what would have been."""
    begun, forward, lock = [], PointModel.forward, threading.Lock()

    def slow(self, noisy, t, labels):
        with lock:
            begun.append(len(noisy))
            if len(begun) == 2:
                os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)  # the main thread hears of it meanwhile
        return forward(self, noisy, t, labels)

    monkeypatch.setattr(PointModel, "forward", slow)
    options = {"count": 200, "shard_size": 100, "batch_size": 1, "steps": 1, "devices": devices}
    with pytest.raises(KeyboardInterrupt):
        shards(scheduler, tmp_path / "a", **options)
    assert len(begun) <= 2 + len(devices)
    assert not list((tmp_path / "a").glob("*.npz"))
    monkeypatch.undo()
    _, whole = shards(scheduler, tmp_path / "a", **options)
    _, other = shards(scheduler, tmp_path / "b", **options)
    assert whole.load().fingerprint() == other.load().fingerprint()


def test_a_model_is_left_in_its_mode_when_sampling_is_stopped(scheduler):
    def stop(*_):
        raise KeyboardInterrupt

    model = PointModel(scheduler, [-0.5, 0.5, 0.0]).train()
    with pytest.raises(KeyboardInterrupt):
        generate(model, scheduler, torch.zeros(3).long(), image_shape=SHAPE, num_classes=2, steps=1, progress=stop)
    assert model.training


def test_a_network_that_fails_ends_the_sampling(scheduler, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PointModel, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        shards(scheduler, tmp_path)


def test_precision_is_a_setting_of_the_samples(scheduler, tmp_path):
    shards(scheduler, tmp_path)
    with pytest.raises(DataError, match=r"other settings \(dtype\)"):
        shards(scheduler, tmp_path, dtype=torch.bfloat16)


def test_the_network_computes_in_the_dtype_and_the_sampler_does_not(scheduler):
    seen = []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x, t, labels):
            seen.append((x.dtype, self.layer(x).dtype))
            return self.layer(x)

    generate(
        Network(), scheduler, torch.zeros(2).long(), image_shape=SHAPE, num_classes=2, steps=2, dtype=torch.bfloat16
    )
    assert seen == [(torch.float32, torch.bfloat16)] * 2


def test_the_first_images_of_each_class(scheduler, tmp_path):
    _, made = shards(scheduler, tmp_path)
    (tmp_path / "shard-00002.npz").unlink()
    whole = torch.cat([made.images(number, labels) for number, labels in list(made)[:2]])
    for label, images in enumerate(made.heads(3)):
        assert torch.equal(images, whole[label::2][:3])
    with pytest.raises(DataError, match="shard-00002"):
        made.heads(5)


def test_class_folders(scheduler, tmp_path):
    """Each image in the folder of its class, with the statement; what is there is not written again."""
    _, made = shards(scheduler, tmp_path / "samples")
    with pytest.raises(DataError, match="PRIVACY"):
        write_class_folders(tmp_path / "samples", tmp_path / "out")
    for name in ("PRIVACY.md", "privacy.json"):
        (tmp_path / "samples" / name).write_text("{}")
    assert write_class_folders(tmp_path / "samples", tmp_path / "out") == 10
    images = made.load()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(files) == 10
    for path in files:
        number = int(path.stem)
        assert path.parent.name == CLASSES[images.labels[number]]
        assert np.array_equal(np.asarray(Image.open(path)), images.images[number, 0])
    next(iter(files)).unlink()
    write_class_folders(tmp_path / "samples", tmp_path / "out")
    assert sum(path.stat().st_mtime_ns != at for path, at in files.items()) == 1
    assert (tmp_path / "out" / "PRIVACY.md").exists()


def test_class_folders_of_other_samples_are_not_mixed(scheduler, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        shards(scheduler, tmp_path / name, seed=seed)
        for file in ("PRIVACY.md", "privacy.json"):
            (tmp_path / name / file).write_text(name)
    write_class_folders(tmp_path / "a", tmp_path / "out")
    with pytest.raises(DataError, match=r"other settings \(seed\)"):
        write_class_folders(tmp_path / "b", tmp_path / "out")
    assert (tmp_path / "out" / "PRIVACY.md").read_text() == "a"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.png").touch()
    with pytest.raises(DataError, match="not empty"):
        write_class_folders(tmp_path / "a", tmp_path / "full")


def test_classes_that_would_share_a_folder(scheduler, tmp_path):
    shards(scheduler, tmp_path, classes=("a/b", "a b"))
    with pytest.raises(DataError, match="told apart"):
        write_class_folders(tmp_path, tmp_path / "out")


def test_damaged_shard_is_made_again(scheduler, tmp_path):
    _, whole = shards(scheduler, tmp_path)
    before = whole.load()
    shard = tmp_path / "shard-00001.npz"
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(DataError, match="shard-00001"):
        load_shards(tmp_path)
    model, repaired = shards(scheduler, tmp_path)
    assert model.calls == [4, 4, 4]
    assert repaired.load().fingerprint() == before.fingerprint()


@pytest.mark.parametrize("change", [{"seed": 2}, {"count": 12}, {"levels": (0.1, 0.2, 0.3)}, {"guidance": 2.0}])
def test_other_settings_are_refused(scheduler, tmp_path, change):
    _, whole = shards(scheduler, tmp_path)
    with pytest.raises(DataError, match=r"other settings \((seed|count|model|guidance)\)"):
        shards(scheduler, tmp_path, **change)
    assert load_shards(tmp_path).fingerprint() == whole.load().fingerprint()


def test_bad_counts_and_folders(scheduler, tmp_path):
    with pytest.raises(ConfigError, match="multiple of the 2 classes"):
        shards(scheduler, tmp_path, count=5)
    with pytest.raises(DataError, match="generate_shards"):
        load_shards(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FileError, match=r"manifest\.json is damaged.*remove the folder"):
        shards(scheduler, tmp_path)


def test_files_are_plain_numpy(scheduler, tmp_path):
    shards(scheduler, tmp_path)
    with np.load(tmp_path / "shard-00000.npz", allow_pickle=False) as shard:
        assert shard["images"].dtype == np.uint8
        assert shard["images"].shape == (4, *SHAPE)
        assert shard["labels"].tolist() == [0, 1, 0, 1]
    assert json.loads((tmp_path / "manifest.json").read_text())["count"] == 10
