"""Samples from a trained model, by diffusers' schedulers. Post-processing: it costs no privacy, however often."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dpfast.data.images import ImageSet
from dpfast.diffusion.objective import predict, to_uint8
from dpfast.errors import ConfigError, DataError
from dpfast.files import write_atomic
from dpfast.progress import Progress, silent

SamplerName = Literal["ddim", "ddpm"]
_MANIFEST = "manifest.json"


def sampling_scheduler(scheduler: Any, sampler: SamplerName, steps: int) -> Any:
    """A diffusers scheduler with the training scheduler's config, set to ``steps`` steps.

    Timesteps are spaced back from the last one ("trailing"): sampling starts from pure noise, so the first step
    has to be the noisiest (Lin et al., arXiv 2305.08891).
    """
    from diffusers import DDIMScheduler, DDPMScheduler

    if sampler not in ("ddim", "ddpm"):
        raise ConfigError(f"sampler must be 'ddim' or 'ddpm', got {sampler!r}")
    limit = scheduler.config.num_train_timesteps
    if not 1 <= steps <= limit:
        raise ConfigError(f"sampling steps must lie in 1..{limit}, got {steps}")
    kind = DDIMScheduler if sampler == "ddim" else DDPMScheduler
    derived = kind.from_config(scheduler.config, timestep_spacing="trailing")
    derived.set_timesteps(steps)
    return derived


@torch.no_grad()
def generate(
    model: nn.Module,
    scheduler: Any,
    labels: Tensor,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    sampler: SamplerName = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 500,
    progress: Progress = silent,
) -> Tensor:
    """Images uint8 ``[n, *image_shape]`` for ``labels`` int64 ``[n]``.

    guidance: classifier-free, ``null + guidance * (conditional - null)`` with the null class ``num_classes``; both
    halves run in one call of the model, and 1 (no guidance) runs the conditional half alone.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    done, images = 0, []
    for batch in labels.split(batch_size):
        noise = torch.randn(len(batch), *image_shape, generator=generator).to(device)
        derived = sampling_scheduler(scheduler, sampler, steps)
        guess = _guided(model, batch.to(device), num_classes, guidance)
        images.append(to_uint8(_denoise(guess, derived, noise, generator)).cpu())
        done += len(batch)
        progress(done, len(labels), "sampling")
    model.train(was_training)
    return torch.cat(images) if images else torch.empty(0, *image_shape, dtype=torch.uint8)


def _denoise(
    guess: Callable[[Tensor, Tensor], Tensor], scheduler: Any, images: Tensor, generator: torch.Generator
) -> Tensor:
    images = images * scheduler.init_noise_sigma
    for t in scheduler.timesteps.to(images.device):
        output = guess(scheduler.scale_model_input(images, t), t.expand(len(images)))
        images = scheduler.step(output, t, images, generator=generator).prev_sample
    return images


def _guided(model: nn.Module, labels: Tensor, num_classes: int, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
    def plain(images: Tensor, t: Tensor) -> Tensor:
        return predict(model, images, t, labels)

    def doubled(images: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, num_classes)])
        conditional, null = predict(model, torch.cat([images, images]), torch.cat([t, t]), both).chunk(2)
        return null + guidance * (conditional - null)

    return plain if guidance == 1.0 else doubled


def generate_shards(
    model: nn.Module,
    scheduler: Any,
    folder: Path,
    *,
    count: int,
    shard_size: int,
    image_shape: tuple[int, int, int],
    classes: tuple[str, ...],
    sampler: SamplerName = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 500,
    progress: Progress = silent,
) -> ImageSet:
    """``count`` images as files ``shard-00000.npz`` (``images`` uint8 ``[n, C, H, W]``, ``labels`` int64 ``[n]``).

    Every class gets exactly ``count / len(classes)`` images. A shard appears complete or not at all, and shards
    that are there are not made again, so an interrupted call can be repeated. Raises ConfigError if the classes do
    not divide ``count``, DataError if the folder was made with other settings or another model.
    """
    if count % len(classes) or count < 1 or shard_size < 1:
        raise ConfigError(
            f"count must be a positive multiple of the {len(classes)} classes and shard_size 1 or more, "
            f"got count={count} and shard_size={shard_size}"
        )
    settings = {
        "count": count, "shard_size": shard_size, "image_shape": list(image_shape), "classes": list(classes),
        "sampler": sampler, "steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size,
        "scheduler": scheduler.__class__.__name__, "scheduler_config": _plain(dict(scheduler.config)),
        "model": weights_fingerprint(model),
    }  # fmt: skip
    _claim(folder, settings)
    labels = torch.arange(count) % len(classes)
    for number, shard in enumerate(labels.split(shard_size)):
        path = folder / f"shard-{number:05d}.npz"
        if _read_shard(path, shard) is None:
            images = generate(
                model, scheduler, shard, image_shape=image_shape, num_classes=len(classes), sampler=sampler,
                steps=steps, guidance=guidance, seed=_shard_seed(seed, number), batch_size=batch_size,
            )  # fmt: skip
            _write_shard(path, images, shard)
        progress(min((number + 1) * shard_size, count), count, "sampling")
    return load_shards(folder)


def load_shards(folder: Path) -> ImageSet:
    """All samples in a folder that ``generate_shards`` completed; raises DataError if some are missing."""
    manifest = _read_manifest(folder)
    if manifest is None:
        raise DataError(f"{folder} holds no {_MANIFEST}; make samples with generate_shards first")
    classes = tuple(manifest["classes"])
    labels = torch.arange(manifest["count"]) % len(classes)
    images = []
    for number, shard in enumerate(labels.split(manifest["shard_size"])):
        path = folder / f"shard-{number:05d}.npz"
        part = _read_shard(path, shard)
        if part is None:
            raise DataError(f"{path} is missing or damaged; run the same sampling again to complete the folder")
        images.append(part)
    return ImageSet(torch.cat(images), labels, classes)


def weights_fingerprint(model: nn.Module) -> str:
    """sha256 over the names, shapes and values of the model's parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _shard_seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write the manifest, or check that the one in the folder says the same."""
    found = _read_manifest(folder)
    if found is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / _MANIFEST, json.dumps(settings, indent=1).encode() + b"\n")
    elif found != settings:
        differing = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
        raise DataError(
            f"{folder} holds samples made with other settings ({', '.join(differing)}); "
            "choose another folder, or remove this one to make them anew"
        )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / _MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); remove the folder to make the samples anew") from error
    return manifest


def _read_shard(path: Path, labels: Tensor) -> Tensor | None:
    """The images of a shard that is there, readable and holds these labels; None otherwise."""
    try:
        # From memory: numpy leaves the file open when it is torn.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as shard:
            images, found = torch.from_numpy(shard["images"]), shard["labels"]
    except Exception:  # a torn or foreign file raises anything from OSError to zlib.error: made again all the same
        return None
    return images if len(images) == len(labels) and np.array_equal(found, labels.numpy()) else None


def _write_shard(path: Path, images: Tensor, labels: Tensor) -> None:
    file = io.BytesIO()
    np.savez(file, images=images.numpy(), labels=labels.numpy())
    write_atomic(path, file.getbuffer())


def _plain(value: Any) -> Any:
    """The value as JSON gives it back, so that a manifest equals itself after a round trip."""
    return json.loads(json.dumps(value, default=str))
