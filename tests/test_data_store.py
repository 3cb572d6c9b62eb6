"""Stores: mapped and not read, whole or not there, what they say of themselves, and the commands of both."""

import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import published
from dpfast import cli
from dpfast.data import ImageSet
from dpfast.data.formats import PUBLISHED
from dpfast.data.prepare import prepare_store
from dpfast.data.shards import ShardFolder
from dpfast.data.store import open_store, read_store
from dpfast.data.store_writer import StoreWriter
from dpfast.errors import DataError, FileError, RunLocked
from published import images, labels, write

PIXELS, LABELS = images(12), labels(12)


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "source", published.cifar10_binary(PIXELS, LABELS))


@pytest.fixture
def store(tmp_path, source):
    prepare_store("cifar10", source, tmp_path / "store", partial=True)
    return tmp_path / "store"


def chunks(count, size, shape=(3, 32, 32), classes=10):
    """``count`` images made when they are asked for, the i-th of them of value i % 251."""
    for start in range(0, count, size):
        numbers = np.arange(start, min(start + size, count))
        values = (numbers % 251).astype(np.uint8)
        yield np.broadcast_to(values.reshape(-1, 1, 1, 1), (len(values), *shape)), numbers % classes


def written(folder, count=10, size=4, **options):
    with StoreWriter(folder, name="made", classes=tuple("0123456789"), **options) as writer:
        writer.add("train", count, chunks(count, size))
        return writer.finish(source=[])


def test_an_opened_split_is_an_image_set_that_knows_its_store(store):
    found = open_store(store, "train", name="cifar10")
    assert isinstance(found, ImageSet)
    assert found.images.dtype == torch.uint8
    assert np.array_equal(found.images.numpy(), PIXELS[:10])
    assert found.labels.tolist() == LABELS[:10]
    assert found.classes == tuple(published.CIFAR10_NAMES)
    assert found.store.partial
    assert found.store.name == "cifar10"
    assert type(found.select([1])) is ImageSet
    copy = ImageSet(torch.tensor(PIXELS[:10]), torch.tensor(LABELS[:10]), found.classes)
    assert found.fingerprint() == copy.fingerprint()


def test_the_files_are_npy_files_that_numpy_reads(store):
    assert np.array_equal(np.load(store / "test" / "images.npy"), PIXELS[10:])
    assert np.load(store / "test" / "labels.npy").tolist() == LABELS[10:]
    assert np.load(store / "test" / "labels.npy").dtype == np.int64


