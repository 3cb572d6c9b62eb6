"""Train an LSTM over characters to tell which language a name is from.

    python names_rnn.py --data names      # a folder with a file for each language (French.txt), a name a line
    python names_rnn.py                   # on generated names

`names_rnn.py` is the ordinary script, `names_rnn_private.py` the same one under differential privacy.
"""

import argparse
import random
import string
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from dpfast import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

LETTERS = string.ascii_lowercase + " '-"
SYLLABLES = {"Andric": "an sen ol lund a ri", "Breltic": "ker gwen an le ol a", "Cindric": "zi ri ka le mo an"}


def generate(count, seed):
    """(language, name) pairs of three languages that do not exist, each with syllables of its own."""
    chance = random.Random(seed)
    languages = chance.choices(sorted(SYLLABLES), k=count)
    return [(each, "".join(chance.choices(SYLLABLES[each].split(), k=chance.randint(2, 4)))) for each in languages]


def read(folder):
    return [(file.stem, name) for file in sorted(folder.glob("*.txt")) for name in file.read_text().split("\n") if name]


def encode(names, languages, length):
    """Letter numbers [N, length], padded with 0 on the left so that the last letter is last, and language numbers."""
    letters = torch.zeros(len(names), length, dtype=torch.int64)
    for row, (_, name) in zip(letters, names, strict=True):
        numbers = [1 + LETTERS.find(letter) for letter in name.lower()[-length:]]  # 0 also for letters not known
        row[length - len(numbers) :] = torch.tensor(numbers)
    return letters, torch.tensor([languages.index(language) for language, _ in names])


class Classifier(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.letters = nn.Embedding(1 + len(LETTERS), width)
        self.lstm = nn.LSTMCell(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, letters):
        hidden, _ = reduce(lambda state, x: self.lstm(x, state), self.letters(letters).unbind(1), None)
        return self.head(hidden.view(len(letters), -1))


@torch.no_grad()
def accuracy(model, letters, languages):
    return (model(letters).argmax(1) == languages).float().mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder of names; generated ones otherwise")
    parser.add_argument("--names", type=int, default=2000, help="how many names to generate")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--length", type=int, default=16, help="letters of a name that are read, from its end")
    args = parser.parse_args(argv)

    names = read(args.data) if args.data else generate(args.names, seed=1)
    random.Random(0).shuffle(names)
    languages = sorted({language for language, _ in names})  # the list of classes is treated as public
    letters, labels = encode(names, languages, args.length)
    held_out = len(names) // 10  # treated as public, too
    train = TensorDataset(letters[held_out:], labels[held_out:])
    loader = DataLoader(train, batch_size=args.batch_size, shuffle=True)

    model = Classifier(len(languages), args.width)
    opt = torch.optim.Adam(model.parameters(), lr=args.lr)
    engine = PrivacyEngine()
    budget = {"target_epsilon": 8.0, "target_delta": 1e-5, "max_grad_norm": 1.0, "epochs": args.epochs}
    model, opt, loader = engine.make_private_with_epsilon(module=model, optimizer=opt, data_loader=loader, **budget)

    for epoch in range(1, args.epochs + 1):
        for batch, targets in loader:
            loss = F.cross_entropy(model(batch), targets)
            opt.zero_grad()
            loss.backward()
            opt.step()
        found = accuracy(model, letters[:held_out], labels[:held_out])
        print(f"epoch {epoch}: accuracy on held-out names {found:.3f}, epsilon {engine.get_epsilon(1e-5):.2f}")
    return model


if __name__ == "__main__":
    main()
