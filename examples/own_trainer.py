"""Train a network of your own on a data set of your own: here one that draws the outline of a blob.

    python own_trainer.py --data blobs.npz    # images float32 [N, 24, 24], masks (0 or 1) of the same shape
    python own_trainer.py                     # on generated blobs

`own_trainer.py` is the ordinary script. `own_trainer_private.py` is the same one under differential privacy: dpfast's
trainer in the place of the loop, with a ledger and checkpoints in --state, so that a run that is cut off goes on.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

EPOCHS, BATCH_SIZE = 8, 50


class Blobs(Dataset):
    """Images [1, 24, 24] and their masks, turned by a random multiple of a right angle each time one is asked for."""

    def __init__(self, images, masks):
        self.images, self.masks = images, masks

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        turns = int(torch.randint(4, ()))
        return torch.rot90(self.images[index : index + 1], turns, (1, 2)), torch.rot90(self.masks[index], turns)

    @classmethod
    def generated(cls, count):
        """Ellipses of any size in noise."""
        random = torch.Generator().manual_seed(1)
        x, y, width, height = (low + span * torch.rand(count, 1, 1, generator=random) for low, span in PLACES)
        line = torch.arange(24.0)
        masks = ((line - x) / width) ** 2 + ((line.view(-1, 1) - y) / height) ** 2 < 1
        return cls(masks + 0.7 * torch.randn(masks.shape, generator=random), masks.float())


PLACES = ((8, 8), (8, 8), (3, 5), (3, 5))  # of an ellipse: the least x, y, width and height, and how much more at most


class Segmenter(nn.Module):
    """Two scales of convolutions, with group norms."""

    def __init__(self, width=16):
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.SiLU())
        self.coarse = nn.Sequential(
            nn.Conv2d(width, 2 * width, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(2 * width, width, 4, 2, 1)
        )
        self.out = nn.Conv2d(2 * width, 1, 1)

    def forward(self, images):
        fine = self.fine(images)
        return self.out(torch.cat([fine, F.silu(self.coarse(fine))], 1)).squeeze(1)


def losses(model, images, masks, _=None):
    """One for each image: the mean over its pixels."""
    return F.binary_cross_entropy_with_logits(model(images), masks, reduction="none").mean((1, 2))


@torch.no_grad()
def overlap(model, loader):
    """Intersection over union with the masks, on average."""
    found, masks = (torch.cat(part) for part in zip(*((model(x) > 0, y > 0) for x, y in loader), strict=True))
    return ((found & masks).sum((1, 2)) / (found | masks).sum((1, 2)).clamp(min=1)).mean().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="an .npz file of images and masks; generated ones otherwise")
    parser.add_argument("--state", type=Path, default=Path("own-trainer-state"), help="where the trained model goes")
    args = parser.parse_args(argv)

    if args.data:
        arrays = np.load(args.data)
        dataset = Blobs(*(torch.from_numpy(arrays[name]).float() for name in ("images", "masks")))
    else:
        dataset = Blobs.generated(1000)
    train = Subset(dataset, range(100, len(dataset)))
    held_out = DataLoader(Subset(dataset, range(100)), batch_size=50)
    model = Segmenter()

    loader = DataLoader(train, batch_size=BATCH_SIZE, shuffle=True)
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(EPOCHS):
        for images, masks in loader:
            losses(model, images, masks).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    print(f"overlap on held-out images: {overlap(model, held_out):.3f}")
    args.state.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.state / "model.pt")
    return model


if __name__ == "__main__":
    main()
