"""Whatever lies in a file: it is used as it is meant, or refused with a DPFastError, and nothing is lost."""

import hashlib
import io
import json
import tempfile
import warnings
import zipfile
from collections import Counter
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import published
import test_data_own as own
import trust
from damage import DATES, VALUES, altered, damaged
from dpfast import DPTrainer, Plan, checkpoint
from dpfast.data.prepare import prepare_store
from dpfast.data.store import open_store, read_store
from dpfast.errors import CheckpointError, DPFastError, LedgerError
from dpfast.privacy import GaussianRelease, Ledger, read_ledger
from dpfast.recipes import load, names, to_toml
from dpfast.recipes.loader import all_keys
from dpfast.runs.pipeline import open_run

TRIED: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def recorded(request):
    yield
    if not request.session.testsfailed:
        trust.record("fuzzing", inputs=dict(TRIED))


# Recipes

BUNDLED = {name: Path(load.__code__.co_filename).with_name(f"{name}.toml").read_bytes() for name in names()}


def loaded(path, settings=()):
    """A recipe that is accepted says the same when it is written down and read again."""
    TRIED["recipes"] += 1
    try:
        recipe = load(path, settings)
    except DPFastError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "again.toml"
        again.write_text(to_toml(recipe), encoding="utf-8")
        assert load(again) == recipe
    return recipe


