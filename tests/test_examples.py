"""The scripts in examples/: both of each pair train, and the private one differs by few lines and reports epsilon."""

import contextlib
import gc
import importlib.util
import io
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dpfast.engine import modes

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"

pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("transformers")

pytestmark = [
    # Of diffusers' Stable Diffusion pipeline, which is given no safety checker, and of what it is built on.
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]

# What makes each script small.
SMALL = {
    "cifar10": "--images 120 --epochs 2 --batch-size 40 --width 8",
    "text_classifier": "--reviews 150 --epochs 2 --batch-size 45",
    "names_rnn": "--names 150 --epochs 2 --batch-size 45",
    "own_loop": "",
    "own_trainer": "--state OUT",
    "train_unconditional": "--num_generated 48 --num_epochs 2 --train_batch_size 8 --gradient_accumulation_steps 3"
    " --resolution 16 --block_out_channels 8 16 --ddpm_num_inference_steps 2 --eval_batch_size 2 --lr_warmup_steps 1"
    " --checkpointing_steps 3 --output_dir OUT",
    "train_class_conditional": "--num_epochs 1 --train_batch_size 600 --block_out_channels 8 16 --lr_warmup_steps 1"
    " --num_inference_steps 2 --mixed_precision bf16 --output_dir OUT",
    "train_text_to_image_lora": "--num_generated 24 --num_train_epochs 2 --train_batch_size 12 --num_inference_steps 2"
    " --output_dir OUT",
}
# Constants of scripts that have no option for it.
CONSTANTS = {"own_loop": {"S": 100}, "own_trainer": {"EPOCHS": 1, "BATCH_SIZE": 150}}


def loaded(name):
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant, value in CONSTANTS.get(name.removesuffix("_private"), {}).items():
        assert hasattr(module, constant)
        setattr(module, constant, value)
    return module


def arguments(name, out):
    return SMALL[name].replace("OUT", str(out)).split()


class Watch:
    """Updates that any optimizer makes, and the parameters before the first."""

    def __init__(self):
        self.updates, self.before, self.moved = 0, {}, 0.0

    def __enter__(self):
        self.hooks = [register_optimizer_step_pre_hook(self.see), register_optimizer_step_post_hook(self.compare)]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def see(self, optimizer, *_):
        self.updates += 1
        for p in self.parameters(optimizer):
            self.before.setdefault(p, p.detach().clone())

    def compare(self, optimizer, *_):
        self.moved = max((p.detach() - self.before[p]).abs().max().item() for p in self.parameters(optimizer))

    @staticmethod
    def parameters(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]


@pytest.fixture(autouse=True)
def _anew():
    """Accelerators share their state in a process; what a script seeds or switches on is its own."""
    from accelerate.state import AcceleratorState, GradientState

    state, before = torch.get_rng_state(), set(torch.overrides._get_current_function_mode_stack())
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_rng_state(state)
    gc.collect()
    modes.sweep()
    assert not set(torch.overrides._get_current_function_mode_stack()) - before


def run(name, argv):
    """(module, model, what it said, watch)."""
    module = loaded(name)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), Watch() as watch:
        model = module.main([str(word) for word in argv])
    return module, model, said.getvalue(), watch


def denoising_loss(model, size, *more):
    images = torch.randn(4, model.config.in_channels, size, size)
    return F.mse_loss(model(images, torch.arange(4) * 100, *more).sample, torch.randn_like(images))


