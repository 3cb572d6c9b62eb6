"""One's own images: class folders, npz, HDF5, Parquet and Arrow files."""

import io
import json

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from dpfast.data.formats import reading
from dpfast.data.prepare import prepare_store
from dpfast.data.store import open_store
from dpfast.errors import ConfigError, DataError, DPFastError, FileError
from published import images, labels, npz, picture, write

PIXELS = images(6, 3, 8, 8)
GREY = images(6, 1, 8, 8)


def made(tmp_path, source, name="scans", **options):
    store = prepare_store(name, source, tmp_path / "store", **options)
    return {split: open_store(tmp_path / "store", split, name=name, verify=True) for split in store.splits}


def refused(tmp_path, source, said, error=DataError, **options):
    with pytest.raises(error, match=f"(?s){said}") as caught:
        prepare_store("scans", source, tmp_path / "store", **options)
    assert not (tmp_path / "store").exists()
    return str(caught.value)


def same(found, pixels, numbers):
    assert np.array_equal(found.images.numpy(), pixels)
    assert found.labels.tolist() == list(numbers)


# Class folders


def test_a_class_folder_without_splits_is_train_in_the_order_of_torchvision(tmp_path):
    files = {"dog/b.png": 0, "dog/a.png": 1, "cat/deep/z.PNG": 2, "cat/y.png": 3, "10/x.png": 4, "9/x.png": 5}
    source = write(tmp_path / "source", {name: picture(PIXELS[i]) for name, i in files.items()})
    write(source, {"cat/notes.txt": b"no image", "README.md": b"", ".cache/x.png": b""})
    found = made(tmp_path, source)["train"]
    assert found.classes == ("10", "9", "cat", "dog")
    same(found, PIXELS[[4, 5, 3, 2, 1, 0]], [0, 1, 2, 2, 3, 3])


def test_splits_have_folders_and_grey_images_one_channel(tmp_path):
    names = ["train/a/1.png", "train/b/1.png", "valid/a/1.png", "valid/b/1.png", "test/a/1.png", "test/b/1.png"]
    source = write(tmp_path / "source", {name: picture(GREY[i]) for i, name in enumerate(names)})
    found = made(tmp_path, source)
    assert list(found) == ["test", "train", "val"]
    for i, split in enumerate(("train", "val", "test")):
        same(found[split], GREY[2 * i : 2 * i + 2], [0, 1])
    entries = found["train"].store.source
    assert [(entry["folder"], entry["files"]) for entry in entries] == [("test", 2), ("train", 2), ("val", 2)]


def test_a_colour_image_among_grey_ones_makes_all_colour(tmp_path):
    source = write(tmp_path / "source", {"a/1.png": picture(GREY[0]), "b/1.png": picture(PIXELS[0], alpha=0)})
    same(made(tmp_path, source)["train"], np.stack([GREY[0].repeat(3, 0), PIXELS[0]]), [0, 1])


def test_images_of_several_sizes_need_one_and_are_cropped_in_the_centre(tmp_path):
    wide = np.zeros((3, 8, 16), np.uint8)
    wide[:, :, 4:12] = 200
    small = np.full((3, 2, 2), 100, np.uint8)
    source = write(tmp_path / "source", {"a/wide.png": picture(wide), "b/small.png": picture(small)})
    said = refused(tmp_path, source, "images are of 2 sizes: 8x16 .*wide.png.*; 2x2 .*choose one .*--size 32")
    assert len(said.splitlines()) == 2
    found = made(tmp_path, source, size=4)["train"].images
    assert found.shape == (2, 3, 4, 4)
    assert found.unique().tolist() == [100, 200]


def test_every_broken_image_is_named_before_anything_is_written(tmp_path):
    files = {f"a/{i}.png": picture(PIXELS[i]) for i in range(3)}
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(deep, "PNG")
    source = write(tmp_path / "source", {**files, "a/8.png": b"GIF89a?", "b/9.png": b"", "b/16.png": deep.getvalue()})
    said = refused(tmp_path, source, "these images cannot be used")
    for line, name in zip(said.splitlines()[1:], ("8.png", "16.png", "9.png"), strict=True):
        assert name in line
    assert "expected 8 bits per channel, got mode I;16; convert it" in said
    assert "a/8.png is no image that Pillow reads; replace" in said
    assert "b/9.png is empty; replace" in said
    assert "replace or remove it" in said