@trust.tries(few=100, many=1500)
@given(st.sampled_from(sorted(BUNDLED)).flatmap(lambda name: damaged(BUNDLED[name])))
def test_recipes_of_damaged_text(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged.toml"
        path.write_bytes(text)
        loaded(path)
        assert path.read_bytes() == text


def toml(value) -> str:
    """A value as TOML, on one line."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {toml(of)}' for key, of in value.items() if of is not None)}}}"
    if isinstance(value, list):
        return f"[{', '.join(toml(of) for of in value if of is not None)}]"
    return json.dumps(value) if isinstance(value, str | bool) else str(value)


@trust.tries(few=100, many=1500)
@given(st.dictionaries(st.sampled_from(all_keys()) | st.text(max_size=9).map(json.dumps), VALUES | DATES, max_size=3))
def test_recipes_of_any_values(values):
    lines = [f"{key} = {toml(value)}" for key, value in values.items() if value is not None]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.toml"
        path.write_bytes("\n".join(['base = "digits"', *lines]).encode(errors="surrogatepass"))
        loaded(path)


SLOW = ("model.", "target_", "steps", "sample_rate", "choices", "batch_size", "fold")  # to calibrate, or to build
QUICK = [key for key in all_keys() if not any(part in key for part in SLOW)]


@trust.tries(few=15, many=600)
@given(st.sampled_from(QUICK), VALUES)
def test_runs_of_any_value(key, value):
    """What a recipe would stumble over is refused before anything is written."""
    TRIED["recipes"] += 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, runs = Path(folder) / "any.toml", Path(folder) / "runs"
        lines = ['base = "digits"'] + ([] if value is None else [f"{key} = {toml(value)}"])
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
        with suppress(DPFastError):
            open_run(load(path), runs)
        assert not runs.exists()


ANY = st.text(st.characters(exclude_categories=()), max_size=20)  # bytes of a command line that are no text, too


@trust.tries(few=100, many=1000)
@given(st.lists(st.builds("{}={}".format, st.sampled_from(all_keys()), VALUES | ANY) | ANY, max_size=3))
def test_settings_of_any_text(settings):
    loaded("digits", settings)


# Data sets


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved(save):
    """The files that ``save(folder)`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        return files_below(Path(folder))


@cache
def sources():
    """By kind: the name to prepare them under, and the files."""
    small, of = published.images(12), published.labels(12)
    digits, scans = published.images(5, 1, 28, 28), published.images(6, 3, 5, 4)
    archive = saved(lambda at: published.pack(at / "cifar-10-python.tar.gz", published.cifar10_python(small, of)))
    return {
        "cifar10 of Python 2": ("cifar10", published.cifar10_python(small, of)),
        "cifar10 of Python 3": ("cifar10", published.cifar10_python(small, of, published.python3)),
        "cifar10 in an archive": ("cifar10", archive),
        "cifar10 binary": ("cifar10", published.cifar10_binary(small, of)),
        "cifar100": ("cifar100", published.cifar100_python(small, published.labels(12, 100))),
        "mnist": ("mnist", published.mnist(digits, of[:5])),
        "imagenet32": ("imagenet32", published.imagenet32(small, of)),
        "camelyon17": ("camelyon17", published.camelyon17(published.images(5, 3, 96, 96))),
        "class folders": ("scans", {f"{i % 2}/{i}.png": published.picture(image) for i, image in enumerate(scans)}),
        "JPEG": ("scans", {f"{i % 2}/{i}.jpg": published.picture(image, "JPEG") for i, image in enumerate(scans)}),
        "npz": ("scans", saved(lambda at: own.save("npz", at, "x", images=scans, labels=[0, 1] * 3))),
        "HDF5": ("scans", saved(lambda at: own.save("h5", at, "x", images=scans, labels=[0, 1] * 3))),
        "Parquet": ("scans", saved(lambda at: own.save_table("parquet", at / "train", own.table()))),
        "Arrow": ("scans", saved(lambda at: own.save_table("arrow", at / "train", own.table()))),
    }


KINDS = (
    "cifar10 of Python 2", "cifar10 of Python 3", "cifar10 in an archive", "cifar10 binary", "cifar100", "mnist",
    "imagenet32", "camelyon17", "class folders", "JPEG", "npz", "HDF5", "Parquet", "Arrow",
)  # fmt: skip


def inside(content: bytes) -> st.SearchStrategy[bytes]:
    """Damage to a file, or to one inside it, whose checksums then agree."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return damaged(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}

    def zipped(name, part):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for other, of in {**parts, name: part}.items():
                archive.writestr(other, of)
        return file.getvalue()

    within = st.sampled_from(sorted(parts)).flatmap(lambda name: damaged(parts[name]).map(lambda of: zipped(name, of)))
    return damaged(content) | within


@trust.tries(few=12, many=220)
@given(st.data())
def prepared(kind, data):
    TRIED["data sets"] += 1
    name, files = sources()[kind]
    which = data.draw(st.sampled_from(sorted(files)))
    files = {**files, which: data.draw(inside(files[which]))}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, store = published.write(Path(folder) / "source", files), Path(folder) / "store"
        try:
            made = prepare_store(name, source, store, partial=name != "scans", size=8 if "folders" in kind else None)
        except DPFastError:
            assert not store.exists()
        else:
            for split in made.splits:
                assert len(open_store(store, split, verify=True)) == made.splits[split].count
        assert files_below(source) == files


@pytest.mark.parametrize("kind", KINDS)
def test_data_sets_of_damaged_files(kind):
    assert set(KINDS) == set(sources())
    prepared(kind)


@cache
def a_store():
    with tempfile.TemporaryDirectory() as folder:
        source = published.write(Path(folder) / "source", sources()["npz"][1])
        prepare_store("scans", source, Path(folder) / "store")
        return files_below(Path(folder) / "store")


@trust.tries(few=60, many=700)
@given(st.data())
def test_stores_of_damaged_files(data):
    TRIED["stores"] += 1
    files = a_store()
    which = data.draw(st.sampled_from(sorted(files)))
    content = files[which]
    text = (
        altered(json.loads(content)).map(lambda value: json.dumps(value).encode()) if which.endswith("json") else None
    )
    files, whole = {**files, which: data.draw(damaged(content) if text is None else damaged(content) | text)}, files
    with tempfile.TemporaryDirectory() as folder:
        published.write(Path(folder), files)
        for verify in (False, True):
            try:
                for split in read_store(folder).splits:
                    images = open_store(folder, split, verify=verify)
                    int(images.images.sum()), images.labels.bincount(minlength=images.num_classes)
                    if verify:
                        for name, numbers in (("images", images.images), ("labels", images.labels)):
                            assert whole[f"train/{name}.npy"].endswith(numbers.numpy().tobytes())
            except DPFastError:
                pass
        assert files_below(Path(folder)) == files


# Checkpoints

PLAN = Plan(
    dataset_size=12,
    expected_batch_size=4,
    max_grad_norm=1.0,
    steps=3,
    target_delta=1e-3,
    noise_multiplier=1.0,
    other_releases=[GaussianRelease(description="counts", noise_multiplier=9.0, count=2)],
)
NUMBERS = torch.arange(36.0).view(12, 3) / 36


def trainer(folder):
    torch.manual_seed(0)
    return DPTrainer(
        nn.Linear(3, 2),
        torch.utils.data.TensorDataset(NUMBERS),
        PLAN,
        objective=lambda model, x, keys: model(x).square().sum(1),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1),
        ema_decay=0.5,
        state_dir=folder,
    )


class Stop(Exception):
    pass


@cache
def half_trained():
    """The files of a training that was stopped after its second step."""

    def stop(step, *_):
        if step == 2:
            raise Stop

    with tempfile.TemporaryDirectory() as folder:
        begun = trainer(folder)
        begun.progress = stop
        with pytest.raises(Stop):
            begun.fit()
        return files_below(Path(folder))


def signed(rest: bytes) -> bytes:
    """A checkpoint with a checksum that is right."""
    return b"dpfast-checkpoint-1 " + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest


def goes_on(files):
    """A training from these files ends, with all its steps charged, or it is refused and the files are as they were."""
    TRIED["checkpoints"] += 1
    with tempfile.TemporaryDirectory() as folder:
        published.write(Path(folder), files)
        begun = trainer(folder)
        try:
            begun.fit()
        except DPFastError:
            assert files_below(Path(folder)) == files
        else:
            assert read_ledger(Path(folder) / "ledger.jsonl").charged_steps == PLAN.steps


@trust.tries(few=60, many=1200)
@given(st.data())
def test_checkpoints_of_damaged_bytes(data):
    content = half_trained()["checkpoint"]
    _, _, rest = content.partition(b"\n")
    new = data.draw(damaged(content) | damaged(rest).map(signed))
    if new != content:
        TRIED["checkpoints"] += 1
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "checkpoint"
            path.write_bytes(new)
            try:
                checkpoint.load(path, kind="private training", fingerprint=PLAN.fingerprint())
            except CheckpointError:
                pass
            else:
                assert new == signed(new.partition(b"\n")[2])
            assert path.read_bytes() == new


@trust.tries(few=40, many=800)
@given(st.data())
def test_trainings_from_checkpoints_of_other_contents(data):
    files = half_trained()
    _, header, payload = files["checkpoint"].split(b"\n", 2)
    state = torch.load(io.BytesIO(payload), weights_only=True)
    file = io.BytesIO()
    torch.save(data.draw(altered(state)), file)
    goes_on({**files, "checkpoint": signed(header + b"\n" + file.getvalue())})


@trust.tries(few=40, many=500)
@given(st.data())
def test_trainings_from_headers_of_other_contents(data):
    files = half_trained()
    _, header, payload = files["checkpoint"].split(b"\n", 2)
    changed = data.draw(altered(json.loads(header)).map(lambda value: json.dumps(value).encode()) | damaged(header))
    goes_on({**files, "checkpoint": signed(changed + b"\n" + payload)})


# Ledgers


@cache
def a_ledger():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        with Ledger(path, PLAN) as ledger:
            ledger.charge(1)
            ledger.charge_release(PLAN.other_releases[0])
            ledger.charge(2)
        return path.read_bytes()


def chained(records) -> bytes:
    """Lines with the checksums that these records would have."""
    lines, checksum = b"", ""
    for record in records:
        checksum = hashlib.sha256((checksum + json.dumps(record)).encode()).hexdigest()
        lines += json.dumps({**record, "checksum": checksum}).encode() + b"\n"
    return lines


def opened(content):
    """The steps of a ledger that is accepted, read as it is and opened to go on; None if it is refused."""
    TRIED["ledgers"] += 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        path.write_bytes(content)
        try:
            found = read_ledger(path)
        except LedgerError:
            found = None
        assert path.read_bytes() == content
        if found is not None:
            assert type(found.charged_steps) is type(found.draws) is int
            assert found.charged_steps <= found.plan.steps
        try:
            with Ledger(path, PLAN) as ledger:
                steps = ledger.charged_steps
        except LedgerError:
            assert path.read_bytes() == content
            return None
        again = read_ledger(path)
        assert type(steps) is int
        assert steps == again.charged_steps <= PLAN.steps
        assert again.draws <= 2
        if found is not None:
            assert (found.charged_steps, found.draws) == (again.charged_steps, again.draws)
        return steps


@trust.tries(few=150, many=1500)
@given(st.data())
def test_ledgers_of_damaged_bytes(data):
    """Accepted is what a crash may leave, the beginning of the ledger, and a line that was begun counts."""
    whole = a_ledger()
    content = data.draw(damaged(whole))
    steps = opened(content)
    *lines, torn = content.split(b"\n")
    sound = b"".join(line + b"\n" for line in lines)
    if steps is not None and lines:
        assert whole.startswith(sound)
        assert steps >= sound.count(b'{"step"')
        assert steps + sound.count(b'{"release"') + (b'"release"' in torn) >= len(lines) - 1 + bool(torn)


@trust.tries(few=100, many=1500)
@given(st.data())
def test_ledgers_of_other_records_with_checksums_that_agree(data):
    records = [{k: v for k, v in json.loads(line).items() if k != "checksum"} for line in a_ledger().splitlines()]
    changed = data.draw(altered(records) | st.permutations(records))
    if isinstance(changed, list) and all(isinstance(record, dict) for record in changed):
        try:
            content = chained(changed)
        except (TypeError, ValueError):
            return
        opened(content)


@pytest.mark.parametrize("value", [1.0, True, "1"])
@pytest.mark.parametrize("name", ["step", "draw", "release"])
def test_ledgers_of_numbers_that_are_not_whole(name, value):
    records = [{k: v for k, v in json.loads(line).items() if k != "checksum"} for line in a_ledger().splitlines()]
    changed = [{**record, name: value} if name in record else record for record in records]
    assert opened(chained(changed)) is None
