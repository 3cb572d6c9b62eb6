"""Opacus' tutorials in small: with noise off, and the same batches, losses and weights are Opacus' step for step."""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dpfast
from dpfast.engine import BatchMemoryManager
from dpfast.engine import loader as engine_loader

opacus = pytest.importorskip("opacus")

# Opacus' own: of its secure mode, and of hooks on what is no leaf; and torch's of it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

STEPS = 4


class Block(nn.Module):
    """Of a ResNet with group norms."""

    def __init__(self, width_in, width, stride):
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(4, width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(4, width)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride) if stride != 1 or width_in != width else nn.Identity()

    def forward(self, x):
        out = F.relu(self.norm1(self.first(x)))
        return F.relu(self.norm2(self.second(out)) + self.shortcut(x))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.GroupNorm(4, 8),
        nn.ReLU(),
        Block(8, 8, 1),
        Block(8, 16, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class TextClassifier(nn.Module):
    """The mean of a text's embeddings, less padding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.hidden = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.out = nn.Linear(12, 3)

    def forward(self, tokens):
        mask = (tokens != 0).unsqueeze(-1)
        mean = (self.embedding(tokens) * mask).sum(1) / mask.sum(1).clamp(min=1)
        return self.out(self.norm(F.relu(self.hidden(mean))))


class CharRNN(nn.Module):
    """Opacus' tutorial on names: an LSTM over characters, whose last state is classified."""

    def __init__(self, lstm):
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.lstm = lstm
        self.out = nn.Linear(8, 3)

    def forward(self, tokens):
        states, _ = self.lstm(self.embedding(tokens))
        return self.out(states[:, -1])


def image_data():
    return TensorDataset(torch.randn(48, 3, 8, 8), torch.randint(0, 10, (48,)))


def text_data():
    return TensorDataset(torch.randint(0, 30, (48, 7)), torch.randint(0, 3, (48,)))


def char_rnn():
    from opacus.layers import DPLSTM

    return CharRNN(DPLSTM(8, 8, batch_first=True))


TUTORIALS = {
    "cifar10": (resnet, image_data),
    "text": (TextClassifier, text_data),
    "names": (char_rnn, text_data),
}


def samples(size, rate):
    """The same for both: some of different sizes."""
    chosen = np.random.default_rng(0)
    return [np.flatnonzero(chosen.random(size) < rate) for _ in range(STEPS)]


def made_private(engine, make_net, make_data, mode, **settings):
    """Model, optimizer, loader and criterion, of either library."""
    torch.manual_seed(0)
    data, net = make_data(), make_net()
    criterion = nn.CrossEntropyLoss(reduction=settings.get("loss_reduction", "mean"))
    made = engine.make_private(
        module=net,
        optimizer=torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9),
        data_loader=DataLoader(data, batch_size=12),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        grad_sample_mode=mode,
        criterion=criterion,
        **settings,
    )
    return made[0], made[1], made[-1], made[2] if len(made) == 4 else criterion


def trained_by_opacus(make_net, make_data, largest=None, mode="hooks", **settings):
    """Losses of the physical batches, and the weights after each update."""
    from opacus.utils.batch_memory_manager import BatchMemoryManager as OpacusManager

    model, optimizer, loader, criterion = made_private(opacus.PrivacyEngine(), make_net, make_data, mode, **settings)
    given = samples(len(loader.dataset), loader.sample_rate)
    loader.batch_sampler.__class__ = type(
        "Given", (type(loader.batch_sampler),), {"__iter__": lambda self: iter(given)}
    )
    return looped(model, optimizer, loader, criterion, OpacusManager, largest)


def trained_by_dpfast(make_net, make_data, monkeypatch, largest=None, mode="hooks", **settings):
    model, optimizer, loader, criterion = made_private(dpfast.PrivacyEngine(), make_net, make_data, mode, **settings)
    given = iter(samples(len(loader.dataset), loader.sample_rate))
    monkeypatch.setattr(engine_loader, "poisson_sample", lambda size, rate: torch.from_numpy(next(given)))
    return looped(model, optimizer, loader, criterion, BatchMemoryManager, largest)


def looped(model, optimizer, loader, criterion, manager, largest):
    """The loop of the tutorials, the same text for both."""
    losses, weights = [], []
    context = (
        manager(data_loader=loader, max_physical_batch_size=largest, optimizer=optimizer)
        if largest
        else contextlib.nullcontext(loader)
    )
    model.train()
    with context as batches:
        for x, y in batches:
            optimizer.zero_grad()
            output = model(x)
            loss = criterion(output, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            weights.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))
    return losses, weights


@pytest.mark.parametrize("settings", [{}, {"loss_reduction": "sum"}, {"largest": 5}, {"mode": "ghost"}], ids=str)
@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_losses_and_weights_are_those_of_opacus(tutorial, settings, monkeypatch):
    if tutorial == "names" and settings.get("mode") == "ghost":
        pytest.skip("Opacus has no ghost mode for its LSTM")
    theirs, their_weights = trained_by_opacus(*TUTORIALS[tutorial], **settings)
    ours, our_weights = trained_by_dpfast(*TUTORIALS[tutorial], monkeypatch, **settings)
    assert len(ours) == len(theirs) >= STEPS
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    assert not torch.equal(our_weights[0], our_weights[-1])
    for mine, other in zip(our_weights, their_weights, strict=True):
        # Opacus clips to C / (norm + 1e-6).
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)
