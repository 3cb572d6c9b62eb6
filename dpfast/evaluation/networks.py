"""The classifiers: a small CNN for digits, WRN-40-4 (the paper's), ResNet-18, and smaller wide ResNets to try with.

All are made of convolutions, one norm and ReLU or SiLU, take any image size from 8x8 on, and come in two kinds:
GroupNorm (Wu and He, arXiv 1803.08494) mixes no rows and can be trained privately; BatchNorm is for ordinary training.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpfast.data.images import to_signed
from dpfast.errors import ConfigError

Network = Literal["small-cnn", "wrn-16-1", "wrn-16-4", "wrn-40-4", "resnet-18"]
NormKind = Literal["group", "batch"]
Norm = Callable[[int], nn.Module]

# (depth, widening factor)
_WIDE: dict[str, tuple[int, int]] = {"wrn-16-1": (16, 1), "wrn-16-4": (16, 4), "wrn-40-4": (40, 4)}


class Classifier(nn.Module):
    """uint8 or -1..1 float ``[n, C, H, W]`` -> logits ``[n, classes]``; ``features`` gives the penultimate layer.

    body: float images -> ``[n, num_features]``; a linear layer makes logits of that.
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.num_features = num_features
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Penultimate layer, ``[n, num_features]``."""
        values: Tensor = self.body(to_signed(images) if images.dtype == torch.uint8 else images)
        return values

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


class SmallCNN(Classifier):
    """Two convolutions, pooling, two convolutions, pooling to 2x2; 39k parameters as it stands.

    widths: channels of the two stages.
    """

    def __init__(
        self, channels: int, num_classes: int, *, widths: tuple[int, int] = (24, 48), norm: Norm | None = None
    ) -> None:
        norm = norm or norm_layer("group", 8)
        first, second = widths
        body = nn.Sequential(
            *_small_block(channels, first, norm),
            *_small_block(first, first, norm),
            nn.MaxPool2d(2),
            *_small_block(first, second, norm),
            *_small_block(second, second, norm),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
        )
        super().__init__(body, 4 * second, num_classes)


class WideResNet(Classifier):
    """WRN-depth-widen of Zagoruyko and Komodakis (arXiv 1605.07146), without dropout.

    Three stages of (depth - 4) / 6 pre-activation blocks, of 16, 32 and 64 times ``widen`` channels; the second and the
    third begin with stride 2.
    """

    def __init__(self, channels: int, num_classes: int, *, depth: int, widen: int, norm: Norm) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ConfigError(f"WideResNet(depth={depth}): expected 6 n + 4 with n >= 1, such as 16, 28 or 40")
        layers: list[nn.Module] = [_conv(channels, 16, 3)]
        width = 16
        for stage in range(3):
            for block in range(blocks):
                into = 16 * widen * 2**stage
                layers.append(_WideBlock(width, into, 2 if stage and not block else 1, norm))
                width = into
        super().__init__(nn.Sequential(*layers, norm(width), nn.ReLU(), *_pooled()), width, num_classes)
        _initialise(self)


class ResNet18(Classifier):
    """ResNet-18 (He et al., arXiv 1512.03385) for small images: a 3x3 stem of stride 1, no pooling behind it."""

    def __init__(self, channels: int, num_classes: int, *, norm: Norm) -> None:
        layers: list[nn.Module] = [_conv(channels, 64, 3), norm(64), nn.ReLU()]
        width = 64
        for into in (64, 128, 256, 512):
            layers += [_BasicBlock(width, into, 1 if into == 64 else 2, norm), _BasicBlock(into, into, 1, norm)]
            width = into
        super().__init__(nn.Sequential(*layers, *_pooled()), width, num_classes)
        _initialise(self)


class _WideBlock(nn.Module):
    """``shortcut + conv(relu(norm(conv(relu(norm(x))))))``; where the shape changes the shortcut is a 1x1 convolution
    of the activated input.
    """

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.activation = nn.Sequential(norm(channels), nn.ReLU())
        self.residual = nn.Sequential(_conv(channels, width, 3, stride), norm(width), nn.ReLU(), _conv(width, width, 3))
        self.shortcut = _conv(channels, width, 1, stride) if channels != width or stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.activation(x)
        added: Tensor = self.residual(active)
        return added + (x if self.shortcut is None else self.shortcut(active))


class _BasicBlock(nn.Module):
    """``relu(shortcut + norm(conv(relu(norm(conv(x))))))``."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _conv(channels, width, 3, stride), norm(width), nn.ReLU(), _conv(width, width, 3), norm(width)
        )
        self.shortcut = nn.Sequential(_conv(channels, width, 1, stride), norm(width)) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def norm_layer(kind: NormKind, groups: int) -> Norm:
    """``channels -> module``: GroupNorm of ``groups`` groups, or BatchNorm."""
    return nn.BatchNorm2d if kind == "batch" else lambda channels: nn.GroupNorm(groups, channels)


def normed_widths(network: Network, small_widths: tuple[int, int]) -> tuple[int, ...]:
    """Channels that the network's norms see; GroupNorm's groups must divide each."""
    if network in _WIDE:
        _, widen = _WIDE[network]
        return 16, 16 * widen, 32 * widen, 64 * widen
    return small_widths if network == "small-cnn" else (64, 128, 256, 512)


def build_network(
    network: Network, channels: int, num_classes: int, *, widths: tuple[int, int], norm: NormKind, groups: int
) -> Classifier:
    """An untrained network by name, its weights from torch's global generator. widths: of the small CNN alone."""
    layer = norm_layer(norm, groups)
    if network in _WIDE:
        depth, widen = _WIDE[network]
        return WideResNet(channels, num_classes, depth=depth, widen=widen, norm=layer)
    if network == "resnet-18":
        return ResNet18(channels, num_classes, norm=layer)
    return SmallCNN(channels, num_classes, widths=widths, norm=layer)


def _small_block(channels: int, width: int, norm: Norm) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1), norm(width), nn.SiLU()]


def _conv(channels: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)  # a norm follows, with its own shift


def _pooled() -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]


def _initialise(model: nn.Module) -> None:
    """He et al. (arXiv 1502.01852), scaled by outgoing connections, as both papers' code does."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