LOSSES = {
    "cifar10": lambda m, model: F.cross_entropy(model(m.generate(8, 5)[0]), torch.arange(8)),
    "text_classifier": lambda m, model: F.cross_entropy(
        model(m.encode(m.generate(8, 5), 997, 32)[0]), torch.arange(8) % 2
    ),
    "names_rnn": lambda m, model: F.cross_entropy(
        model(m.encode(m.generate(8, 5), sorted(m.SYLLABLES), 16)[0]), torch.arange(8) % 2
    ),
    "own_loop": lambda m, model: m.losses(model, m.generate(8, 5)).mean(),
    "own_trainer": lambda m, model: m.losses(model, torch.randn(4, 1, 24, 24), torch.ones(4, 24, 24)).mean(),
    "train_unconditional": lambda _, model: denoising_loss(model, 16),
    "train_class_conditional": lambda _, model: denoising_loss(model, 8, torch.arange(4) % 2),
    "train_text_to_image_lora": lambda _, model: denoising_loss(model, 16, torch.randn(4, 32, 32)),
}
# What the scripts write, in their folder.
WRITTEN = {
    "own_trainer": ["model.pt"],
    "train_unconditional": [
        "model_index.json",
        "unet/config.json",
        "samples/0002.png",
        "checkpoint-3/model.safetensors",
    ],
    "train_class_conditional": ["unet/config.json", "scheduler/scheduler_config.json", "samples.png"],
    "train_text_to_image_lora": ["pytorch_lora_weights.safetensors", "validation.png"],
}


def check_trained(name, module, model, watch, out):
    assert watch.updates >= 2
    assert 0 < watch.moved < math.inf
    assert {id(p) for p in watch.before} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert LOSSES[name](module, model.eval()).isfinite()
    for file in WRITTEN.get(name, []):
        assert (out / file).exists()


@pytest.mark.parametrize("name", SMALL)
def test_the_ordinary_script_trains_on_data_of_ones_own(name, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    out = tmp_path / "out"
    module, model, _, watch = run(name, arguments(name, out) + DATA[name](data))
    check_trained(name, module, model, watch, out)


@pytest.mark.parametrize("name", SMALL)
def test_the_private_script_trains_and_reports_epsilon(name, tmp_path):
    module, model, said, watch = run(f"{name}_private", arguments(name, tmp_path))
    check_trained(name, module, model, watch, tmp_path)
    reported = [float(number) for number in re.findall(r"epsilon[ =](\d+\.?\d*)", said)]
    assert reported
    assert reported == sorted(reported)
    least, most = (0.5, 8) if name == "train_class_conditional" else (7.9, 8.0)  # the former sets the noise
    assert least < reported[-1] <= most
    assert "loss" not in said  # it is private
    for log in tmp_path.rglob("events.out.tfevents*"):
        assert b"lr" in log.read_bytes()
        assert b"loss" not in log.read_bytes()


def test_the_ordinary_script_says_its_loss(tmp_path):
    """So that the test before this one sees something."""
    assert "loss" in run("names_rnn", arguments("names_rnn", tmp_path))[2]


# Data of one's own, as the scripts read it: what each writes, and the options for it.


def cifar10(folder):
    for file in ("data_batch_1", "data_batch_2", "test_batch"):
        data = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({b"data": data, b"labels": [i % 10 for i in range(60)]}))
    return ["--data", folder]


def reviews(folder):
    (folder / "reviews.tsv").write_text("1\tlovely food\n0\tnot a good room at all\n" * 60)
    return ["--data", folder / "reviews.tsv"]


def names(folder):
    for language, some in {"Welsh": ["Llewelyn", "Rhys"], "Irish": ["O'Brien", "Sean"]}.items():
        (folder / f"{language}.txt").write_text("\n".join(some * 30) + "\n")
    return ["--data", folder]


def curves(folder):
    np.save(folder / "curves.npy", np.random.default_rng(0).normal(size=(400, 32)).astype("float32"))
    return ["--data", folder / "curves.npy"]


def blobs(folder):
    images = np.random.default_rng(0).normal(size=(400, 24, 24)).astype("float32")
    np.savez(folder / "blobs.npz", images=images, masks=(images > 0).astype("float32"))
    return ["--data", folder / "blobs.npz"]


def pictures(folder, count=24):
    for i in range(count):
        Image.new("RGB", (20, 18), (5 * i, 40, 90)).save(folder / f"{i}.png")


def photos(folder):
    pictures(folder, 48)
    return ["--train_data_dir", folder]


