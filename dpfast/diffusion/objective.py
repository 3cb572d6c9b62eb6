"""The diffusion loss, one value per row, under keyed augmentation, timesteps and noise."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dpfast.data.augment import Augment
from dpfast.data.images import to_signed
from dpfast.data.keyed import RowKeys
from dpfast.diffusion.timesteps import TimestepDistribution, Uniform, draw_timesteps
from dpfast.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class ImageObjective:
    """What objectives of class-conditional diffusion share.

    stratified: the K rows of an example cover the distribution of noise levels evenly.
    label_drop: probability per row that the label becomes the null class ``num_classes`` (classifier-free
        guidance, Ho and Salimans, arXiv 2207.12598); the model needs ``num_classes + 1`` class embeddings.

    Nothing mixes rows and nothing is reduced over them, so a loss belongs to one example.
    """

    num_classes: int
    stratified: bool = True
    augment: Augment = field(default_factory=Augment)
    label_drop: float = 0.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_drop <= 1.0:
            raise ConfigError(f"label_drop must lie in 0..1, got {self.label_drop}")

    def _check(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        problems = []
        config = getattr(model, "config", {})
        wanted = self.num_classes + (self.label_drop > 0)
        if "num_class_embeds" in config and (config["num_class_embeds"] or 0) < wanted:
            problems.append(
                f"the model has num_class_embeds={config['num_class_embeds']}; expected {wanted}: one for each of"
                f" {self.num_classes} classes{' and one for a dropped label' if self.label_drop > 0 else ''}"
            )
        if images.dtype != torch.uint8 or images.ndim != 4:
            problems.append(
                f"images are {images.dtype} with {images.ndim} dimensions; expected torch.uint8 [B, C, H, W] in 0..255"
                " (without ToTensor or Normalize: the objective scales them)"
            )
        if labels.dtype != torch.int64 or labels.ndim != 1:
            problems.append(f"labels are {labels.dtype} with {labels.ndim} dimensions; expected torch.int64 [B]")
        if problems:
            raise DataError(f"{type(self).__name__}: " + "; ".join(problems))

    def drop_labels(self, labels: Tensor, keys: RowKeys) -> Tensor:
        """Labels ``[B]`` -> ``[N]``, each row's replaced by the null class with probability ``label_drop``."""
        rows = labels.repeat_interleave(keys.augmult)
        if self.label_drop == 0.0:
            return rows
        dropped = keys.uniform(stream="label") < self.label_drop
        return torch.where(dropped, self.num_classes, rows)


@dataclass(frozen=True, kw_only=True)
class DiffusionObjective(ImageObjective):
    """An ``Objective``: ``(model, images, labels, keys) -> losses [B * K]``.

    scheduler: a diffusers DDPMScheduler; its ``prediction_type`` decides the target: "epsilon", "v_prediction" or
        "sample".
    timesteps: how t is drawn. The other fields are those of ``ImageObjective``.
    """

    scheduler: Any
    timesteps: TimestepDistribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        super().__post_init__()
        prediction = self.scheduler.config.prediction_type
        if prediction not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(f"prediction_type {prediction!r}: expected 'epsilon', 'v_prediction' or 'sample'")

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, keys: RowKeys) -> Tensor:
        """Images uint8 ``[B, C, H, W]``, labels int64 ``[B]`` -> squared error per row, mean over pixels, ``[N]``.

        Raises ``DataError`` for other images and labels, or a model that cannot take these labels.
        """
        self._check(model, images, labels)
        clean = self.augment(to_signed(images), keys)
        noise = keys.normal(*clean.shape[1:], stream="noise")
        t = draw_timesteps(self.timesteps, keys, self.scheduler.config.num_train_timesteps, stratified=self.stratified)
        noisy = self.scheduler.add_noise(clean, noise, t)
        prediction = predict(model, noisy, t, self.drop_labels(labels, keys))
        return (prediction - self.target(clean, noise, t)).square().flatten(1).mean(1)

    def target(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should predict, by the scheduler's ``prediction_type``."""
        prediction = self.scheduler.config.prediction_type
        if prediction == "v_prediction":
            velocity: Tensor = self.scheduler.get_velocity(clean, noise, t)
            return velocity
        return noise if prediction == "epsilon" else clean


def predict(model: nn.Module, noisy: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """``model(noisy, t, labels)``; diffusers models wrap their output in an object with a ``sample``."""
    output = model(noisy, t, labels)
    prediction: Tensor = output.sample if hasattr(output, "sample") else output
    return prediction
