"""Samples from a trained model, by diffusers' schedulers. Post-processing: it costs no privacy, however often."""

import copy
import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dpfast.checkpoint import weights_fingerprint
from dpfast.data.images import to_uint8
from dpfast.data.shards import ShardFolder
from dpfast.diffusion.objective import predict
from dpfast.errors import ConfigError
from dpfast.progress import Progress, silent
from dpfast.ranks import Ranks

SamplerName = Literal["ddim", "ddpm"]


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
    dtype: torch.dtype = torch.float32,
    progress: Progress = silent,
) -> Tensor:
    """Images uint8 ``[n, *image_shape]`` for ``labels`` int64 ``[n]``.

    guidance: classifier-free, ``null + guidance * (conditional - null)`` with the null class ``num_classes``; both
    halves run in one call of the model, and 1 (no guidance) runs the conditional half alone.
    dtype: that the model computes in, by autocast; the sampler's own steps are float32.
    """

    def sample(batch: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        derived = sampling_scheduler(scheduler, sampler, steps)
        return _denoise(guided(model, batch, num_classes, guidance, dtype), derived, noise, generator)

    return in_batches(model, labels, sample, image_shape, seed=seed, batch_size=batch_size, progress=progress)


@torch.no_grad()
def in_batches(
    model: nn.Module,
    labels: Tensor,
    sample: Callable[[Tensor, Tensor, torch.Generator], Tensor],
    image_shape: tuple[int, int, int],
    *,
    seed: int,
    batch_size: int,
    progress: Progress,
) -> Tensor:
    """Images uint8 ``[n, *image_shape]``, by ``sample(labels [b], noise [b, *image_shape], generator)``, which starts
    from normal noise and gives images around -1..1. ``model`` is in eval mode meanwhile.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    done, images = 0, []
    try:
        for batch in labels.split(batch_size):
            noise = torch.randn(len(batch), *image_shape, generator=generator).to(device)
            images.append(to_uint8(sample(batch.to(device), noise, generator)).cpu())
            done += len(batch)
            progress(done, len(labels), "sampling")
    finally:
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


def guided(
    model: nn.Module, labels: Tensor, num_classes: int, guidance: float, dtype: torch.dtype = torch.float32
) -> Callable[[Tensor, Tensor], Tensor]:
    """``(images, t) -> prediction`` under classifier-free guidance, computed in ``dtype``, as ``generate`` has it."""

    def plain(images: Tensor, t: Tensor, of: Tensor = labels) -> Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return predict(model, images, t, of).float()

    def doubled(images: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([labels, torch.full_like(labels, num_classes)])
        conditional, null = plain(torch.cat([images, images]), torch.cat([t, t]), both).chunk(2)
        return null + guidance * (conditional - null)

    return plain if guidance == 1.0 else doubled


def generate_shards(
    model: nn.Module,
    scheduler: Any,
    folder: str | Path,
    *,
    count: int,
    shard_size: int = 1000,
    image_shape: tuple[int, int, int],
    classes: tuple[str, ...],
    sampler: SamplerName = "ddim",
    steps: int = 50,
    guidance: float = 1.0,
    seed: int = 0,
    batch_size: int = 500,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,  # noqa: A002 (as in Performance)
    devices: Sequence[str] = (),
    progress: Progress = silent,
    ranks: Ranks | None = None,
) -> ShardFolder:
    """``count`` images in a ``ShardFolder``, exactly ``count / len(classes)`` of each class.

    Shards that are there are not made again, so an interrupted call can be repeated: every device ends with the batch
    that it is in, and the shard of it is lost. No more than a shard for each device is in memory.
    dtype: as in ``generate``; compile: by ``torch.compile``; devices: that share the shards, each with a copy of the
    model and a thread of its own (by default the model's device). Each shard has a seed of its own: who draws it does
    not matter. progress: called in the caller's thread after each batch, after the last of a shard once it is written.
    ranks: ``torch.distributed``'s processes by default, which share the shards: all of them call this with the same
    arguments, for a folder that all see, and return when it is complete. Rank 0 hears of all of them.

    Raises:
        ConfigError: the classes do not divide ``count``, or ranks have different settings or models.
        DataError: the folder was made with other settings or another model.
    """
    settings = {
        "count": count, "shard_size": shard_size, "image_shape": list(image_shape), "classes": list(classes),
        "sampler": sampler, "steps": steps, "guidance": guidance, "seed": seed, "batch_size": batch_size,
        "scheduler": scheduler.__class__.__name__, "scheduler_config": _settings_of(scheduler),
        "dtype": str(dtype).removeprefix("torch."), "model": weights_fingerprint(model),
    }  # fmt: skip

    def make(network: nn.Module, labels: Tensor, seed: int, report: Progress) -> Tensor:
        return generate(
            network, scheduler, labels, image_shape=image_shape, num_classes=len(classes), sampler=sampler,
            steps=steps, guidance=guidance, seed=seed, batch_size=batch_size, dtype=dtype, progress=report,
        )  # fmt: skip

    return fill_shards(
        model, Path(folder), settings, make, compile=compile, devices=devices, progress=progress, ranks=ranks
    )


def fill_shards(
    model: nn.Module,
    folder: Path,
    settings: dict[str, Any],
    make: Callable[[nn.Module, Tensor, int, Progress], Tensor],
    *,
    compile: bool,  # noqa: A002 (as in Performance)
    devices: Sequence[str],
    progress: Progress,
    ranks: Ranks | None,
) -> ShardFolder:
    """A ``ShardFolder``, whose shards that are not there yet come from ``make(network, labels, seed, report)``.

    settings: count, shard_size, classes, seed and all else that the images depend on. report: the shard's own
    ``Progress``, which raises where the work is to end. The rest, and what is raised, is that of ``generate_shards``.
    """
    count, shard_size, classes = (settings[name] for name in ("count", "shard_size", "classes"))
    if count % len(classes) or count < 1 or shard_size < 1:
        raise ConfigError(
            f"count must be a positive multiple of the {len(classes)} classes and shard_size 1 or more, "
            f"got count={count} and shard_size={shard_size}"
        )
    ranks = ranks or Ranks.current()
    ranks.alike("samples", repr(settings), "Give all ranks the same settings and the same model")
    shards = ranks.first(lambda: ShardFolder.claim(folder, settings))
    workers = [copy.deepcopy(model).to(device) for device in devices] or [model]
    networks = [cast(nn.Module, torch.compile(worker)) if compile else worker for worker in workers]

    def fill(network: nn.Module, number: int, labels: Tensor, report: Progress) -> None:
        if shards.read(number, labels) is None:
            images = make(network, labels, _shard_seed(settings["seed"], number), report)
            shards.write(number, images, labels)

    _in_threads(fill, networks, shards, ranks, progress if ranks.leads else silent)
    ranks.wait()
    if ranks.size > 1 and ranks.leads:
        progress(len(shards.labels), len(shards.labels), "sampling")  # the others may have drawn the last
    return shards


def _in_threads(
    fill: Callable[[nn.Module, int, Tensor, Progress], None],
    networks: Sequence[nn.Module],
    shards: ShardFolder,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """``fill(network, number, labels, report)`` of the shards that this rank takes, in a thread for each network.

    ``progress`` hears of all ranks', in this thread, when something was drawn here; what is raised, here or in one of
    them, ends the others after their batch.
    """
    labels_of, count = dict(shards), len(shards.labels)
    numbers, turn = ranks.take(len(labels_of)), threading.Lock()
    drawn = ranks.tally()
    news: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()  # images drawn; None: a thread is through
    stopped = threading.Event()

    def work(network: nn.Module) -> None:
        try:
            while (number := take()) is not None:
                draw(network, number, labels_of[number])
            news.put(None)
        except BaseException as error:  # raised below
            news.put(error)

    def take() -> int | None:
        with turn:
            return None if stopped.is_set() else next(numbers, None)

    def draw(network: nn.Module, number: int, labels: Tensor) -> None:
        told = 0

        def report(step: int, of: int, _: str, /) -> None:
            nonlocal told
            if step < of:  # the last batch counts once the shard is written
                if stopped.is_set():
                    raise CancelledError
                news.put(step - told)
                told = step

        fill(network, number, labels, report)
        news.put(len(labels) - told)

    threads = ThreadPoolExecutor(len(networks))
    try:
        for network in networks:
            threads.submit(work, network)
        running = len(networks)
        while running:
            heard = news.get()
            if isinstance(heard, BaseException):
                raise heard
            if heard is None:
                running -= 1
            else:
                progress(drawn(heard), count, "sampling")
    finally:
        stopped.set()
        threads.shutdown()


def _shard_seed(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")


def _settings_of(scheduler: Any) -> dict[str, Any]:
    """Its configuration, less what diffusers notes there, in an order that differs from process to process."""
    return {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