def test_an_image_cut_short_is_named_and_leaves_no_store(tmp_path):
    whole = picture(images(1, 3, 64, 64)[0])
    source = write(tmp_path / "source", {"a/1.png": whole, "b/2.png": whole[:-2000]})
    refused(tmp_path, source, r"b/2.png cannot be decoded .*truncated.*replace or remove it", FileError)


def test_class_folders_that_do_not_fit_are_refused(tmp_path):
    image = picture(PIXELS[0])
    source = write(tmp_path / "empty", {"a/1.png": image, "b/x.txt": b"", "c/y.txt": b""})
    refused(tmp_path, source, "got none of b, c; add them, or remove these folders")
    source = write(tmp_path / "splits", {"train/a/1.png": image, "train/b/1.png": image, "test/a/1.png": image})
    refused(tmp_path, source, "same class folders in each split.*test lacks b.*complete or remove them")
    source = write(tmp_path / "mixed", {"train/a/1.png": image, "meta/a/1.png": image})
    refused(tmp_path, source, "for each split or for each class, got meta, train; rename or move")
    source = write(tmp_path / "twice", {"val/a/1.png": image, "valid/a/1.png": image})
    refused(tmp_path, source, "got val, valid; rename")
    refused(tmp_path, tmp_path / "twice/val/a/1.png", "expected a folder per class with images in it, found none; give")
    source = write(tmp_path / "flat", {"1.png": image})
    refused(tmp_path, source, "expected a folder per class with images in it, found no folder")
    refused(
        tmp_path, write(tmp_path / "texts", {"a/x.txt": b""}), "expected files of one of .npz.*found none; .*cifar10"
    )
    refused(tmp_path, tmp_path / "nowhere", "there is nothing of that name")


# npz and HDF5


def hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def save(kind, folder, name, **arrays):
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "h5":
        return hdf5(folder / f"{name}.h5", **arrays)
    (folder / f"{name}.npz").write_bytes(npz(**arrays))
    return folder / f"{name}.npz"


KINDS = ("npz", "h5")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["CHW", "HWC", "HW"])
def test_arrays_of_every_layout(tmp_path, kind, layout, monkeypatch):
    monkeypatch.setattr("dpfast.data.formats.npz.CHUNK", 4)
    monkeypatch.setattr("dpfast.data.formats.hdf5.CHUNK", 4)
    stored = {"CHW": PIXELS, "HWC": PIXELS.transpose(0, 2, 3, 1), "HW": GREY[:, 0]}[layout]
    source = save(
        kind, tmp_path / "source", "all", images=stored, labels=np.array([[2], [0], [1], [1], [0], [2]], np.uint8)
    )
    found = made(tmp_path, source)["train"]
    same(found, GREY if layout == "HW" else PIXELS, [2, 0, 1, 1, 0, 2])
    assert found.classes == ("0", "1", "2")


@pytest.mark.parametrize("kind", KINDS)
def test_splits_are_in_the_names_of_arrays_or_of_files(tmp_path, kind):
    classes = np.array(["benign", "other", "malign"], "S9" if kind == "h5" else "U9")
    one = {"train_images": PIXELS, "train_labels": [0, 1, 2] * 2, "val_images": PIXELS[:2], "val_labels": [1, 0]}
    found = made(tmp_path, save(kind, tmp_path / "one", "data", classes=classes, **one))
    same(found["val"], PIXELS[:2], [1, 0])
    assert found["train"].classes == ("benign", "other", "malign")
    save(kind, tmp_path / "two", "my-test", images=PIXELS[:2], labels=[1, 0])
    save(kind, tmp_path / "two", "my-train", images=PIXELS, labels=[0, 1] * 3)
    two = prepare_store("scans", tmp_path / "two", tmp_path / "other")
    assert {name: split.count for name, split in two.splits.items()} == {"test": 2, "train": 6}


