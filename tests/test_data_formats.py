"""Published data sets in their files: the right pixels, labels and splits, and an error that says what is wrong."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest

import published
from dpfast.data.formats import PUBLISHED, canonical_name
from dpfast.data.prepare import prepare_store
from dpfast.data.store import open_store
from dpfast.errors import ConfigError, DataError, DPFastError, FileError
from published import images, labels, pack, python2, python3, with_bytes_keys, write, zipped


def made(tmp_path, name, source, **options):
    """The splits of a prepared data set, as arrays."""
    store = prepare_store(name, source, tmp_path / "store", partial=True, **options)
    return {
        split: open_store(tmp_path / "store", split, name=canonical_name(name), verify=True) for split in store.splits
    }


def check(splits, expected, classes=None):
    """expected: of each split its images [n, C, H, W] and labels."""
    assert {name: len(images) for name, images in splits.items()} == {name: len(e[1]) for name, e in expected.items()}
    for name, (pixels, numbers) in expected.items():
        assert np.array_equal(splits[name].images.numpy(), pixels)
        assert splits[name].labels.tolist() == list(numbers)
        if classes is not None:
            assert splits[name].classes == tuple(classes)


def parts(pixels, numbers, trained):
    return (pixels[:trained], numbers[:trained]), (pixels[trained:], numbers[trained:])


PIXELS, LABELS = images(12), labels(12)
FINE = labels(12, 100)
CIFAR10 = {
    "python 2": published.cifar10_python(PIXELS, LABELS, python2),
    "python 3": published.cifar10_python(PIXELS, LABELS, python3),
    "protocol 5": published.cifar10_python(PIXELS, LABELS, lambda value: pickle.dumps(value, 5)),
    "protocol 2 of python 3": published.cifar10_python(PIXELS, LABELS, lambda value: pickle.dumps(value, 2)),
    "keys of bytes": published.cifar10_python(PIXELS, LABELS, with_bytes_keys),
    "binary": published.cifar10_binary(PIXELS, LABELS),
}


@pytest.mark.parametrize("kind", CIFAR10)
@pytest.mark.parametrize("place", ["extracted", "its folder", "archive", "folder with the archive"])
def test_cifar10_in_every_version_and_place(tmp_path, kind, place):
    version = "binary" if kind == "binary" else "python"
    folder = "cifar-10-batches-bin" if kind == "binary" else "cifar-10-batches-py"
    if "archive" in place:
        archive = pack(tmp_path / "source" / f"cifar-10-{version}.tar.gz", CIFAR10[kind], folder)
        source = archive if place == "archive" else archive.parent
    else:
        source = write(tmp_path / "source" / folder, CIFAR10[kind])
        source = source if place == "its folder" else source.parent
    train, test = parts(PIXELS, LABELS, 10)
    check(made(tmp_path, "CIFAR-10", source), {"train": train, "test": test}, published.CIFAR10_NAMES)


@pytest.mark.parametrize("write_files", [published.cifar100_python, published.cifar100_binary])
def test_cifar100_has_the_fine_labels(tmp_path, write_files):
    source = write(tmp_path / "source", write_files(PIXELS, FINE))
    train, test = parts(PIXELS, FINE, 10)
    check(made(tmp_path, "cifar100", source), {"train": train, "test": test}, published.CIFAR100_NAMES)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mnist", "FashionMNIST"])
def test_mnist(tmp_path, name, packed):
    pixels = images(7, 1, 28, 28)
    files = published.mnist(pixels, LABELS[:7])
    source = write(tmp_path / "source" / "raw", zipped(files) if packed else files).parent
    train, test = parts(pixels, LABELS[:7], 5)
    splits = made(tmp_path, name, source)
    check(splits, {"train": train, "test": test})
    assert splits["train"].classes[9] == ("9" if name == "mnist" else "Ankle boot")


def test_two_data_sets_of_torchvision_in_one_folder_are_told_apart(tmp_path):
    both = {"MNIST": images(7, 1, 28, 28), "FashionMNIST": images(7, 1, 28, 28, seed=1)}
    for name, pixels in both.items():
        write(tmp_path / "source" / name / "raw", published.mnist(pixels, LABELS[:7]))
    for name, pixels in both.items():
        store = tmp_path / name
        prepare_store(name, tmp_path / "source", store, partial=True)
        assert np.array_equal(open_store(store, "train").images.numpy(), pixels[:5])


def area_means(pixels, factor):
    """[n, C, H, W] averaged over factor x factor squares, in float."""
    n, channels, height, width = pixels.shape
    squares = pixels.reshape(n, channels, height // factor, factor, width // factor, factor)
    return squares.astype(float).mean((3, 5))


@pytest.mark.parametrize("inside", [False, True])
def test_camelyon17_has_the_splits_of_wilds_and_is_averaged_to_32_pixels(tmp_path, inside):
    pixels = images(5, 3, 96, 96)
    root = write(tmp_path / "source" / "camelyon17_v1.0", published.camelyon17(pixels))
    splits = made(tmp_path, "camelyon17", root if inside else root.parent)
    for name in ("train", "id_val", "val", "test"):
        rows = [i for i, (_, split) in enumerate(published.CAMELYON) if split == name]
        assert splits[name].labels.tolist() == [published.CAMELYON[i][0][4] for i in rows]
        assert splits[name].images.shape == (len(rows), 3, 32, 32)
        assert (
            np.abs(splits[name].images.numpy() - area_means(pixels[rows], 3)).max() < 1
        )  # Pillow rounds twice: rows, then columns
    assert splits["val"].classes == ("normal", "tumor")
    assert "32x32" in splits["val"].store.resizing


def test_camelyon17_keeps_its_96_pixels_when_asked(tmp_path):
    pixels = images(5, 3, 96, 96)
    source = write(tmp_path / "source", published.camelyon17(pixels))
    assert np.array_equal(made(tmp_path, "camelyon17", source, size=96)["val"].images.numpy(), pixels[[1]])


@pytest.mark.parametrize("dumps", [None, python2, python3])
def test_imagenet32_counts_its_labels_from_one(tmp_path, dumps):
    pixels, numbers = images(22), [(97 * i + 999) % 1000 for i in range(22)]
    files = published.imagenet32(pixels, numbers, dumps)
    val = {name: files.pop(name) for name in list(files) if name.startswith("val")}
    source = write(tmp_path / "source" / "Imagenet32_train", files).parent
    write(source / "Imagenet32_val", val)
    train, test = parts(pixels, numbers, 20)
    check(made(tmp_path, "imagenet32", source), {"train": train, "val": test}, [str(i) for i in range(1, 1001)])


def test_imagenet32_takes_the_names_of_its_classes_from_the_map(tmp_path):
    source = write(tmp_path / "source", published.imagenet32(images(22), labels(22)))
    names = [f"n{i:08}" for i in range(1000)]
    lines = [f"{name} {i + 1} word" for i, name in enumerate(names)]
    (source / "map_clsloc.txt").write_text("\n".join(reversed(lines)) + "\n")
    assert made(tmp_path, "imagenet32", source)["val"].classes == tuple(names)
    (source / "map_clsloc.txt").write_text("\n".join(lines[1:]))
    with pytest.raises(DataError, match=r"map_clsloc.txt: expected a WordNet id for each of 1..1000, got 999; get it"):
        prepare_store("imagenet32", source, tmp_path / "other", partial=True)


class Planted:
    """Its pickle calls a function when it is read, and gives what comes back a state."""

    def __init__(self, function, *arguments, state=None):
        self.call = function, arguments, state

    def __reduce__(self):
        return self.call


def planted_in_a_batch(tmp_path, value, protocol):
    """CIFAR-10 with ``value`` among the pixels of data_batch_4."""
    batch = pickle.dumps({"labels": [1], "data": value}, protocol)
    return write(tmp_path / "source", {**CIFAR10["python 2"], "data_batch_4": batch})


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.mkdir, eval, np.fromfile, getattr, np.memmap])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_runs(tmp_path, function, protocol):
    there = tmp_path / "planted"
    arguments = {
        os.mkdir: (str(there),),
        eval: (f"__import__('os').mkdir({str(there)!r})",),
        np.memmap: (str(there), "u1", "w+", 0, 4),
        getattr: ("", "join"),
        np.fromfile: (__file__,),
    }[function]
    source = planted_in_a_batch(tmp_path, Planted(function, *arguments), protocol)
    with pytest.raises(FileError, match=r"data_batch_4: expected a pickle of arrays.*names .*Nothing of it was run"):
        prepare_store("cifar10", source, tmp_path / "store", partial=True)
    assert not there.exists()
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_numpy_never_sees_the_state_of_a_planted_dtype(tmp_path, protocol):
    """Its last number is flags, 63 among them that the bytes of an array are pointers to Python objects."""
    dtype = Planted(np.dtype, "u1", False, True, state=(3, "|", None, None, None, -1, -1, 63))
    make, arguments, (version, shape, _, order, content) = images(1, 3072)[:1].__reduce__()
    source = planted_in_a_batch(
        tmp_path, Planted(make, *arguments, state=(version, shape, dtype, order, content)), protocol
    )
    assert made(tmp_path, "cifar10", source)["train"].images[6].numpy().tobytes() == content


@pytest.mark.parametrize("protocol", [2, 5])
def test_an_array_that_is_never_filled_in_has_no_pixels(tmp_path, protocol):
    make, arguments, _ = PIXELS.__reduce__()
    source = planted_in_a_batch(tmp_path, Planted(make, *arguments), protocol)
    with pytest.raises(DataError, match=r"data_batch_4: data must be uint8 \[n, 3072\], got uint8 \(0,\)"):
        prepare_store("cifar10", source, tmp_path / "store", partial=True)


@pytest.mark.parametrize("kind", ["object", "datetime64[s]", "U4", "V8"])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path, kind):
    batch = {"labels": [1], "data": np.zeros((1, 3072), kind)}
    source = write(tmp_path / "source", {**CIFAR10["python 2"], "data_batch_1": python3(batch)})
    with pytest.raises(FileError, match=r"data_batch_1 cannot be read .*not of numbers"):
        prepare_store("cifar10", source, tmp_path / "store", partial=True)


def cut(content):
    return content[: len(content) // 2]


WRONG = {
    "a pickle cut in half": ("cifar10", {"data_batch_2": cut(CIFAR10["python 3"]["data_batch_2"])}, "truncated"),
    "no pickle": ("cifar10", {"test_batch": b"<html>404</html>"}, "cannot be read"),
    "a pickled list": ("cifar10", {"test_batch": python3([1, 2])}, "expected a pickled dict, got list"),
    "no labels": ("cifar10", {"test_batch": python3({"data": 1})}, r"'labels', got \['data'\]"),
    "floats": ("cifar10", {"test_batch": python3({"data": np.zeros((2, 3072)), "labels": [1, 2]})}, "got float64"),
    "a short row": ("cifar10", {"test_batch": python3({"data": PIXELS[:2, 0, 0], "labels": [1, 2]})}, r"\(2, 32\)"),
    "a label too few": (
        "cifar10",
        {"test_batch": python3({"data": published.rows(PIXELS[:2]), "labels": [1]})},
        "2 labels.*got 1",
    ),
    "a label out of range": (
        "cifar10",
        {"test_batch": python3({"data": published.rows(PIXELS[:2]), "labels": [9, 10]})},
        r"0\.\.9 \(10 classes\), got 10 at position 1",
    ),
    "nine names": ("cifar10", {"batches.meta": python3({"label_names": list("abcdefghi")})}, "names of 10 classes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_batch_is_said_with_its_file_and_a_cure(tmp_path, case):
    name, changed, said = WRONG[case]
    source = write(tmp_path / "source", {**CIFAR10["python 2"], **changed})
    (file,) = changed
    with pytest.raises(DPFastError, match=rf"{file}.*{said}.*get") as caught:
        prepare_store(name, source, tmp_path / "store", partial=True)
    assert isinstance(caught.value, DataError | FileError)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_binary_records_cut_short_or_mislabelled(tmp_path, name):
    whole = {"cifar10": published.cifar10_binary(PIXELS, LABELS), "cifar100": published.cifar100_binary(PIXELS, FINE)}[
        name
    ]
    file, record = ("test_batch.bin", 3073) if name == "cifar10" else ("test.bin", 3074)
    source = write(tmp_path / "short", {**whole, file: whole[file][:-1]})
    with pytest.raises(DataError, match=rf"{file}: expected records of {record} bytes, got .* truncated"):
        prepare_store(name, source, tmp_path / "store", partial=True)
    label = record - 3073
    changed = whole[file][:label] + b"\xc8" + whole[file][label + 1 :]
    source = write(tmp_path / "mislabelled", {**whole, file: changed})
    with pytest.raises(DataError, match=rf"{file}: labels must lie in .* got 200 at position 0"):
        prepare_store(name, source, tmp_path / "store", partial=True)


@pytest.mark.parametrize("name", ["../data_batch_1", "/etc/passwd", "cifar-10-batches-py/../../x"])
def test_an_archive_that_leads_out_of_itself_is_refused(tmp_path, name):
    files = {f"cifar-10-batches-py/{key}": value for key, value in CIFAR10["python 2"].items()}
    source = pack(tmp_path / "source" / "cifar-10-python.tar.gz", {**files, name: b"x"})
    with pytest.raises(FileError, match=r"cifar-10-python.tar.gz: member .* leads out .*Nothing was extracted"):
        prepare_store("cifar10", source, tmp_path / "store", partial=True)


def test_an_archive_with_a_link_is_refused_and_a_truncated_one_named(tmp_path):
    path = pack(tmp_path / "source" / "cifar-10-python.tar.gz", CIFAR10["python 2"], "cifar-10-batches-py")
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(FileError, match=r"cifar-10-python.tar.gz cannot be read .*truncated or damaged: get it again"):
        prepare_store("cifar10", path, tmp_path / "store", partial=True)
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member, io.BytesIO())
    with pytest.raises(FileError, match="leads out of the archive"):
        prepare_store("cifar10", path, tmp_path / "store", partial=True)


def test_an_archive_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dpfast.data.formats.packages._LARGEST", 20_000)
    path = pack(tmp_path / "source" / "cifar-10-python.tar.gz", CIFAR10["python 2"], "cifar-10-batches-py")
    with pytest.raises(FileError, match="expected files of at most 20,000 bytes in all; give the published archive"):
        prepare_store("cifar10", path, tmp_path / "store", partial=True)


IDX = published.mnist(images(7, 1, 28, 28), LABELS[:7])
IMAGES, NUMBERS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
WRONG_IDX = {
    "labels where images belong": ({IMAGES: IDX[NUMBERS]}, IMAGES, "magic number 00000803, got 00000801 00000005"),
    "no idx": ({NUMBERS: b"<html>404 not found</html>"}, NUMBERS, "magic number 00000801, got 3c68746d"),
    "empty": ({NUMBERS: b""}, NUMBERS, "magic number 00000801, got an empty file"),
    "cut short": ({IMAGES: IDX[IMAGES][:-1]}, IMAGES, "expected 3,936 bytes .* got 3,935"),
    "a byte too many": ({NUMBERS: IDX[NUMBERS] + b"0"}, NUMBERS, "expected 13 bytes .* got 14"),
    "a label too few": ({NUMBERS: published.idx(bytes(4), 4)}, IMAGES, r"expected 4 images .* got \(5, 28, 28\)"),
    "other sizes": ({IMAGES: published.idx(bytes(45), 5, 3, 3)}, IMAGES, r"28x28 .* got \(5, 3, 3\)"),
    "mislabelled": ({NUMBERS: published.idx(bytes([0, 1, 10, 2, 3]), 5)}, NUMBERS, "got 10 at position 2"),
}


@pytest.mark.parametrize("case", WRONG_IDX)
def test_what_is_wrong_with_an_idx_file_is_said(tmp_path, case):
    changed, file, said = WRONG_IDX[case]
    source = write(tmp_path / "source", {**IDX, **changed})
    with pytest.raises(DataError, match=f"{file}: .*{said}.*get"):
        prepare_store("mnist", source, tmp_path / "store", partial=True)


@pytest.mark.parametrize("file", [IMAGES, NUMBERS])
def test_a_truncated_gzip_file_leaves_no_store(tmp_path, file):
    files = zipped(IDX)
    source = write(tmp_path / "source", {**files, f"{file}.gz": files[f"{file}.gz"][:-9]})
    with pytest.raises(FileError, match=rf"{file}.gz cannot be read .*truncated"):
        prepare_store("mnist", source, tmp_path / "store", partial=True)
    files[f"{NUMBERS}.gz"] = gzip.compress(IDX[NUMBERS] + b"more")
    with pytest.raises(DataError, match=rf"{NUMBERS}.gz: holds more than its header says"):
        prepare_store("mnist", write(tmp_path / "source", files), tmp_path / "store", partial=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_camelyon17_says_what_is_missing_or_strange(tmp_path):
    files = published.camelyon17(images(5, 3, 96, 96))
    patch = next(name for name in files if "node_3" in name)
    changes = {
        "1 of 5 patches named in metadata.csv are missing, the first of them patches/patient_042_node_3": {patch: None},
        r"expected 96x96 pixels, got \(95, 96\)": {patch: published.picture(images(1, 3, 95, 96)[0])},
        "patch_patient_042_node_3_x_5_y_6.png cannot be decoded": {patch: cut(files[patch])},
        "lacks center": {"metadata.csv": files["metadata.csv"].replace(b"center", b"hospital")},
        "column tumor: labels must lie in 0..1": {
            "metadata.csv": files["metadata.csv"].replace(b",1,23,2,1", b",2,23,2,1")
        },
        "got center 5 and split 0 in row 4": {"metadata.csv": files["metadata.csv"].replace(b"49,4,0", b"49,5,0")},
        "metadata.csv cannot be read": {"metadata.csv": files["metadata.csv"] + b"5,x,y"},
    }
    for number, (said, change) in enumerate(changes.items()):
        content = {name: value for name, value in {**files, **change}.items() if value is not None}
        source = write(tmp_path / str(number), content)
        with pytest.raises(DPFastError, match=f"{said}.*(again|remove)"):
            prepare_store("camelyon17", source, tmp_path / "store", partial=True)


def test_imagenet32_labels_of_zero_and_other_arrays_are_refused(tmp_path):
    files = published.imagenet32(images(22), labels(22))
    data = published.rows(images(2))
    changes = {
        r"labels must lie in 1\.\.1000 \(1000 classes\), got 0": {"data": data, "labels": [5, 0]},
        "got float32": {"data": data.astype(np.float32), "labels": [1, 2]},
        r"one row per label, got uint8 \(2, 3072\)": {"data": data, "labels": [1, 2, 3]},
        "expected an array 'data', got labels": {"labels": [1, 2]},
    }
    for said, arrays in changes.items():
        source = write(tmp_path / "source", {**files, "train_data_batch_7.npz": published.npz(**arrays)})
        with pytest.raises(DataError, match=f"train_data_batch_7.npz: .*{said}"):
            prepare_store("imagenet32", source, tmp_path / "store", partial=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_data_set_says_where_it_is_published_and_what_to_place(tmp_path, name):
    known = PUBLISHED[name].published
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            DataError, match=r"is not in .*expected .*get it from.*place there.*downloads nothing"
        ) as caught:
            prepare_store(name, source, tmp_path / "store")
        assert known.url in str(caught.value)
        assert known.files in str(caught.value)


def test_missing_files_are_listed_unless_a_part_is_asked_for(tmp_path):
    files = {
        name: content
        for name, content in CIFAR10["binary"].items()
        if name not in ("data_batch_2.bin", "test_batch.bin")
    }
    source = write(tmp_path / "source", files)
    with pytest.raises(DataError, match=r"expected data_batch_2.bin, test_batch.bin in source, found none"):
        prepare_store("cifar10", source, tmp_path / "store")
    assert {name: len(split) for name, split in made(tmp_path, "cifar10", source).items()} == {"train": 8}
    idx = {name: content for name, content in IDX.items() if not name.startswith("t10k-l")}
    with pytest.raises(DataError, match="expected t10k-labels-idx1-ubyte in"):
        prepare_store("mnist", write(tmp_path / "mnist", idx), tmp_path / "store", partial=True)


def test_another_size_or_checksum_than_published_is_refused_without_partial(tmp_path):
    binary = write(tmp_path / "binary", CIFAR10["binary"])
    with pytest.raises(DataError, match=r"expected train 50,000, test 10,000, got train 10, test 2; .*--partial"):
        prepare_store("cifar10", binary, tmp_path / "store")
    python = write(tmp_path / "python", CIFAR10["python 2"])
    with pytest.raises(FileError, match="not as CIFAR-10 was published") as caught:
        prepare_store("cifar10", python, tmp_path / "store")
    lines = str(caught.value).splitlines()
    assert len(lines) == 8  # all six batches, not the names
    assert f"{python}/data_batch_1: expected MD5 c99cafc152244af753f735de768cd75f, got " in lines[1]
    assert "get these files again from https://www.cs.toronto.edu" in lines[-1]


def test_names_of_published_data_sets_have_one_spelling():
    assert [canonical_name(name) for name in ("CIFAR-10", "Fashion_MNIST", "My-Scans")] == [
        "cifar10",
        "fashionmnist",
        "My-Scans",
    ]
    with pytest.raises(ConfigError, match=r"got '\.\./x'"):
        canonical_name("../x")
