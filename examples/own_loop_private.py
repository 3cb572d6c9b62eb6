"""Train a network of your own in a loop of your own: here one that takes noise away from curves.

    python own_loop.py --data curves.npy      # float32 [N, 32]
    python own_loop.py                        # on generated curves

`own_loop.py` is the ordinary script. `own_loop_private.py` is the same one under differential privacy, from dpfast's
parts: a clipper in the place of the backward pass, and an optimizer that adds noise. Each curve enters a step 4 times,
every time with noise of its own; its four gradients are averaged before they are clipped.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from dpfast import DPOptimizer, GhostClipper, Plan, poisson_sample
from torch import nn

K = 4  # noisy versions of each curve
B = 64  # curves in a step
S = 300  # steps


def generate(count, seed):
    """Sums of two waves, [count, 32]."""
    random = torch.Generator().manual_seed(seed)
    height, speed, start = torch.rand(3, count, 2, 1, generator=random)
    waves = (0.5 + height) * torch.sin(torch.arange(32) * (0.1 + 0.4 * speed) + 6.28 * start)
    return waves.sum(1)


class Denoiser(nn.Module):
    def __init__(self, length=32, width=64):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(length, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, length)
        self.share = nn.Parameter(torch.zeros(length))  # of the input, which is passed on

    def forward(self, x):
        return self.share * x + self.out(self.inner(x))


def losses(model, curves):
    """One for each row."""
    noisy = curves + 0.5 * torch.randn_like(curves)
    return ((model(noisy) - curves) ** 2).mean(1)


@torch.no_grad()
def error(model, curves):
    return losses(model, curves).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npy file of curves; generated ones otherwise")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args(argv)

    curves = torch.from_numpy(np.load(args.data)).float() if args.data else generate(2000, seed=1)
    held_out, curves = curves[:200], curves[200:]
    n = len(curves)
    model = Denoiser(curves.shape[1])
    plan = Plan(dataset_size=n, expected_batch_size=B, steps=S, max_grad_norm=1, target_epsilon=8, target_delta=1e-5)
    clipper = GhostClipper(model, max_grad_norm=plan.max_grad_norm, augmult=K)
    optimizer = DPOptimizer(torch.optim.Adam(model.parameters(), lr=args.lr), plan, clipper)

    for step in range(1, S + 1):
        batch = poisson_sample(n, plan.sample_rate)
        with clipper:
            clipper.backward(losses(model, curves[batch].repeat_interleave(K, 0)))
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: held-out error {error(model, held_out):.3f}, epsilon {plan.epsilon(step):.2f}")
    return model


if __name__ == "__main__":
    main()
