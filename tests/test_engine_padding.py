"""Padding to the longest example of a batch: its length must reach nobody else's share."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dpfast.errors import PrivacyError
from engine_cases import made_private

REACHES = "its length reaches the shares of the others"
UNSEEN = "not shown that its length does not reach the shares"


class Texts(torch.utils.data.Dataset):
    """Of 40 different lengths, with a label."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.arange(i, 2 * i + 2) % 15 + 1, i % 5


def on_the_right(items):
    return pad_sequence([tokens for tokens, _ in items], batch_first=True), torch.tensor([label for _, label in items])


def on_the_left(items):
    tokens, labels = on_the_right([(tokens.flip(0), label) for tokens, label in items])
    return tokens.flip(1), labels


def as_a_dict(items):
    tokens, labels = on_the_right(items)
    return {"tokens": tokens, "mask": tokens != 0, "labels": labels}


def masked_at_random(items):
    tokens, labels = on_the_right(items)
    return torch.where(torch.rand(tokens.shape) < 0.1, 15, tokens), labels


class Mean(nn.Module):
    """Of embeddings, over all positions or those of the text."""

    def __init__(self, *, masks, dropout=0.0):
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 5)
        self.masks, self.dropout = masks, nn.Dropout(dropout)

    def forward(self, tokens):
        embedded = self.dropout(self.embedding(tokens))
        if not self.masks:
            return self.head(embedded.mean(1))
        mask = (tokens != 0).unsqueeze(2)
        return self.head((embedded * mask).sum(1) / mask.sum(1))


class Attends(nn.Module):
    """A transformer with learned positions, which may mask the padding; logits for each position or each text."""

    def __init__(self, *, masks, each=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.position = nn.Embedding(16, 8), nn.Embedding(64, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head, self.masks, self.each = nn.Linear(8, 16), masks, each

    def forward(self, tokens):
        padding = tokens == 0
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        x = self.layer(x, src_key_padding_mask=padding if self.masks else None)
        return self.head(x if self.each else (x * ~padding.unsqueeze(2)).sum(1) / (~padding).sum(1, keepdim=True))


class LastState(nn.Module):
    """A recurrent net that reads the padding, too."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell, self.head = nn.Embedding(16, 8), nn.GRUCell(8, 8), nn.Linear(8, 5)

    def forward(self, tokens):
        state = torch.zeros(len(tokens), 8)
        for x in self.embedding(tokens).unbind(1):
            state = self.cell(x, state)
        return self.head(state)


def trained(model, collate, loss, workers=0):
    """Some batches; those that were looked at have other lengths with less padding."""
    _, model, optimizer, loader = made_private(Texts(), model, collate_fn=collate, num_workers=workers)
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            loss(model, *(batch.values() if isinstance(batch, dict) else batch)).backward()
            optimizer.step()


def of_texts(model, tokens, labels):
    return F.cross_entropy(model(tokens), labels)


def of_a_dict(model, tokens, mask, labels):
    assert torch.equal(mask, tokens != 0)
    return F.cross_entropy(model(tokens), labels)


def of_tokens(model, tokens, _):
    """Each text's mean over its tokens."""
    losses = F.cross_entropy(model(tokens).transpose(1, 2), tokens, ignore_index=0, reduction="none")
    return (losses.sum(1) / (tokens != 0).sum(1)).mean()


def of_all_positions(model, tokens, _):
    return F.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none").mean(1).mean()


def of_padding_too(model, tokens, _):
    return F.cross_entropy(model(tokens).transpose(1, 2), tokens, reduction="none").sum(1).mean()


def over_the_longest(model, tokens, _):
    losses = F.cross_entropy(model(tokens).transpose(1, 2), tokens, ignore_index=0, reduction="none")
    return (losses.sum(1) / tokens.shape[1]).mean()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("collate", [on_the_right, on_the_left], ids=lambda f: f.__name__)
def test_a_model_that_counts_the_padding_in(collate, workers):
    with pytest.raises(PrivacyError, match=REACHES):
        trained(Mean(masks=False), collate, of_texts, workers)


@pytest.mark.parametrize(
    ("model", "collate", "loss"),
    [
        (Attends(masks=False), on_the_right, of_texts),
        (Attends(masks=True), on_the_left, of_texts),  # whose positions depend on the longest
        (LastState(), on_the_right, of_texts),
        (Attends(masks=True, each=True), on_the_right, of_all_positions),
        (Attends(masks=True, each=True), on_the_right, of_padding_too),
        (Attends(masks=True, each=True), on_the_right, over_the_longest),
        (Attends(masks=False, each=True), on_the_right, of_tokens),
        (Mean(masks=False), as_a_dict, of_a_dict),
    ],
    ids=["attention", "positions", "state", "positions' mean", "padding", "length", "tokens", "dict"],
)
def test_ways_in_which_the_longest_reaches_the_others(model, collate, loss):
    with pytest.raises(PrivacyError, match=REACHES):
        trained(model, collate, loss)


def test_padding_that_is_masked_under_autocast():
    """The backward pass is outside of it; logits are float32 again."""

    def loss(model, tokens, labels):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(tokens).float(), labels)

    trained(Attends(masks=True), on_the_right, loss)
    with pytest.raises(PrivacyError, match=REACHES):
        trained(Mean(masks=False), on_the_right, loss)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("model", "collate", "loss"),
    [
        (Mean(masks=True), on_the_right, of_texts),
        (Mean(masks=True, dropout=0.5), on_the_left, of_texts),
        (Mean(masks=True), as_a_dict, of_a_dict),
        (Attends(masks=True), on_the_right, of_texts),
        (Attends(masks=True, each=True), on_the_right, of_tokens),
    ],
    ids=["mean", "dropout", "dict", "attention", "tokens"],
)
def test_padding_that_is_masked_is_neither_refused_nor_warned_of(model, collate, loss, workers):
    trained(model, collate, loss, workers)


@pytest.mark.filterwarnings("ignore:it was not shown that the code around")
def test_padding_that_cannot_be_looked_at_is_warned_of():
    with pytest.warns(UserWarning, match=f"{UNSEEN}.*draws random numbers"):
        trained(Mean(masks=True), masked_at_random, of_texts)

    def by_numpy(model, tokens, labels):
        return F.cross_entropy(model(torch.from_numpy(tokens.numpy())), labels)

    with pytest.warns(UserWarning, match=UNSEEN):
        trained(Mean(masks=True), on_the_right, by_numpy)