def test_groups_of_hdf5_are_splits(tmp_path):
    path = hdf5(
        tmp_path / "x.hdf5",
        **{"train/images": PIXELS, "train/labels": range(6), "fold3/images": PIXELS[:1], "fold3/labels": [4]},
    )
    found = made(tmp_path, path)
    assert sorted(found) == ["fold3", "train"]
    same(found["fold3"], PIXELS[:1], [4])


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_that_do_not_fit_are_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("dpfast.data.formats.npz.CHUNK", 1)
    monkeypatch.setattr("dpfast.data.formats.hdf5.CHUNK", 1)
    number = np.zeros((2, 8, 8), np.float32)
    number[1, 3, 4:] = np.inf, np.nan, np.nan, 0
    cases = {
        r"images\): images must be uint8 in 0..255, got float32, with inf in image 1 at \[3, 4\]; replace .*scale": {
            "images": number,
            "labels": [0, 1],
        },
        r"got float64; scale them to 0\.\.255, round and save": {"images": PIXELS / 255, "labels": labels(6)},
        "got int16; scale": {"images": PIXELS.astype(np.int16), "labels": labels(6)},
        r"images\) holds no images; save": {"images": PIXELS[:0], "labels": np.zeros(0, int)},
        "expected a label per image, got 6 images and 5 labels": {"images": PIXELS, "labels": labels(5)},
        "whole numbers, one per image, got float64": {"images": PIXELS, "labels": np.full(6, np.nan)},
        r"got int64 of shape \(6, 10\)": {"images": PIXELS, "labels": np.eye(10, dtype=np.int64)[:6]},
        r"0\.\.1 \(2 classes\), got -1 at position 3 \(1 such\); number the classes from 0": {
            "images": PIXELS,
            "labels": [0, 1, 1, -1, 0, 0],
        },
        r"labels must lie in 0\.\.0 .*got -1 at position 0": {"images": PIXELS, "labels": np.full(6, -1)},
        r"0\.\.1 \(2 classes\), got 2": {
            "images": PIXELS,
            "labels": [0, 1, 1, 2, 0, 0],
            "classes": np.array([b"a", b"b"]),
        },
        r"C 1 or 3, got \(6, 2, 8, 8\); transpose": {"images": images(6, 2, 8, 8), "labels": labels(6)},
        r"got \(6, 8, 8, 4\); .* 4 channels: drop the alpha": {"images": images(6, 8, 8, 4), "labels": labels(6)},
        r"got \(2, 3, 3, 3\); which axis is C is unclear": {"images": images(2, 3, 3, 3), "labels": [0, 1]},
        "expected arrays 'images' and 'labels' .*got x, y; name them so": {"x": PIXELS, "y": labels(6)},
        "got train_images; name": {"train_images": PIXELS},
        "val_images and valid_images are the same split; keep one": {"val_images": PIXELS, "valid_images": PIXELS},
    }
    for number, (said, arrays) in enumerate(cases.items()):
        refused(tmp_path, save(kind, tmp_path / str(number), "x", **arrays), f"x.{kind}.*{said}")


def test_npz_files_that_are_damaged_or_run_code_are_refused(tmp_path):
    whole = npz(images=PIXELS, labels=labels(6))
    refused(tmp_path, write(tmp_path / "cut", {"x.npz": whole[:-50]}), r"x.npz cannot be read .*truncated", FileError)
    middle = whole.find(b"images.npy") + 200
    changed = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    refused(tmp_path, write(tmp_path / "bad", {"x.npz": changed}), r"x.npz \(images\) cannot be read", FileError)
    objects = npz(images=PIXELS, labels=np.array([open, 1, 2, 3, 4, 5], object))
    source = write(tmp_path / "code", {"x.npz": objects})
    refused(tmp_path, source, r"x.npz \(labels\): expected whole numbers, got Python objects; save .*int64")
    objects = npz(images=PIXELS, labels=labels(6), classes=np.array(["a", "b"], object))
    source = write(tmp_path / "names", {"x.npz": objects})
    refused(tmp_path, source, r"x.npz \(classes\): expected texts, got Python objects; save classes.astype\(str\)")
    columns = npz(images=np.asfortranarray(PIXELS), labels=labels(6))
    refused(tmp_path, write(tmp_path / "columns", {"x.npz": columns}), "column by column; save np.ascontiguousarray")


def test_a_damaged_hdf5_file_and_two_files_of_one_split_are_refused(tmp_path):
    path = hdf5(tmp_path / "x.h5", images=PIXELS, labels=labels(6))
    content = path.read_bytes()
    refused(tmp_path, write(tmp_path / "cut", {"x.h5": content[:-100]}), "x.h5 cannot be read .*truncated", FileError)
    source = write(tmp_path / "two", {"a.h5": content, "b.h5": content})
    refused(tmp_path, source, "b.h5: the split 'train' is in .*a.h5 too; keep one")