def maps(tensor):
    """The file that the memory of a tensor is mapped from, "" for none."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return (line.split(maxsplit=5) + [""] * 6)[5]
    return ""


def resident():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def test_tensors_are_mapped_and_may_be_larger_than_memory(tmp_path):
    """A file that is one large hole takes no disk; read, or reserved, it would take twice the memory of the machine."""
    with StoreWriter(tmp_path / "store", name="made", classes=("a",)) as writer:
        writer.add("train", 2, chunks(2, 2, (3, 256, 256), classes=1))
        writer.finish(source=[])
    count = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (3 * 256 * 256)
    manifest = json.loads((tmp_path / "store" / "store.json").read_text())
    split = manifest["splits"]["train"]
    for name, dtype, shape in (("images", "|u1", (count, 3, 256, 256)), ("labels", "<i8", (count,))):
        with open(tmp_path / "store" / "train" / f"{name}.npy", "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
            split[name]["bytes"] = os.fstat(file.fileno()).st_size
    split["count"] = count
    (tmp_path / "store" / "store.json").write_text(json.dumps(manifest))
    before = resident()
    found = open_store(tmp_path / "store", "train")
    assert found.images[torch.tensor([7, count - 1])].sum() == 0
    assert resident() - before < 50e6
    assert maps(found.images) == str(tmp_path / "store" / "train" / "images.npy")
    assert maps(found.labels) == str(tmp_path / "store" / "train" / "labels.npy")


def test_writing_to_the_tensors_changes_no_file_and_no_other_reader(store):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = open_store(store, "train")
    before = (store / "train" / "images.npy").read_bytes()
    found.images.zero_()
    found.labels.zero_()
    assert (store / "train" / "images.npy").read_bytes() == before
    assert open_store(store, "train", verify=True).images.any()


def test_preparing_and_writing_hold_a_few_chunks_whatever_their_number(tmp_path):
    size, chunk = 256, 256 * 3072
    peaks = []
    for count in (8, 64):
        tracemalloc.start()
        written(tmp_path / str(count), count * size, size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 4 * chunk
    assert peaks[1] < peaks[0] + chunk / 2


@pytest.mark.parametrize("name", ["scans", "mnist"])
def test_reading_large_files_holds_a_few_chunks(tmp_path, name, monkeypatch):
    """64 chunks of 64 images, 3.2 MB in all."""
    for module in ("npz", "idx"):
        monkeypatch.setattr(f"dpfast.data.formats.{module}.CHUNK", 64)
    pixels = images(4096, 28, 28)
    if name == "scans":
        files = {"x.npz": published.npz(images=pixels, labels=labels(4096))}
    else:
        stems = [f"train-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1")]
        files = dict(
            zip(stems, (published.idx(pixels.tobytes(), 4096, 28, 28), published.idx(bytes(4096), 4096)), strict=True)
        )
    source = write(tmp_path / "source", files)
    prepare_store(name, source, tmp_path / "first", partial=name == "mnist")  # what is imported and cached once
    tracemalloc.start()
    prepare_store(name, source, tmp_path / "store", partial=name == "mnist")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def test_equal_sources_give_equal_bytes(tmp_path, store):
    elsewhere = write(tmp_path / "elsewhere", published.cifar10_binary(PIXELS, LABELS))
    prepare_store("CIFAR-10", elsewhere, tmp_path / "again", partial=True)
    files = sorted(path.relative_to(store) for path in store.rglob("*") if path.is_file())
    assert len(files) == 5
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (store / file).read_bytes()


def test_preparing_again_leaves_an_equal_store_and_refuses_another(tmp_path, source, store):
    before = (store / "store.json").stat()
    prepare_store("cifar10", source, store, partial=True)
    assert (store / "store.json").stat().st_ino == before.st_ino
    for options, said in ({"size": 16}, "resizing"), ({"name": "other"}, "name 'cifar10', expected 'other'"):
        name = options.pop("name", "cifar10")
        files = (
            source
            if name == "cifar10"
            else write(tmp_path / "own", {"x.npz": published.npz(images=PIXELS, labels=LABELS)})
        )
        with pytest.raises(
            DataError, match=rf"store holds another store \({said}.*choose another folder, or remove it"
        ):
            prepare_store(name, files, store, partial=name == "cifar10", **options)
    (source / "test_batch.bin").write_bytes((source / "data_batch_1.bin").read_bytes())
    with pytest.raises(DataError, match=r"another store \(made from other files\)"):
        prepare_store("cifar10", source, store, partial=True)
    (tmp_path / "full" / "x").mkdir(parents=True)
    with pytest.raises(DataError, match="full is there already and is no store; choose another folder"):
        prepare_store("cifar10", source, tmp_path / "full", partial=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "own", "source", "store"]


def test_resizing_arrays_is_recorded(tmp_path, source):
    small = prepare_store("cifar10", source, tmp_path / "small", size=16, partial=True)
    assert small.shape == (3, 16, 16)
    assert "16x16: averaged over areas (box)" in small.resizing
    squares = PIXELS[10:].reshape(2, 3, 16, 2, 16, 2).astype(float).mean((3, 5))
    assert np.abs(open_store(tmp_path / "small", "test").images.numpy() - squares).max() <= 1  # it rounds twice


def test_an_interrupted_preparation_leaves_nothing_that_looks_like_a_store(tmp_path, source):
    def interrupted(step, total, message):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_store("cifar10", source, tmp_path / "store", partial=True, progress=interrupted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_what_a_kill_leaves_is_overwritten_and_never_read(tmp_path):
    shutil.copytree(written(tmp_path / "other") and tmp_path / "other", tmp_path / ".store.tmp")
    (tmp_path / ".store.tmp" / "junk").write_bytes(b"x")
    with pytest.raises(FileError, match=r"store.json cannot be read .*give the folder of a store, or remove"):
        open_store(tmp_path / "store", "train")
    written(tmp_path / "store")
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["store.json", "train"]
    assert not (tmp_path / ".store.tmp").exists()


def test_one_process_writes_a_store(tmp_path):
    with StoreWriter(tmp_path / "store", name="made", classes=("a",)) as first:
        with pytest.raises(RunLocked, match="another process is writing"):
            written(tmp_path / "store")
        first.add("train", 2, chunks(2, 2, classes=1))
        first.finish(source=[])
    assert len(open_store(tmp_path / "store", "train", verify=True)) == 2


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"images.npy \(No space left on device\); make room"):
        written(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_all_images_of_all_splits(tmp_path, source):
    seen = []
    prepare_store("cifar10", source, tmp_path / "store", partial=True, progress=lambda *call: seen.append(call))
    assert seen == [
        (2, 12, "train"),
        (4, 12, "train"),
        (6, 12, "train"),
        (8, 12, "train"),
        (10, 12, "train"),
        (12, 12, "test"),
    ]


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    cases = {
        "expected 11 images, got 10": (11, chunks(10, 4)),
        "expected 3 images, got none": (3, iter(())),
        "expected some images, got none": (0, iter(())),
        r"images from 4: expected uint8 \[m, 3, 32, 32\], got uint8 \[4, 1, 8, 8\]": (
            8,
            [next(chunks(4, 4)), next(chunks(4, 4, (1, 8, 8)))],
        ),
        "got float64": (4, [(np.zeros((4, 3, 8, 8)), np.zeros(4, int))]),
        "expected 4 labels, got 3": (4, [(np.zeros((4, 3, 8, 8), np.uint8), np.zeros(3, int))]),
        r"labels must lie in 0\.\.9 .*got 10": (11, [next(chunks(11, 11, classes=11))]),
    }
    for said, (count, parts) in cases.items():
        with StoreWriter(tmp_path / "store", name="x", classes=tuple("0123456789")) as writer:
            with pytest.raises(DataError, match=f"split 'train'.*{said}"):
                writer.add("train", count, parts)
            with pytest.raises(DataError, match="expected at least one split, got none"):
                StoreWriter.finish(StoreWriter(tmp_path / "store", name="x", classes=("a",)), source=[])
    assert list(tmp_path.iterdir()) == []


def test_a_store_of_another_data_set_or_without_the_split_is_refused(store):
    with pytest.raises(DataError, match="holds 'cifar10', expected 'mnist'; give the folder of that store"):
        open_store(store, "train", name="mnist")
    with pytest.raises(DataError, match="has the splits train, test, expected 'val'; choose one of them"):
        open_store(store, "val")


def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("file", ["images.npy", "labels.npy"])
def test_files_of_another_size_or_shape_are_refused_before_they_are_mapped(store, file):
    whole = (store / "train" / file).read_bytes()
    for change in (whole[:-1], whole + b"0", whole[:20], b"", whole.replace(b"(10,", b"(11,")):
        (store / "train" / file).write_bytes(change)
        with pytest.raises(FileError, match=rf"train/{file}.*remove the folder and prepare the store again"):
            open_store(store, "train")
    (store / "train" / file).unlink()
    with pytest.raises(FileError, match=rf"{file} cannot be read .*No such file"):
        open_store(store, "train")


def test_a_changed_byte_is_found_when_asked_for(store):
    damage(store / "train" / "images.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    open_store(store, "train")
    with pytest.raises(FileError, match=r"train/images.npy: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}") as caught:
        open_store(store, "train", verify=True)
    assert "labels.npy" not in str(caught.value)
    assert "prepare the store again" in str(caught.value)


def test_labels_out_of_range_are_refused_with_the_store(store):
    damage(store / "train" / "labels.npy", lambda content: content[:-8] + (10).to_bytes(8, "little"))
    with pytest.raises(
        DataError, match=r"(?s)store/train: .*labels must lie in 0\.\.9 .*got 0\.\.10.*prepare the store again"
    ):
        open_store(store, "train")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.pop("splits"), "store.json is damaged .'splits'"),
        (lambda value: value["splits"]["train"].pop("count"), "is damaged .'count'"),
        (lambda value: value.update(extra=1), "is damaged .*extra"),
        (lambda value: value.update(shape=None), "is damaged"),
        (lambda value: value.update(format="dpfast-store-2"), "expected a store of format 'dpfast-store-1'"),
    ],
)
def test_a_manifest_that_is_damaged_or_of_another_version_is_refused(store, change, said):
    value = json.loads((store / "store.json").read_text())
    change(value)
    (store / "store.json").write_text(json.dumps(value))
    with pytest.raises(FileError, match=f"{said}.*prepare the store again"):
        read_store(store)


def test_nothing_that_reads_files_is_imported_before_it_is_used(tmp_path):
    code = "import sys, dpfast.data; print([m for m in ('h5py', 'pyarrow', 'PIL') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert output.stdout == "[]\n"


# The commands


def call(*arguments, code=0):
    result = CliRunner().invoke(cli.app, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_prepare_says_what_it_made_and_show_what_is_there(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("prepare", "CIFAR-10", "--source", source, "--partial").stdout
    assert "data/cifar10" in said
    assert "cifar10 (a part, or a stand-in)" in said
    assert "train 10, test 2" in said
    shown = call("show", "data/cifar10", "--verify").stdout
    rows = dict(line.split(maxsplit=1) for line in shown.splitlines() if line.strip())
    counts = [LABELS[:10].count(2), LABELS[10:].count(2)]
    assert rows["bird"].split() == list(map(str, counts))
    assert "all classes     10     2" in shown
    assert "all as written" in shown
    store = read_store(tmp_path / "data" / "cifar10")
    assert f"{store.splits['test'].images.sha256}  test/images.npy" in shown
    assert all(f"{file['sha256']}  {file['file']}" in shown for file in store.source)


def test_show_verifies_only_when_asked(store):
    damage(store / "test" / "images.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    assert "as written" not in call("show", store).stdout
    assert "test/images.npy: expected sha256" in call("show", store, "--verify", code=2).stderr


def test_errors_of_the_commands_are_lines(tmp_path):
    said = call("prepare", "mnist", "--source", tmp_path, code=2)
    assert "error: MNIST is not in" in said.stderr
    assert "Traceback" not in said.output
    assert "error: " in call("show", tmp_path, code=2).stderr


def test_export_writes_pictures_with_what_they_promise(tmp_path):
    samples = tmp_path / "samples"
    made = ShardFolder.claim(samples, {"count": 12, "shard_size": 5, "classes": ["an ox", "b"]})
    pixels = torch.tensor(PIXELS)
    for (number, numbers), part in zip(made, pixels.split(5), strict=True):
        made.write(number, part, numbers)
    assert "PRIVACY.md is missing" in call("export", samples, "--out", tmp_path / "out", code=2).stderr
    for name in ("PRIVACY.md", "privacy.json"):
        (samples / name).write_text(name)
    said = call("export", samples, "--out", tmp_path / "out").stdout
    assert f"{tmp_path / 'out'}: 12 images" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "an_ox", "b", "manifest.json", "PRIVACY.md", "privacy.json",
    }  # fmt: skip
    for number, image in enumerate(pixels):
        picture = Image.open(tmp_path / "out" / ("an_ox", "b")[number % 2] / f"{number:07d}.png")
        assert np.array_equal(np.asarray(picture), image.permute(1, 2, 0))
    for folder, cure in ((tmp_path, f"give {samples}"), (tmp_path / "out" / "b", "make samples")):
        assert f"holds no manifest.json; {cure}" in call("export", folder, "--out", tmp_path / "out", code=2).stderr


@pytest.mark.parametrize("command", ["prepare", "show", "export"])
def test_help_has_examples_and_names_every_published_data_set(command):
    said = call(command, "--help").stdout
    assert f"dpfast data {command}" in said
    assert "Examples:" in said
    if command == "prepare":
        assert [name for name in PUBLISHED if name not in said] == []
        for layout in ("train/cat/1.png", "train_images", "columns image"):
            assert layout in said
