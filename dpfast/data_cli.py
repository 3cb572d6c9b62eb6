"""The commands ``dpfast data``: data sets as they are published, the stores made of them, and samples as pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpfast.console import Debug, reported, table

if TYPE_CHECKING:
    from dpfast.data.store import Store

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Data sets before training, and samples after.")


@app.command()
def prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="A published data set (camelyon17, cifar10, cifar100, fashionmnist, imagenet32, mnist), or a name for "
            "your own: class folders of images, npz, HDF5, Parquet or Arrow files."
        ),
    ],
    source: Annotated[Path, typer.Option(help="The file or folder that holds it; it is only read.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the store; data/NAME by default.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Crop and scale images to this many pixels a side; camelyon17: 32.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="It may be a part of the published data set, or a stand-in for it.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Turn a data set, as it is published, into a store that training reads. Nothing is downloaded.

    \b
    Your own data:
      class folders   cat/1.png, dog/x/2.jpg; or with splits: train/cat/1.png, test/cat/2.png
      npz, HDF5       images (uint8) and labels (whole numbers from 0), or train_images,
                      train_labels, test_images, test_labels; classes: their names, if any
      Parquet, Arrow  columns image (an encoded file) and label (whole numbers from 0), as
                      datasets writes them; the split is in the names of files or folders

    \b
    Examples:
      dpfast data prepare cifar10 --source ~/downloads/cifar-10-python.tar.gz
      dpfast data prepare camelyon17 --source ~/wilds/camelyon17_v1.0 --size 32
      dpfast data prepare imagenet32 --source ~/imagenet32 --out /scratch/imagenet32
      dpfast data prepare scans --source ~/scans --size 64
      dpfast data prepare mnist --source tests/mnist --partial
    """
    with reported(debug):
        typer.echo("checking the source ...", err=True)
        from dpfast.data.formats import canonical_name
        from dpfast.data.prepare import prepare_store
        from dpfast.runs.terminal import TerminalProgress

        folder = out or Path("data") / canonical_name(name)
        progress = TerminalProgress(sys.stderr)
        try:
            store = prepare_store(name, source, folder, size=size, partial=partial, progress=progress)
        finally:
            progress.close()
        _print_store(folder, store)


@app.command("stand-in")
def stand_in(
    name: Annotated[str, typer.Argument(help="camelyon17, cifar10, imagenet32 or mnist.")],
    out: Annotated[Path, typer.Option(help="An empty folder for the files.")],
    train: Annotated[int, typer.Option(help="Images to train on.")] = 2000,
    test: Annotated[int, typer.Option(help="Images to test on.")] = 500,
    debug: Debug = False,
) -> None:
    """Write generated images in the files of a published data set, to try a recipe before the data are there.

    \b
    Examples:
      dpfast data stand-in cifar10 --out stand-in/cifar10
      dpfast data prepare cifar10 --source stand-in/cifar10 --partial
      dpfast run cifar10-small
    """
    with reported(debug):
        from dpfast.data.standin import write_stand_in

        write_stand_in(name, out, train=train, test=test)
        typer.echo(f"{out}: shapes in the files of {name}. No image of the real data set is among them.")


@app.command()
def show(
    store: Annotated[Path, typer.Argument(help="Folder of a store.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read all of it and compare the checksums.")] = False,
    debug: Debug = False,
) -> None:
    """What a store holds: images of each class and split, checksums, and the files that it was made from.

    The numbers are those of the data itself, without any noise: they may not leave the building if it may not.

    \b
    Examples:
      dpfast data show data/cifar10
      dpfast data show data/cifar10 --verify
    """
    with reported(debug):
        from dpfast.data.store import open_store, read_store
        from dpfast.tables import columns

        found = read_store(store)
        splits = {split: open_store(store, split, verify=verify) for split in found.splits}
        _print_store(store, found)
        counts = {split: images.labels.bincount(minlength=images.num_classes) for split, images in splits.items()}
        rows = [[name, *(f"{count[i]:,}" for count in counts.values())] for i, name in enumerate(found.classes)]
        rows.append(["all classes", *(f"{len(images):,}" for images in splits.values())])
        typer.echo("")
        for line in columns([["", *counts], *rows], words=[0]):
            typer.echo(line)
        _print_checksums(found, verified=verify)


@app.command()
def export(
    samples: Annotated[Path, typer.Argument(help="Folder of samples with their privacy statement, as a run makes it.")],
    out: Annotated[Path, typer.Option(help="Folder for the pictures: empty, or of an earlier export of the same.")],
    debug: Debug = False,
) -> None:
    """Write samples as PNG files, a folder for each class, with their privacy statement beside.

    \b
    Examples:
      dpfast data export runs/demo/release/samples --out digits
      dpfast data export runs/cifar10/release/samples --out /scratch/synthetic-cifar10
    """
    with reported(debug):
        from dpfast.data.export import write_class_folders
        from dpfast.runs.terminal import TerminalProgress

        progress = TerminalProgress(sys.stderr)
        try:
            count = write_class_folders(samples, out, progress=progress)
        finally:
            progress.close()
        typer.echo(f"{out}: {count:,} images in class folders, and the privacy statement that goes with them")


def _print_store(folder: Path, store: Store) -> None:
    channels, height, width = store.shape
    rows = [
        ("store", str(folder)),
        ("data set", store.name + (" (a part, or a stand-in)" if store.partial else "")),
        ("images", f"{channels} x {height} x {width}, " + (store.resizing or "as they are")),
        ("splits", ", ".join(f"{name} {split.count:,}" for name, split in store.splits.items())),
        ("classes", str(len(store.classes))),
    ]
    table(rows)


def _print_checksums(store: Store, *, verified: bool) -> None:
    typer.echo(f"\nsha256 of the store{', all as written' if verified else ''}")
    for name, split in store.splits.items():
        for file, stored in (("images.npy", split.images), ("labels.npy", split.labels)):
            typer.echo(f"{stored.sha256}  {name}/{file}")
    typer.echo("\nsha256 of what it was made from")
    for source in store.source:
        files = f" ({source['files']:,} files)" if "files" in source else ""
        typer.echo(f"{source['sha256']}  {source.get('file') or source['folder']}{files}")
