"""Callbacks of DPTrainer: what they are told; files that have every step once, however often training was killed."""

import csv
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Dataset

from dpfast import DPTrainer, Plan
from dpfast.callbacks import Callback, CSVLogger, TensorBoardLogger, values
from dpfast.diagnostics import Spent
from dpfast.errors import ConfigError, FileError
from dpfast.privacy import Ledger
from test_trainer import plan, trainer, weights

COLUMNS = [
    "step", "epsilon_at_most", "learning_rate", "expected_batch_size", "lost_steps", "parameter_norm", "update_norm",
    "noised_gradient_norm", "expected_noise_norm", "noise_share", "ema_distance",
]  # fmt: skip


class Regression(Dataset):
    """Points on a line with noise."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        x = torch.linspace(-1, 1, 30)[index]
        return x.view(1), 3 * x + math.sin(100 * index) / 10


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return (x * self.slope + self.offset).squeeze(1)


def squares(model, x, y, keys):
    """One loss per row."""
    rows = x.repeat_interleave(keys.augmult, 0) + 0.01 * keys.normal(1, stream="jitter")
    return (model(rows) - y.float().repeat_interleave(keys.augmult)).square()


PLAN = Plan(
    dataset_size=30, expected_batch_size=15, max_grad_norm=1.0, steps=12, target_delta=1e-3, noise_multiplier=1.0
)


def of_line(folder, *callbacks, **options):
    torch.manual_seed(0)
    return DPTrainer(
        Line(),
        Regression(),
        PLAN,
        objective=squares,
        optimizer=torch.optim.Adam,
        augmult=2,
        schedule=lambda optimizer: CosineAnnealingLR(optimizer, T_max=PLAN.steps),
        state_dir=folder / "state",
        ema_decay=0.5,
        callbacks=[CSVLogger(folder / "log.csv"), TensorBoardLogger(folder / "events"), *callbacks],
        **options,
    )


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scalars(folder):
    """By step and tag, and the times that events bear."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    found, times = [], set()
    for path in sorted(folder.iterdir()):
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.summary.value:
                times.add(event.wall_time)
                found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return found, times


class Killed(Exception):
    pass


class Kills(Callback):
    """At a step, in one of the ways in which a process may end."""

    def __init__(self, step):
        self.step = step

    def on_step(self, report):
        if report.step == self.step:
            raise Killed


def check_files(folder):
    """Every step once, in order, the same in both."""
    written, (events, times) = rows(folder / "log.csv"), scalars(folder / "events")
    assert [int(row["step"]) for row in written] == list(range(1, 13))
    assert [step for step, _ in events] == list(range(1, 13))
    for row, (_, tags) in zip(written, events, strict=True):
        known = {name: float(value) for name, value in row.items() if name != "step" and value}
        assert {f"dpfast/{name}": pytest.approx(value, rel=1e-6) for name, value in known.items()} == tags
    assert all(at % 60 == 0 for at in times)
    return written


def test_own_parts_with_a_schedule_and_both_loggers_killed_and_resumed(tmp_path, monkeypatch):
    """Twice: after a step was reported, and after one was charged and nothing else."""
    monkeypatch.setattr("dpfast.trainer.CHECKPOINTS", 4)  # after steps 3, 6, 9, 12
    with pytest.raises(Killed):
        of_line(tmp_path, Kills(5)).fit()
    assert len(rows(tmp_path / "log.csv")) == 5
    charge = Ledger.charge

    def killed(self, step):
        charge(self, step)
        if step == 8:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "charge", killed)
        with pytest.raises(Killed):
            of_line(tmp_path).fit()
    with open(tmp_path / "log.csv", "a") as file:
        file.write("8,1.2")  # a line that a kill cuts off
    last = of_line(tmp_path)
    last.fit()
    written = check_files(tmp_path)
    assert list(written[0]) == COLUMNS
    assert last.lost_steps == 4  # 4 and 5, 7 and 8
    assert [row["lost_steps"] for row in written] == ["0"] * 5 + ["2"] * 2 + ["4"] * 5
    for number, row in enumerate(written, 1):
        rate = 1e-3 * (1 + math.cos(math.pi * (number - 1) / 12)) / 2
        assert float(row["learning_rate"]) == pytest.approx(rate, abs=1e-12)
        assert (row["update_norm"] == "") == (number == 8)  # what only that process knew
    assert float(written[-1]["parameter_norm"]) == pytest.approx(float(weights(last.model).norm()), rel=1e-6)
    of_line(tmp_path).fit()  # there is nothing left to do or to write
    assert check_files(tmp_path) == written


