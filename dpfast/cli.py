"""The command ``dpfast``. Everything heavy is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpfast import data_cli
from dpfast.console import Debug, reported, table
from dpfast.errors import ConfigError

if TYPE_CHECKING:
    from dpfast.recipes import Recipe
    from dpfast.runs.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Differentially private fine-tuning of diffusion models.\n\nStart with: dpfast demo",
)

app.add_typer(data_cli.app, name="data")


def _settings(values: list[str] | None) -> list[str] | None:
    """Here, not where a recipe is loaded: ``--set key value`` fails before, at the stray word ``value``."""
    for value in values or ():
        if "=" not in value:
            raise typer.BadParameter(f"expected key=value, got {value!r}, as in: --set {value}=...")
    return values


RecipeArgument = Annotated[str, typer.Argument(help="A recipe by name (digits) or a .toml file.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        callback=_settings,
        help="Replace a value of the recipe; may be given several times.",
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="Name of the run; the recipe's own by default.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder that holds the runs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the recipe and what it will cost; do nothing.")]
RUNS = Path("runs")


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="dpfast")


@app.command()
def demo(
    settings: Set = None, name: Name = "demo", runs: Runs = RUNS, dry_run: DryRun = False, debug: Debug = False
) -> None:
    """Train a small private model on handwritten digits and show what it is worth.

    \b
    Examples:
      dpfast demo
      dpfast demo --set target_epsilon=1 --name demo-eps1
    """
    with reported(debug):
        _execute("digits", settings, name, runs, dry_run, "report")


def _command(name: str, until: str, text: str) -> None:
    """A command that carries out a recipe up to the stage ``until``; ``text`` is its help."""

    def command(
        recipe: RecipeArgument,
        settings: Set = None,
        name: Name = None,
        runs: Runs = RUNS,
        dry_run: DryRun = False,
        debug: Debug = False,
    ) -> None:
        with reported(debug):
            _execute(recipe, settings, name, runs, dry_run, until)

    app.command(name, help=text)(command)


_command(
    "run",
    "report",
    """Carry out a recipe from pre-training to the reports. Repeated, it goes on where it stopped.

    \b
    Examples:
      dpfast run digits
      dpfast run digits --set target_epsilon=1 --set private.steps=60 --name eps1
      dpfast run digits --dry-run
      dpfast run my-recipe.toml
    """,
)
_command(
    "pretrain",
    "pretrain",
    """Pre-train on public images only; no privacy is spent.

    \b
    Examples:
      dpfast pretrain digits
      dpfast pretrain digits --set pretrain.steps=500 --name quick
    """,
)
_command(
    "train",
    "train",
    """Fine-tune privately, after pre-training where that is not done yet.

    \b
    Examples:
      dpfast train digits
      dpfast train digits --set target_epsilon=1 --name eps1
    """,
)
_command(
    "sample",
    "sample",
    """Draw synthetic images, after training where that is not done yet. More images cost no privacy.

    \b
    Examples:
      dpfast sample digits
      dpfast sample digits --set sample.count=10000
      dpfast sample runs/eps1/recipe.toml --set guidance=1.25
    """,
)
_command(
    "evaluate",
    "report",
    """Measure the samples beside their baselines and write both reports.

    \b
    Examples:
      dpfast evaluate digits
      dpfast evaluate runs/eps1/recipe.toml --set seeds=5
    """,
)


Vary = Annotated[
    list[str],
    typer.Option(
        "--vary",
        metavar="KEY=VALUE,VALUE,...",
        callback=_settings,
        help="Values of a key of [evaluate] to compare; of several, every combination. With --noised, of [sample].",
    ),
]


def _varied(entries: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, _, values in (entry.partition("=") for entry in entries):
        if key.strip() in found:
            raise ConfigError(f"--vary {key.strip()}: given twice; give all values at once, as in --vary {key}=1,2,3")
        found[key.strip()] = values.split(",")
    return found


@app.command()
def sweep(
    recipe: RecipeArgument,
    vary: Vary,
    settings: Set = None,
    name: Name = None,
    noised: Annotated[
        bool,
        typer.Option("--noised", help="Choose by noised counts of private images, which private.choices pays for."),
    ] = False,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Compare settings of classifiers on synthetic images, which costs no privacy, and choose one.

    \b
    Examples:
      dpfast sweep digits --vary evaluate.learning_rate=1e-3,4e-3 --vary evaluate.steps=200,600
      dpfast sweep runs/eps1/recipe.toml --vary network=small-cnn,wrn-16-1
      dpfast sweep digits --name three --set private.choices=3 --vary guidance=1,1.25,1.5 --noised
    """
    with reported(debug):
        resolved = _load(recipe, settings, name)
        typer.echo("loading ...", err=True)
        from dpfast.runs.sweep import summary, sweep, variants
        from dpfast.runs.terminal import TerminalProgress

        varied = _varied(vary)
        compared = variants(recipe, [*(settings or []), f"name={resolved.name}"], varied)
        for line in summary(sweep(resolved, compared, runs, TerminalProgress(sys.stderr), noised=noised)):
            typer.echo(line)


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of finished runs, such as runs/demo.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The page to write; by default compared.html among the first run's private files."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Put finished runs side by side: accuracies, distances, and FID by epsilon. For inside the house.

    \b
    Examples:
      dpfast compare runs/eps1 runs/eps10 runs/no-noise --out runs/compared.html
    """
    with reported(debug):
        from dpfast.report.comparison import compare as write

        page = out or folders[0] / "internal" / "compared.html"
        write(folders, page)
        typer.echo(f"Must not leave (private):  {page}")


@app.command()
def audit(
    recipe: RecipeArgument,
    settings: Set = None,
    name: Name = None,
    canaries: Annotated[int, typer.Option(help="Examples that an attacker looks for; more show more.")] = 1000,
    background: Annotated[int, typer.Option(help="Private images that are trained on beside them.")] = 200,
    runs: Runs = RUNS,
    debug: Debug = False,
) -> None:
    """Attack a recipe's private training, and what its run has made: lower bounds on epsilon, members, copies.

    Exit code 1 where the promise is refuted. For inside the house: nothing of it may be released.

    \b
    Examples:
      dpfast audit digits
      dpfast audit runs/eps1/recipe.toml --canaries 3000
    """
    with reported(debug):
        resolved = _load(recipe, settings, name)
        typer.echo("loading ...", err=True)
        from dpfast.runs.audit import audit_run, summary
        from dpfast.runs.pipeline import open_run
        from dpfast.runs.terminal import TerminalProgress

        run = open_run(resolved, runs)
        with run.directory.locked():
            found = audit_run(run, TerminalProgress(sys.stderr), canaries=canaries, background=background)
        for line in summary(found, run):
            typer.echo(line)
        if found.refuted:
            raise typer.Exit(1)


@app.command()
def account(
    steps: Annotated[int, typer.Option(help="Number of private steps.")],
    delta: Annotated[float, typer.Option(help="Chance of failure that is tolerated.")],
    sample_rate: Annotated[
        float | None, typer.Option(help="Probability of each image to be in a batch; or give the next two.")
    ] = None,
    batch_size: Annotated[float | None, typer.Option(help="Expected batch size.")] = None,
    dataset_size: Annotated[int | None, typer.Option(help="Number of private images.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="To find epsilon.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="To find the noise multiplier.")] = None,
    neighboring: Annotated[str, typer.Option(help="add_remove or replace.")] = "add_remove",
    debug: Debug = False,
) -> None:
    """Epsilon of a noise multiplier, or the noise multiplier for an epsilon.

    \b
    Examples:
      dpfast account --sample-rate 0.25 --steps 80 --delta 1e-4 --noise-multiplier 1.24
      dpfast account --batch-size 16384 --dataset-size 50000 --steps 200 --delta 1e-5 --epsilon 10
    """
    with reported(debug):
        from dpfast.runs.describe import account as compute

        table(
            compute(
                steps=steps,
                delta=delta,
                sample_rate=sample_rate,
                batch_size=batch_size,
                dataset_size=dataset_size,
                noise_multiplier=noise_multiplier,
                epsilon=epsilon,
                neighboring=neighboring,
            )
        )


@app.command()
def plan(
    recipe: Annotated[
        str | None,
        typer.Argument(help="A recipe by name (digits) or a .toml file; left out, with --device: an 83M UNet."),
    ] = None,
    settings: Set = None,
    device: Annotated[str | None, typer.Option(help="A GPU that need not be here: h200.")] = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="FLOPs, bytes and time of each kernel.")] = False,
    nodes: Annotated[int | None, typer.Option(help="Servers that share the work of the recipe.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs in each of them, h200 unless --device says.")] = None,
    debug: Debug = False,
) -> None:
    """The plan of a recipe: sampling, noise, epsilon by step; the form, time and memory of each weight's gradients.

    Without a recipe: the private step of an 83M UNet beside the ordinary one, predicted for a GPU. With nodes: time,
    communication and memory of the whole recipe on so many GPUs, predicted, which needs neither them nor the data.

    \b
    Examples:
      dpfast plan digits
      dpfast plan digits --set performance.memory_budget=20000000
      dpfast plan digits --set target_epsilon=1 --set private.steps=60
      dpfast plan --device h200 --kernels
      dpfast plan cifar10 --nodes 2 --gpus-per-node 8
    """
    with reported(debug):
        if nodes is not None or gpus_per_node is not None:
            _plan_cluster(recipe, settings, device, nodes, gpus_per_node, kernels)
            return
        if recipe is None:
            _plan_elsewhere(device, settings, kernels)
            return
        if kernels:
            raise ConfigError("--kernels: the plan of a recipe lists its weights instead; leave out the recipe")
        if device is not None:
            from dpfast.kernels.rates import named

            named(device)  # before anything is printed
        from dpfast.runs.describe import describe_plan, describe_step

        resolved = _load(recipe, settings, None)
        table(describe_plan(resolved))
        typer.echo("\n" + describe_step(resolved, device))


@app.command()
def bench(
    recipe: RecipeArgument,
    settings: Set = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds; medians are shown.")] = 7,
    debug: Debug = False,
) -> None:
    """Time and memory of a recipe's private step on this machine, beside the ordinary step of the same rows.

    \b
    Examples:
      dpfast bench digits
      dpfast bench digits --set private.augmult=16 --rounds 15
    """
    with reported(debug):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its profiler warns of memory that is older than it
        from dpfast.runs.describe import describe_bench
        from dpfast.runs.terminal import TerminalProgress

        for line in describe_bench(_load(recipe, settings, None), rounds, TerminalProgress(sys.stderr)):
            typer.echo(line)


@app.command()
def doctor(runs: Runs = RUNS, debug: Debug = False) -> None:
    """Versions, devices, native module, threads and disk: what to send along with a question.

    \b
    Examples:
      dpfast doctor
    """
    with reported(debug):
        from dpfast.doctor import examine

        table(examine(runs))


def _plan_elsewhere(device: str | None, settings: list[str] | None, kernels: bool) -> None:
    if device is None or settings:
        asked = "--set needs a recipe" if settings else "expected a recipe"
        raise ConfigError(f"{asked}, as in: dpfast plan digits; or a GPU alone: dpfast plan --device h200")
    from dpfast.runs.elsewhere import foretold
    from dpfast.runs.terminal import TerminalProgress

    for line in foretold(device, TerminalProgress(sys.stderr), kernels=kernels):
        typer.echo(line)


def _plan_cluster(
    recipe: str | None,
    settings: list[str] | None,
    device: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    kernels: bool,
) -> None:
    wanted = "as in: dpfast plan cifar10 --nodes 2 --gpus-per-node 8"
    if recipe is None:
        raise ConfigError(f"--nodes, --gpus-per-node: expected a recipe, {wanted}")
    if nodes is None or gpus_per_node is None:
        raise ConfigError(f"expected both --nodes and --gpus-per-node, {wanted}")
    if kernels:
        raise ConfigError(
            "--kernels: a plan for several GPUs has none; leave it out, or leave out the nodes and recipe"
        )
    from dpfast.runs.cluster import plan_cluster
    from dpfast.runs.cluster_page import page

    planned = plan_cluster(
        _load(recipe, settings, None), nodes=nodes, gpus_per_node=gpus_per_node, device=device or "h200"
    )
    for line in page(planned):
        typer.echo(line)


def _load(recipe: str, settings: list[str] | None, name: str | None) -> Recipe:
    from dpfast.recipes import load

    return load(recipe, [*(settings or []), *([f"name={name}"] if name else [])])


def _execute(recipe: str, settings: list[str] | None, name: str | None, runs: Path, dry_run: bool, until: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _execute_together(recipe, settings, name, runs, dry_run, until)
        return
    resolved = _load(recipe, settings, name)
    if dry_run:
        _dry_run(resolved, runs)
        return
    typer.echo("loading ...", err=True)
    from dpfast.runs.pipeline import execute
    from dpfast.runs.terminal import TerminalProgress

    done = execute(resolved, runs, TerminalProgress(sys.stderr), until=until)
    _summary(done, until)


def _execute_together(
    recipe: str, settings: list[str] | None, name: str | None, runs: Path, dry_run: bool, until: str
) -> None:
    """The same in one of the processes that torchrun has started; rank 0 speaks."""
    from dpfast.runs.launch import together, use_own_gpu
    from dpfast.runs.pipeline import execute
    from dpfast.runs.terminal import TerminalProgress

    with together() as ranks:
        resolved = ranks.first(lambda: _load(recipe, settings, name))
        if dry_run:
            ranks.first(lambda: _dry_run(resolved, runs))
            return
        if ranks.leads:
            typer.echo(f"loading, on {ranks.size} processes ...", err=True)
        use_own_gpu(resolved.performance.device, ranks)
        done = execute(resolved, runs, TerminalProgress(sys.stderr), until=until, ranks=ranks)
        if ranks.leads:
            _summary(done, until)


def _dry_run(recipe: Recipe, runs: Path) -> None:
    from dpfast.recipes import to_toml
    from dpfast.runs.describe import describe_cost
    from dpfast.runs.pipeline import open_run

    run = open_run(recipe, runs, elsewhere=True)  # a value that cannot be used is refused before anything is printed
    typer.echo(to_toml(recipe))
    if run.recipe.data != recipe.data:
        typer.echo(f"not all data are in {recipe.data.folder}: planned for as many images as are published", err=True)
    typer.echo("planning a step, and measuring a few on random images ...", err=True)
    for name, value in describe_cost(run):
        typer.echo(f"{name:<17}  {value}")


def _summary(run: Run, until: str) -> None:
    from dpfast.runs.summary import summary

    for line in summary(run, until):
        typer.echo(line)


if __name__ == "__main__":
    main()