def classes(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        pictures(folder / name)
    return ["--train_data_dir", folder, "--train_batch_size", 24]


def captioned(folder):
    """With a model from a folder in the layout of Stable Diffusion."""
    images, model = folder / "images", folder / "model"
    images.mkdir()
    pictures(images)
    for picture in images.glob("*.png"):
        picture.with_suffix(".txt").write_text("a picture")
    parts = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
    for part, made in zip(parts, loaded("train_text_to_image_lora").load_models(None), strict=True):
        made.save_pretrained(model / part)
    return ["--train_data_dir", images, "--pretrained_model_name_or_path", model]


DATA = {
    "cifar10": cifar10,
    "text_classifier": reviews,
    "names_rnn": names,
    "own_loop": curves,
    "own_trainer": blobs,
    "train_unconditional": photos,
    "train_class_conditional": classes,
    "train_text_to_image_lora": captioned,
}


# What differs


@pytest.fixture(scope="module")
def differences():
    spec = importlib.util.spec_from_file_location("example_diffs", ROOT / "tools/example_diffs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_private_scripts_differ_by_few_lines(differences):
    assert {ordinary.stem for ordinary, _ in differences.pairs()} == set(SMALL)
    for ordinary, private in differences.pairs():
        lines = differences.difference(ordinary, private)
        added, removed = differences.changed(lines)
        print(f"\n{private.name}: {added} added, {removed} removed", *lines, sep="\n")
        assert 0 < max(added, removed) <= differences.MOST


def test_changed_lines_are_counted(differences, tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("a\nb\nc\nd\n")
    other.write_text("a\nB\nc\n# more\n\n")
    assert differences.changed(differences.difference(one, other)) == (3, 2)


def test_the_readme_shows_the_differences(differences):
    text = (EXAMPLES / "README.md").read_text()
    assert differences.page(text) == text
    assert differences.page(text.replace("+    engine", "+    machine")) == text
    for ordinary, private in differences.pairs():
        assert f" {ordinary.name} " in text
        assert f" {private.name} " in text
        assert f"`{private.name}`: " in text


# As users start them


def script(*command, out):
    """A subprocess with its output, which has ended well."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= {"HF_HOME": str(out / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(word) for word in command], cwd=out, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_accelerate_launches_a_private_script(tmp_path, processes):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", processes, "--num_machines", 1]
    launch += ["--cpu", "--main_process_port", 0, "--mixed_precision", "no", "--dynamo_backend", "no"]
    name = "train_unconditional"
    said = script(*launch, EXAMPLES / f"{name}_private.py", *arguments(name, tmp_path / "out"), out=tmp_path)
    assert re.findall(r"epsilon=(\d+\.?\d*)", said)[-1] in {"8", "8.0", "7.99", "7.98"}
    for file in WRITTEN[name]:
        assert (tmp_path / "out" / file).exists()
    assert (tmp_path / "out/ledger.jsonl").exists()


def test_a_private_script_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    from accelerate import Accelerator

    import dpfast

    name, argv = "train_unconditional_private", arguments("train_unconditional", tmp_path)
    argv[argv.index("--checkpointing_steps") + 1] = "1"
    save = Accelerator.save_state

    def cut_off(accelerator, folder):
        if folder.name == "checkpoint-3":
            raise KeyboardInterrupt
        return save(accelerator, folder)

    monkeypatch.setattr(Accelerator, "save_state", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run(name, argv)
    for ledger in [thing for thing in gc.get_objects() if type(thing) is dpfast.Ledger]:
        ledger.close()  # as the end of the process does
    monkeypatch.setattr(Accelerator, "save_state", save)
    _, _, said, watch = run(name, [*argv, "--resume_from_checkpoint", tmp_path / "checkpoint-2"])
    assert watch.updates == 1  # of four: three are spent, the last of them without a checkpoint
    assert 7.9 < float(re.findall(r"epsilon=(\d+\.?\d*)", said)[-1]) <= 8
    assert not (tmp_path / "checkpoint-3").exists()
    assert (tmp_path / "checkpoint-4").exists()


def test_an_lstm_is_refused_with_what_to_do(monkeypatch):
    """As the private script is without its change of the model."""
    import dpfast

    private = loaded("names_rnn_private")
    monkeypatch.setattr(private, "Classifier", loaded("names_rnn").Classifier)
    with pytest.raises(dpfast.DPFastError, match=r"nn\.LSTMCell in a loop"):
        private.main(["--names", "100"])
