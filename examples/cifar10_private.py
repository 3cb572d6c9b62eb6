"""Train a small ResNet with group norms on CIFAR-10.

    python cifar10.py --data cifar-10-batches-py
    python cifar10.py                             # on generated images of the same shape

`cifar10.py` is the ordinary script, `cifar10_private.py` the same one under differential privacy.
"""

import argparse
import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from dpfast import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


def load_batches(files):
    """Images [N, 3, 32, 32] in [-1, 1] and labels [N], from the pickled files that CIFAR-10 is published in."""
    parts = [pickle.loads(file.read_bytes(), encoding="bytes") for file in files]
    images = torch.cat([torch.as_tensor(part[b"data"]).view(-1, 3, 32, 32) for part in parts])
    return images / 127.5 - 1, torch.tensor([label for part in parts for label in part[b"labels"]])


def generate(count, seed):
    """Ten kinds of coloured blobs, each image with noise of its own."""
    kinds = F.interpolate(torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(0)), 32, mode="bilinear")
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=random)
    return kinds[labels].tanh() + 0.5 * torch.randn(count, 3, 32, 32, generator=random), labels


class Flipped(Dataset):
    """The images, every second time one is asked for as in a mirror."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, self.labels[index]


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Sequential):
    """Three stages; group norms, because a batch norm would make every image's gradient depend on the others."""

    def __init__(self, width, classes=10):
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            Block(width, width, stride=1),
            Block(width, 2 * width, stride=2),
            Block(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, classes),
        )


@torch.no_grad()
def accuracy(model, loader, device):
    model.eval()
    hits = [(model(images.to(device)).argmax(1) == labels.to(device)).float() for images, labels in loader]
    return torch.cat(hits).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the unpacked folder cifar-10-batches-py; generated images otherwise")
    parser.add_argument("--images", type=int, default=2000, help="how many images to generate")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    # No manual_seed: of numbers known beforehand, one record more or less would give other ones to all the others.

    if args.data:
        train, test = (load_batches(sorted(args.data.glob(name))) for name in ("data_batch_*", "test_batch"))
    else:
        train, test = generate(args.images, seed=1), generate(500, seed=2)
    loader = DataLoader(Flipped(*train), batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(TensorDataset(*test), batch_size=500)

    model = ResNet(args.width).to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    engine = PrivacyEngine()
    budget = {"target_epsilon": 8.0, "target_delta": 1e-5, "max_grad_norm": 1.0, "epochs": args.epochs}
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, **budget
    )

    for epoch in range(1, args.epochs + 1):
        model.train()
        for images, labels in loader:
            loss = F.cross_entropy(model(images.to(args.device)), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = accuracy(model, test_loader, args.device)
        print(f"epoch {epoch}: test accuracy {found:.3f}, epsilon {engine.get_epsilon(1e-5):.2f}")
    return model


if __name__ == "__main__":
    main()