def test_loggers_that_come_later_write_what_was_before(tmp_path):
    first = of_line(tmp_path)
    first.callbacks = (Kills(4),)
    with pytest.raises(Killed):
        first.fit()
    of_line(tmp_path).fit()
    written = check_files(tmp_path)
    assert [row["update_norm"] == "" for row in written] == [True] * 4 + [False] * 8


class Hears(Callback):
    def __init__(self):
        self.said = []

    def on_begin(self, trainer):
        self.said.append(("begin", trainer.charged_steps))

    def on_step(self, report):
        self.said.append(report)

    def on_end(self, trainer):
        self.said.append(("end", trainer.charged_steps))


def test_diagnostics_are_those_of_noised_gradients_and_weights():
    """Of plain gradient descent the update is the rate times the noised gradient."""
    heard = Hears()
    t = trainer(callbacks=[heard], schedule=lambda step: 0.5**step)
    before, after = [weights(t.model)], []
    t.progress = lambda *_: (before.append(weights(t.model)), after.append(weights(t.ema_model)))
    t.fit()
    begin, *reports, end = heard.said
    assert (begin, end) == (("begin", 0), ("end", 6))
    assert [report.step for report in reports] == [1, 2, 3, 4, 5, 6]
    numbers = len(before[0])
    for report, old, new, mean in zip(reports, before, before[1:], after, strict=False):
        of = report.diagnostics
        assert report.learning_rates == (pytest.approx(0.1 * 0.5 ** (report.step - 1)),)
        assert of.parameter_norm == pytest.approx(float(new.norm()), rel=1e-5)
        assert of.update_norm == pytest.approx(float((new - old).norm()), rel=1e-4)
        assert of.update_norm == pytest.approx(report.learning_rates[0] * of.noised_gradient_norm, rel=1e-4)
        assert of.ema_distance == pytest.approx(float((new - mean).norm()), rel=1e-4, abs=1e-7)
        assert of.expected_noise_norm == pytest.approx(1.0 * 0.5 * math.sqrt(numbers) / 6)
        # a sum of at most C times the sample's size, beside noise of sqrt(numbers) C
        assert 0.5 < of.noise_share < 2
        assert of.noise_share == of.expected_noise_norm / of.noised_gradient_norm


def test_nothing_is_told_of_gradients_without_noise():
    heard = Hears()
    quiet = plan(noise_multiplier=None, target_epsilon=math.inf)
    trainer(plan=quiet, callbacks=[heard]).fit()
    for report in heard.said[1:-1]:
        assert report.diagnostics is None
        assert report.epsilon == math.inf
        assert {name for name, value in values(report).items() if value is None} == set(COLUMNS[5:])


def test_a_guard_looks_before_the_diagnostics_do(monkeypatch):
    """A step around DPOptimizer is refused before anybody sees its gradient."""
    norms = []
    monkeypatch.setattr("dpfast.diagnostics._squares", lambda tensors: norms.append(len(list(tensors))) or {})

    class Steps(Callback):
        def on_begin(self, trainer):
            for p in trainer.model.parameters():
                p.grad = torch.ones_like(p)
            trainer.inner_optimizer.step()

    from dpfast.errors import PrivacyError

    with pytest.raises(PrivacyError, match=r"call DPOptimizer\.step"):
        trainer(callbacks=[Steps()]).fit()
    assert norms == []


def test_without_callbacks_nobody_looks(monkeypatch):
    monkeypatch.setattr("dpfast.callbacks.Watch", None)
    trainer().fit()


def test_hooks_are_gone_afterwards():
    t = trainer(callbacks=[Hears()])
    t.fit()
    assert len(t.inner_optimizer._optimizer_step_pre_hooks) == 1  # the guard
    assert len(t.inner_optimizer._optimizer_step_post_hooks) == 0


