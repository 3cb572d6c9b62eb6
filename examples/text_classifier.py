"""Train a small transformer to tell good reviews from bad ones.

    python text_classifier.py --data reviews.tsv   # a line per review: 0 or 1, a tab, the text
    python text_classifier.py                      # on generated reviews

`text_classifier.py` is the ordinary script, `text_classifier_private.py` the same one under differential privacy.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

THINGS = ["food", "service", "room", "view", "music", "staff", "story", "ending", "camera", "battery"]
PRAISE = ["wonderful", "excellent", "lovely", "superb", "charming", "perfect"]
BLAME = ["awful", "dreadful", "boring", "rude", "broken", "disappointing"]
FILLERS = ["the", "was", "and", "really", "very", "quite", "we", "found", "it", "a", "little", "then", "again"]


def generate(count, seed):
    """(label, text) pairs: one thing is praised (1) or blamed (0), sometimes by a "not" before the opposite."""
    chance = random.Random(seed)
    reviews = []
    for _ in range(count):
        label, turned = chance.randrange(2), chance.random() < 0.3
        verdict = chance.choice((BLAME, PRAISE)[label ^ turned])
        around = [" ".join(chance.choices(FILLERS + THINGS, k=chance.randint(1, 6))) for _ in range(2)]
        reviews.append((label, f"{around[0]} {'not ' * turned}{verdict} {around[1]}"))
    return reviews


def read(path):
    lines = [line.split("\t", 1) for line in path.read_text().splitlines() if line]
    return [(int(label), text) for label, text in lines]


def encode(reviews, vocabulary_size, length):
    """Token numbers [N, length] (0 is padding; a word's number is a hash of it) and labels [N].

    A hash, because a vocabulary of the words that occur would itself tell something about the reviews.
    """
    tokens = torch.zeros(len(reviews), length, dtype=torch.int64)
    for row, (_, text) in zip(tokens, reviews, strict=True):
        numbers = [1 + int.from_bytes(word.lower().encode(), "little") % (vocabulary_size - 1) for word in text.split()]
        row[: len(numbers)] = torch.tensor(numbers)[:length]
    return tokens, torch.tensor([label for label, _ in reviews])


class Classifier(nn.Module):
    def __init__(self, vocabulary_size, length, width=32, classes=2):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, width, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.encoder = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens):
        padding = tokens == 0
        hidden = self.encoder(self.words(tokens) + self.places, src_key_padding_mask=padding)
        kept = (~padding).unsqueeze(-1)
        return self.head((hidden * kept).sum(1) / kept.sum(1).clamp(min=1))


@torch.no_grad()
def accuracy(model, loader):
    model.eval()
    return torch.cat([(model(tokens).argmax(1) == labels).float() for tokens, labels in loader]).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a file of labels and texts; generated reviews otherwise")
    parser.add_argument("--reviews", type=int, default=6000, help="how many reviews to generate")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--vocabulary-size", type=int, default=997)
    parser.add_argument("--length", type=int, default=32)
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    reviews = read(args.data) if args.data else generate(args.reviews, seed=1)
    held_out = len(reviews) // 10  # treated as public
    train, test = (
        TensorDataset(*encode(part, args.vocabulary_size, args.length))
        for part in (reviews[held_out:], reviews[:held_out])
    )
    loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test, batch_size=256)

    model = Classifier(args.vocabulary_size, args.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    for epoch in range(1, args.epochs + 1):
        model.train()
        for tokens, labels in loader:
            loss = F.cross_entropy(model(tokens), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = accuracy(model, test_loader)
        print(f"epoch {epoch}: test accuracy {found:.3f}, last loss {loss:.3f}")
    return model


if __name__ == "__main__":
    main()