# Parquet and Arrow


NAMES = ["cat", "dog", "rat"]


def table(
    pixels=PIXELS, numbers=(2, 0, 1, 1, 0, 2), names=NAMES, *, image="image", label="label", plain=False, kind="PNG"
):
    """As ``datasets`` makes it: images are structs, its own description of the columns is in the schema."""
    content = [picture(one, kind) for one in pixels]
    values = content if plain else [{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(content)]
    features = {
        image: {"_type": "Image"},
        label: {"names": names, "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    made = pa.table({image: values, label: pa.array(list(numbers), pa.int64()), "id": list(range(len(pixels)))})
    return made.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()})


def arrow(path, content, rows=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as stream:
        stream.write_table(content, max_chunksize=rows)


def save_table(kind, path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "parquet":
        parquet.write_table(content, path.with_suffix(".parquet"), row_group_size=4)
    elif kind == "arrow":
        arrow(path.with_suffix(".arrow"), content)
    else:
        feather.write_feather(content, str(path.with_suffix(".arrow")))


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_tables_of_hugging_face(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("dpfast.data.formats.columnar.ROWS", 3)
    save_table(kind, tmp_path / "source/data/train-00000-of-00002", table())
    save_table(kind, tmp_path / "source/data/train-00001-of-00002", table(PIXELS[:2], [1, 2]))
    save_table(kind, tmp_path / "source/data/validation-00000-of-00001", table(PIXELS[3:5], [0, 0]))
    save_table(kind, tmp_path / "source/test/0000", table(PIXELS[:1], [1]))
    save_table(kind, tmp_path / "source/test/0001", table().slice(0, 0))
    write(tmp_path / "source", {"preview.png": b""})
    if kind != "parquet":
        save_table(kind, tmp_path / "source/test/cache-0123456789abcdef", table(PIXELS[:3], [0, 0, 0]))
    found = made(tmp_path, tmp_path / "source")
    same(found["train"], np.concatenate([PIXELS, PIXELS[:2]]), [2, 0, 1, 1, 0, 2, 1, 2])
    same(found["val"], PIXELS[3:5], [0, 0])
    same(found["test"], PIXELS[:1], [1])
    assert found["test"].classes == tuple(NAMES)
    assert len(found["test"].store.source) == 5


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_are_told_by_type_where_nothing_describes_them(tmp_path, kind):
    content = table(GREY, [3, 0, 1, 2, 0, 0], label="fine_label", plain=True).replace_schema_metadata(None)
    save_table(kind, tmp_path / "x", content)
    found = made(tmp_path, tmp_path / f"x.{kind}")["train"]
    same(found, GREY, [3, 0, 1, 2, 0, 0])
    assert found.classes == ("0", "1", "2", "3")


def test_tables_that_do_not_fit_are_refused(tmp_path):
    features = {"label": {"names": NAMES, "_type": "ClassLabel"}}
    described = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    paths = pa.table({"image": [{"bytes": None, "path": "a.png"}], "label": [1]}, metadata=described)
    paths = paths.set_column(
        0, "image", pa.array([{"bytes": None, "path": "a"}], pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    )
    cases = {
        r"column label: labels must lie in 0\.\.2 \(3 classes\), got 3": table(PIXELS[:2], [0, 3]),
        r"0\.\.2 \(3 classes\), got -1 at position 0 \(2 such\); number": table(PIXELS[:2], [-1, -1]),
        "no rows, so no images; add some": table().slice(0, 0),
        "expected a label in each row, got 1 rows without": table(PIXELS[:2], [1, None]),
        r"expected one column of bytes.*got a \(int64\), label \(int64\)": pa.table({"a": [1], "label": [1]}),
        r"whole numbers, or one named label or.*got image .*a \(int64\), b \(int64\)": pa.table(
            {"image": [b"x"], "a": [1], "b": [1]}
        ),
        "expected the bytes of each image in column image, got rows without": paths,
        r"row 1: expected \(3, 8, 8\) .*got \(3, 4, 4\).*--size 32": table([PIXELS[0], PIXELS[0, :, :4, :4]], [0, 1]),
    }
    for number, (said, content) in enumerate(cases.items()):
        save_table("parquet", tmp_path / str(number) / "x", content)
        refused(tmp_path, tmp_path / str(number), f"x.parquet.*{said}")
    broken = table(PIXELS[:2], [0, 1]).set_column(
        0, "image", pa.array([{"bytes": picture(PIXELS[0])}, {"bytes": b"no"}])
    )
    save_table("parquet", tmp_path / "broken" / "x", broken)
    refused(tmp_path, tmp_path / "broken", "x.parquet, row 1 is no image that Pillow reads", FileError)


def test_sizes_and_channels_that_change_from_batch_to_batch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("dpfast.data.formats.columnar.ROWS", 1)
    save_table("parquet", tmp_path / "sizes/x", table([PIXELS[0], PIXELS[0, :, :4, :4]], [0, 1], NAMES[:2]))
    refused(
        tmp_path,
        tmp_path / "sizes",
        r"split 'train', images from 1: expected uint8 \[m, 3, 8, 8\], got uint8 \[1, 3, 4, 4\]",
    )
    assert made(tmp_path, tmp_path / "sizes", size=4)["train"].images.shape == (2, 3, 4, 4)
    save_table("parquet", tmp_path / "grey/x", table([GREY[0], PIXELS[0]], [0, 1]))
    with pytest.raises(DataError, match="row 1: expected a grey image like those before it, got mode RGB; convert all"):
        prepare_store("other", tmp_path / "grey", tmp_path / "other")


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather"])
def test_truncated_tables_and_tables_of_other_classes_are_refused(tmp_path, kind):
    save_table(kind, tmp_path / "source/a", table())
    (path,) = (tmp_path / "source").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-200])
    refused(tmp_path, path, rf"a{path.suffix} cannot be read .*truncated", FileError)
    path.write_bytes(content)
    save_table(kind, tmp_path / "source/b", table(names=NAMES[::-1]))
    refused(tmp_path, tmp_path / "source", rf"b{path.suffix}: expected image, label and classes as in .*a{path.suffix}")


def test_an_arrow_file_whose_values_lie_elsewhere_is_refused(tmp_path):
    """Read as they are said to lie, values would be other bytes of the process."""
    arrow(tmp_path / "x.arrow", table(plain=True), rows=6)
    content = (tmp_path / "x.arrow").read_bytes()
    ends = np.cumsum([0, *map(len, table(plain=True)["image"].to_pylist())]).astype("<i4")
    there = ends.tobytes()
    assert content.count(there) == 1
    ends[3] = 1 << 20
    (tmp_path / "x.arrow").write_bytes(content.replace(there, ends.tobytes()))
    refused(tmp_path, tmp_path / "x.arrow", r"x.arrow cannot be read .*damaged", FileError)


# All of them


def test_classes_without_an_image_to_train_on_are_named_once(tmp_path):
    arrays = {"train_images": PIXELS, "train_labels": [0, 1, 2, 3, 5, 9], "test_images": PIXELS, "test_labels": [4] * 6}
    with pytest.warns(
        UserWarning, match=r"x\.npz: .* train split: 4, 6, 7, 8 \(4 of 10\); add .*without a gap"
    ) as caught:
        found = made(tmp_path, save("npz", tmp_path, "x", **arrays))
    assert len(caught) == 1
    assert found["train"].num_classes == 10


@pytest.mark.parametrize(("package", "name"), [("h5py", "x.h5"), ("pyarrow", "x.parquet"), ("pyarrow", "x.arrow")])
def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch, package, name):
    monkeypatch.setattr(reading, "find_spec", lambda wanted: None if wanted == package else 1)
    source = write(tmp_path / "source", {name: b""})
    refused(tmp_path, source, rf"{name} is read by {package}, .*pip install 'dpfast\[data\]'", ConfigError)


def test_options_that_mean_nothing_are_refused(tmp_path):
    source = save("npz", tmp_path / "source", "x", images=PIXELS, labels=labels(6))
    refused(tmp_path, source, "partial: nothing is published of 'scans'", ConfigError, partial=True)
    refused(tmp_path, source, "size must be at least 1 pixel, got 0", ConfigError, size=0)


@pytest.mark.parametrize("name", ["x.npz", "x.h5", "x.parquet", "x.arrow"])
def test_what_is_no_such_file_at_all_is_said(tmp_path, name):
    source = write(tmp_path / "source", {name: b"<html>404 not found</html>"})
    with pytest.raises(DPFastError, match=f"{name} cannot be read .*get it again"):
        prepare_store("scans", source, tmp_path / "store")