def test_the_weights_are_those_of_training_without_callbacks():
    from dpfast.testing import injected_entropy

    found = []
    for callbacks in ((), (Hears(),)):
        with injected_entropy(5):
            t = trainer(callbacks=callbacks)
            t.fit()
        found.append(weights(t.model))
    assert torch.equal(*found)


@pytest.mark.parametrize("where", ["on_begin", "on_step", "on_end"])
def test_what_a_callback_raises_comes_out_and_all_that_began_end(where):
    class Raises(Callback):
        pass

    def kill(*_):
        raise Killed

    heard, raises, later = Hears(), Raises(), Hears()
    setattr(raises, where, kill)
    with pytest.raises(Killed):
        trainer(callbacks=[heard, raises, later]).fit()
    ended = ("end", {"on_begin": 0, "on_step": 1, "on_end": 6}[where])
    assert heard.said[-1] == ended
    assert later.said == [] if where == "on_begin" else later.said[-1] == ended


def test_epsilon_is_never_told_too_low_and_rarely_computed(monkeypatch):
    long = replace(PLAN, steps=300)
    computed = []
    curve = Plan.epsilon_curve
    monkeypatch.setattr(Plan, "epsilon_curve", lambda *a, **k: computed.append(1) or curve(*a, **k))
    spent = Spent(long)
    told = [spent(step) for step in range(1, 301)]
    assert len(computed) == 1
    assert told == sorted(told)
    assert told[-1] == long.epsilon()
    for step in (1, 2, 10, 77, 150, 299):
        assert long.epsilon(step) <= told[step - 1] <= long.epsilon(min(300, int(step + 2 + 0.2 * step + 20))) + 2e-3


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "log.csv"
    for content in ("a,b\n1,2\n3,4", "hello", "step,epsilon_at_most\n", ",".join(COLUMNS) + "\nx,1\n"):
        path.write_text(content)
        with pytest.raises(FileError, match="expected the columns step,epsilon_at_most"):
            trainer(callbacks=[CSVLogger(path)]).fit()
        assert path.read_text() == content


def test_a_file_of_another_training_is_left_alone(tmp_path):
    """Or of the same in memory, whose ledger begins anew."""
    loggers = [CSVLogger(tmp_path / "log.csv"), TensorBoardLogger(tmp_path / "events")]
    for logger in loggers:
        trainer(callbacks=[logger]).fit()
        with pytest.raises(FileError, match="it has step 6, the training has taken 0"):
            trainer(callbacks=[logger]).fit()
    assert len(rows(tmp_path / "log.csv")) == len(scalars(tmp_path / "events")[0]) == 6


def test_a_line_of_columns_that_was_cut_off_is_written_again(tmp_path):
    (tmp_path / "log.csv").write_text("step,eps")
    trainer(callbacks=[CSVLogger(tmp_path / "log.csv")]).fit()
    assert list(rows(tmp_path / "log.csv")[0]) == COLUMNS
    assert len(rows(tmp_path / "log.csv")) == 6


def test_each_line_is_there_before_the_next_step(tmp_path):
    """And each record: as many as steps are charged, whatever happens next."""
    path, counts = tmp_path / "log.csv", []
    folder = tmp_path / "events"
    t = trainer(callbacks=[CSVLogger(path), TensorBoardLogger(folder)])
    t.progress = lambda step, *_: counts.append((step, len(rows(path)), len(scalars(folder)[0])))
    t.fit()
    assert counts == [(n, n, n) for n in range(1, 7)]


def test_a_place_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for logger in (CSVLogger(tmp_path / "file" / "log.csv"), TensorBoardLogger(tmp_path / "file" / "events")):
        t = trainer(callbacks=[logger])
        with pytest.raises(FileError, match="cannot write"):
            t.fit()
        assert t.charged_steps == 0


def test_every_group_has_its_rate(tmp_path):
    def two_groups(parameters):
        first, *others = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.2}])

    trainer(optimizer=two_groups, callbacks=[CSVLogger(tmp_path / "log.csv")], warmup_steps=2).fit()
    first, second, *_ = rows(tmp_path / "log.csv")
    assert (first["learning_rate"], first["learning_rate_1"]) == ("0.05", "0.1")
    assert (second["learning_rate"], second["learning_rate_1"]) == ("0.1", "0.2")


def test_without_tensorboard_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        TensorBoardLogger(tmp_path)
