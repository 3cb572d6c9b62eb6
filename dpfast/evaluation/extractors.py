"""Feature extractors: what the scores of ``dpfast.evaluation.scores`` look through, by name and sha256.

Scores of different extractors cannot be compared, so each score carries both. The field's extractor is Inception v3
(Szegedy et al., arXiv 1512.00567) in the TorchScript file of StyleGAN's metrics, ``inception-2015-12-05.pt``: dpfast
downloads nothing, ``torchscript_extractor`` reads a file that is there.
"""

import hashlib
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.checkpoint import weights_fingerprint
from dpfast.data.mapped import on_disk
from dpfast.errors import DataError, FileError
from dpfast.evaluation.networks import Classifier
from dpfast.files import is_file
from dpfast.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """features: uint8 ``[n, C, H, W]`` on ``device`` -> float ``[n, d]``; probabilities: -> ``[n, classes]``, or None
    where there are no classes. sha256: of the weights, or of the file that they come in.
    """

    name: str
    sha256: str
    features: Callable[[Tensor], Tensor]
    probabilities: Callable[[Tensor], Tensor] | None = None
    device: str | torch.device = "cpu"


def module_extractor(name: str, module: nn.Module, *, device: str | torch.device = "cpu") -> Extractor:
    """Any module uint8 ``[n, C, H, W]`` -> ``[n, d]``, put into eval mode and onto ``device``."""
    module = module.eval().to(device)
    return Extractor(name=name, sha256=weights_fingerprint(module), features=module.forward, device=device)


def classifier_extractor(name: str, classifier: Classifier, *, device: str | torch.device = "cpu") -> Extractor:
    """The penultimate layer of a classifier, which must have been trained on public images only."""
    classifier = classifier.eval().to(device)
    return Extractor(
        name=name,
        sha256=weights_fingerprint(classifier),
        features=classifier.features,
        probabilities=lambda images: classifier(images).softmax(1),
        device=device,
    )


def extractor_name(public: str) -> str:
    """Of the classifier of these public images, named as in a recipe: "fonts", or a store."""
    return "digits-cnn-fonts" if public == "fonts" else f"small-cnn-{public}"


def torchscript_extractor(
    path: str | Path, *, name: str | None = None, device: str | torch.device = "cpu"
) -> Extractor:
    """A TorchScript file, uint8 ``[n, 3, H, W]`` -> ``[n, d]``; images of one channel are given to it as grey RGB.

    If its forward takes ``return_features``, as that of StyleGAN's Inception does, features come with it and class
    probabilities without it (and with ``no_output_bias``, as in the Inception score's own code, where it takes that).
    name: the file's name by default. Such a file is code: read none whose source you do not trust.

    Raises FileError for a file that is missing or is no TorchScript.
    """
    path = Path(path)
    module = _load_torchscript(path, device)
    takes = {argument.name for argument in module.forward.schema.arguments}

    def call(images: Tensor, **options: bool) -> Tensor:
        rgb = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        values: Tensor = module(rgb, **{option: value for option, value in options.items() if option in takes})
        return values

    return Extractor(
        name=name or path.name,
        sha256=file_sha256(path),
        features=lambda images: call(images, return_features=True),
        probabilities=(lambda images: call(images, no_output_bias=True)) if "return_features" in takes else None,
        device=device,
    )


def feature_blocks(extractor: Extractor, images: Tensor, *, batch_size: int = 256) -> Iterator[Tensor]:
    """Features of uint8 images ``[n, C, H, W]`` (a memory-mapped file will do), float32 ``[batch_size, d]`` at a time.

    Raises DataError when they are not ``[n, d]`` or not finite.
    """
    return _blocks(extractor, extractor.features, images, batch_size)


def features(
    extractor: Extractor,
    images: Tensor,
    *,
    batch_size: int = 256,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Tensor:
    """All of ``feature_blocks`` in one tensor, float32 ``[n, d]`` on the extractor's device; those of a CPU ``on_disk``
    in ``folder``, by default that of the system for temporary files.
    """
    return _joined(feature_blocks(extractor, images, batch_size=batch_size), len(images), folder, progress)


def probabilities(
    extractor: Extractor,
    images: Tensor,
    *,
    batch_size: int = 256,
    folder: Path | None = None,
    progress: Progress = silent,
) -> Tensor | None:
    """Class probabilities, float32 ``[n, classes]``, where ``features`` would be; None where it knows no classes."""
    if extractor.probabilities is None:
        return None
    return _joined(_blocks(extractor, extractor.probabilities, images, batch_size), len(images), folder, progress)


@torch.no_grad()
def _blocks(
    extractor: Extractor, read: Callable[[Tensor], Tensor], images: Tensor, batch_size: int
) -> Iterator[Tensor]:
    for chunk in images.split(batch_size):
        yield _checked(extractor, read(chunk.to(extractor.device)).float(), len(chunk))


def _joined(blocks: Iterator[Tensor], count: int, folder: Path | None, progress: Progress) -> Tensor:
    """As ``torch.cat``, without a second copy of everything."""
    head = next(blocks)
    blocks, shape = _told(chain([head], blocks), count, progress), (count, head.shape[1])
    if head.device.type == "cpu":
        return on_disk(blocks, shape, head.dtype, folder or Path(tempfile.gettempdir()))
    whole = head.new_empty(shape)
    for part, block in zip(whole.split(len(head)), blocks, strict=True):
        part.copy_(block)
    return whole


def _told(blocks: Iterable[Tensor], count: int, progress: Progress) -> Iterator[Tensor]:
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        progress(done, count, "reading images")


def _checked(extractor: Extractor, values: Tensor, count: int) -> Tensor:
    if values.ndim != 2 or len(values) != count:
        raise DataError(
            f"extractor {extractor.name!r}: expected [{count}, d] for {count} images, got {tuple(values.shape)};"
            " flatten or average what it returns"
        )
    if not values.isfinite().all():
        raise DataError(
            f"extractor {extractor.name!r}: some features are NaN or infinite, and no score can be made of them;"
            " look at its weights, and run it in float32"
        )
    return values


def _load_torchscript(path: Path, device: str | torch.device) -> Any:
    if not is_file(path):
        raise FileError(f"{path}: expected a TorchScript file, there is none; give the path of a local copy")
    with warnings.catch_warnings():
        # The form in which this network is passed around, whatever torch plans for it.
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.load", category=DeprecationWarning)
        try:
            return torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise FileError(f"{path}: this is no TorchScript file ({str(error).splitlines()[0]})") from error


def file_sha256(path: Path) -> str:
    """In hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
