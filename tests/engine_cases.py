"""What the tests of the engine share: small data sets, models and loops."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast


def pictures(count: int = 60, classes: int = 5) -> TensorDataset:
    torch.manual_seed(0)
    return TensorDataset(torch.randn(count, 3, 6, 6), torch.randint(0, classes, (count,)))


def small_net(classes: int = 5) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.GroupNorm(2, 8), nn.ReLU(), nn.Linear(8, classes))


class Negated(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        return -g


def made_private(
    dataset=None,
    net=None,
    *,
    engine=None,
    batch_size=10,
    collate_fn=None,
    num_workers=0,
    optimizer=torch.optim.SGD,
    lr=0.1,
    **settings,
):
    """engine, model, optimizer, loader."""
    net = small_net() if net is None else net
    engine = dpfast.PrivacyEngine() if engine is None else engine
    given = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, **settings}
    dataset = pictures() if dataset is None else dataset
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn, num_workers=num_workers)
    made = engine.make_private(module=net, optimizer=optimizer(net.parameters(), lr=lr), data_loader=loader, **given)
    return engine, *made


def with_epsilon(target_epsilon=math.inf, epochs=1, engine=None, **settings):
    net = small_net()
    engine = dpfast.PrivacyEngine() if engine is None else engine
    made = engine.make_private_with_epsilon(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        data_loader=DataLoader(pictures(), batch_size=10),
        **{
            "target_epsilon": target_epsilon,
            "target_delta": 1e-4,
            "epochs": epochs,
            "max_grad_norm": 1.0,
            **settings,
        },
    )
    return engine, *made


def train(model, optimizer, loader, loss=F.cross_entropy) -> int:
    """One pass; the number of batches."""
    batches = 0
    for x, y in loader:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        batches += 1
    return batches


def numbers(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
