"""Small data sets in the formats that large ones are published in, written here byte by byte as described."""

import gzip
import io
import pickle
import struct
import tarfile
from typing import ClassVar

import numpy as np
from PIL import Image


def images(count, *shape, seed=0):
    """uint8 [count, *shape] without two equal values next to each other by chance alone."""
    return np.random.default_rng(seed).integers(0, 256, (count, *(shape or (3, 32, 32))), np.uint8)


def labels(count, classes=10):
    return [(7 * i + 3) % classes for i in range(count)]


def planes(image):
    """The bytes of one image: all of red row by row, then green, then blue."""
    channels, height, width = image.shape
    return bytes(int(image[c, y, x]) for c in range(channels) for y in range(height) for x in range(width))


def rows(pixels):
    """uint8 [n, 3072] as CIFAR and the downsampled ImageNet have them."""
    return np.array([list(planes(image)) for image in pixels], np.uint8)


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2's cPickle wrote it: texts and bytes alike are its byte strings."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        content = value if isinstance(value, bytes) else value.encode("latin1")
        head = b"U" + struct.pack("<B", len(content)) if len(content) < 256 else b"T" + struct.pack("<i", len(content))
        self.write(head + content)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_string


def python2(value):
    """The pickle of Python 2 and of its numpy, which had no module numpy._core."""
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def python3(value):
    return pickle.dumps(value, 4)


def with_bytes_keys(value):
    return pickle.dumps({key.encode(): item for key, item in value.items()}, 3)


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def pack(path, files, folder=""):
    """A tar.gz of these files, with their folder's name before theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR100_NAMES = [f"fine{i:02}" for i in range(100)]


def cifar10_python(pixels, numbers, dumps=python2):
    """Six batches, the last of them the test batch, and the names."""
    parts = np.array_split(np.arange(len(pixels)), 6)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    batches = {
        name: dumps(
            {
                "batch_label": f"batch {name}",
                "labels": [numbers[i] for i in part],
                "data": rows(pixels[part]),
                "filenames": [f"{i}.png" for i in part],
            }
        )
        for name, part in zip(names, parts, strict=True)
    }
    return {
        **batches,
        "batches.meta": dumps({"num_cases_per_batch": 10000, "label_names": CIFAR10_NAMES, "num_vis": 3072}),
    }


def cifar10_binary(pixels, numbers):
    parts = np.array_split(np.arange(len(pixels)), 6)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    records = {
        name: b"".join(bytes([numbers[i]]) + planes(pixels[i]) for i in part)
        for name, part in zip(names, parts, strict=True)
    }
    return {**records, "batches.meta.txt": ("\n".join(CIFAR10_NAMES) + "\n\n").encode()}


def cifar100_python(pixels, numbers, dumps=python2):
    halves = {"train": range(len(pixels) - 2), "test": range(len(pixels) - 2, len(pixels))}
    batches = {
        name: dumps(
            {
                "fine_labels": [numbers[i] for i in half],
                "coarse_labels": [numbers[i] // 5 for i in half],
                "data": rows(pixels[list(half)]),
            }
        )
        for name, half in halves.items()
    }
    return {**batches, "meta": dumps({"fine_label_names": CIFAR100_NAMES, "coarse_label_names": ["c"] * 20})}


def cifar100_binary(pixels, numbers):
    halves = {"train.bin": range(len(pixels) - 2), "test.bin": range(len(pixels) - 2, len(pixels))}
    records = {
        name: b"".join(bytes([numbers[i] // 5, numbers[i]]) + planes(pixels[i]) for i in half)
        for name, half in halves.items()
    }
    return {**records, "fine_label_names.txt": "\n".join(CIFAR100_NAMES).encode()}


def idx(content, *shape):
    return struct.pack(">BBBB", 0, 0, 8, len(shape)) + struct.pack(f">{len(shape)}I", *shape) + content


def mnist(pixels, numbers, tested=2):
    """pixels uint8 [n, 1, 28, 28]; the last ``tested`` are the test set."""
    cut = len(pixels) - tested
    parts = {"train": (pixels[:cut], numbers[:cut]), "t10k": (pixels[cut:], numbers[cut:])}
    files = {}
    for stem, (part, of_part) in parts.items():
        files[f"{stem}-images-idx3-ubyte"] = idx(b"".join(map(planes, part)), len(part), 28, 28)
        files[f"{stem}-labels-idx1-ubyte"] = idx(bytes(of_part), len(part))
    return files


def zipped(files):
    return {f"{name}.gz": gzip.compress(content) for name, content in files.items()}


def picture(image, kind="PNG", alpha=None):
    """The file of an image [C, H, W]; C is 1 or 3."""
    file = io.BytesIO()
    if image.shape[0] == 1:
        made = Image.fromarray(image[0])
    else:
        made = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    if alpha is not None:
        made.putalpha(alpha)
    made.save(file, kind)
    return file.getvalue()


# patient, node, x, y, tumor, slide, center, split -> its split in WILDS
CAMELYON = [
    (("004", 4, 3328, 21792, 1, 0, 0, 0), "train"),
    (("017", 1, 64, 96, 0, 20, 1, 0), "val"),
    (("004", 4, 3200, 22272, 0, 0, 0, 1), "id_val"),
    (("042", 3, 5, 6, 1, 23, 2, 1), "test"),
    (("099", 0, 7, 8, 0, 49, 4, 0), "train"),
]


def camelyon17(pixels):
    """pixels uint8 [5, 3, 96, 96]: a patch for each row of ``CAMELYON``, RGBA as they are published."""
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    files = {}
    for number, ((row, _), image) in enumerate(zip(CAMELYON, pixels, strict=True)):
        patient, node, x, y = row[:4]
        lines.append(",".join(map(str, (number, *row))))
        slide = f"patient_{patient}_node_{node}"
        files[f"patches/{slide}/patch_{slide}_x_{x}_y_{y}.png"] = picture(image, alpha=255)
    return {**files, "metadata.csv": ("\n".join(lines) + "\n").encode()}


def imagenet32(pixels, numbers, dumps=None):
    """Eleven files, the last the validation set; labels of the files are one larger. npz files without ``dumps``."""
    parts = np.array_split(np.arange(len(pixels)), 11)
    names = [*(f"train_data_batch_{i}" for i in range(1, 11)), "val_data"]
    files = {}
    for name, part in zip(names, parts, strict=True):
        arrays = {"data": rows(pixels[part]), "labels": [numbers[i] + 1 for i in part], "mean": np.zeros(3072)}
        if dumps is None:
            files[f"{name}.npz"] = npz(**arrays)
        else:
            files[name] = dumps(arrays)
    return files


def npz(**arrays):
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()
