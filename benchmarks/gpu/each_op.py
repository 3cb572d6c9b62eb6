"""Each op once with Triton, at sizes that no tile divides: ``compute-sanitizer python -m benchmarks.gpu.each_op``."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dpfast.kernels import affine, clip, conv, embedding, keyed, linear, noise, norm


def main() -> None:
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        for dtype in (torch.bfloat16, torch.float32):
            for name, op in ops(dtype).items():
                op()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                print(f"{name} once, {dtype}", flush=True)


def ops(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Two examples of three rows, of 7x5 pixels: images for descriptors, and others."""
    torch.manual_seed(0)
    w, found = torch.tensor([0.5, 0.0]), {}
    for stride, channels, outputs, layout in ((1, 24, 40, torch.channels_last), (2, 20, 17, torch.contiguous_format)):
        spec = conv.ConvSpec.of(torch.empty(outputs, channels, 3, 3), stride=stride, padding=1)
        a = torch.randn(6, channels, 7, 5).to(dtype).contiguous(memory_format=layout)
        g = torch.randn(6, outputs, -(-7 // stride), -(-5 // stride)).to(dtype).contiguous(memory_format=layout)
        found |= {f"{name}, stride {stride}": op for name, op in of_images(a, g, spec, w).items()}
    index = torch.randint(0, 9, (2, 70))
    a, g, stored = torch.randn(2, 70, 33).to(dtype), torch.randn(2, 70, 17).to(dtype), torch.randn(2, 5001)
    return found | {
        "linear.per_example_grads": partial(linear.per_example_grads, a, g, backend="triton"),
        "linear.sq_norms": partial(linear.sq_norms, a, g, backend="triton"),
        "linear.gram_sq_norms": partial(linear.gram_sq_norms, a, g, backend="triton"),
        "linear.clipped_sum": partial(linear.clipped_sum, a, g, w, backend="triton"),
        "embedding.per_example_grads": partial(embedding.per_example_grads, index, g, 9, backend="triton"),
        "embedding.sq_norms": partial(embedding.sq_norms, index, g, 9, backend="triton"),
        "embedding.clipped_sum": partial(embedding.clipped_sum, index, g, 9, w, backend="triton"),
        "embedding.weighted_sum": partial(embedding.weighted_sum, index, g, 9, w, backend="triton"),
        "clip.sq_norms": partial(clip.sq_norms, stored, backend="triton"),
        "clip.clipped_sum": partial(clip.clipped_sum, stored, w, backend="triton"),
        "keyed.normal": partial(keyed.normal, index[:, 0], 3, (1, 2), step=5, count=107, backend="triton"),
        "noise.noised": partial(noise.noised, stored, 1.5, 20.0, bytes(32), backend="triton"),
    }


def of_images(a: Tensor, g: Tensor, spec: conv.ConvSpec, w: Tensor) -> dict[str, Callable[[], object]]:
    weight, flat = torch.randn(a.shape[1]), a.unflatten(0, (2, 3)).flatten(3)
    return {
        "conv.per_example_grads": partial(conv.per_example_grads, a, g, spec, 2, backend="triton"),
        "conv.sq_norms": partial(conv.sq_norms, a, g, spec, 2, backend="triton"),
        "conv.gram_sq_norms": partial(conv.gram_sq_norms, a, g, spec, 2, backend="triton"),
        "conv.clipped_sum": partial(conv.clipped_sum, a, g, spec, w, backend="triton"),
        "norm.group_norm_grads": partial(norm.group_norm_grads, a, a, 4, 1e-5, 2, backend="triton"),
        "norm.group_norm_backward": partial(norm.group_norm_backward, a, a, weight, 4, 1e-5, 2, backend="triton"),
        "affine.affine_grads": partial(affine.affine_grads, flat, flat, backend="triton"),
        "affine.bias_grads": partial(affine.bias_grads, flat, backend="triton"),
    }


if __name__ == "__main__":
    main()
