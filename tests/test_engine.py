"""PrivacyEngine: what one batch goes through, what is accounted, and what is refused."""

import copy
import gc
import io
import math
import pickle
import random
from collections import UserDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dpfast
from dpfast.engine import BatchMemoryManager, PrivateLoader, modes
from dpfast.engine import loader as engine_loader
from dpfast.errors import BudgetExhausted, CaptureError, ConfigError, DPFastError, PrivacyError
from dpfast.privacy import read_ledger
from dpfast.testing import injected_entropy
from engine_cases import made_private, numbers, pictures, small_net, train, with_epsilon


@pytest.fixture
def dealt(monkeypatch):
    """Samples to be drawn next, in the place of random ones; the last is repeated."""

    def deal(*samples):
        left = list(samples)
        monkeypatch.setattr(
            engine_loader,
            "poisson_sample",
            lambda size, rate: torch.tensor(left.pop(0) if len(left) > 1 else left[0], dtype=torch.int64),
        )

    return deal


stack = torch.overrides._get_current_function_mode_stack


def oracle(net, x, y, max_grad_norm):
    """The clipped sum, example by example."""
    total = [torch.zeros_like(p) for p in net.parameters()]
    for i in range(len(x)):
        grads = torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), list(net.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, max_grad_norm / norm)
    return total


# Steps


@pytest.mark.parametrize(
    ("reduction", "loss", "divisor"),
    [
        ("mean", F.cross_entropy, 10),
        ("sum", lambda out, y: F.cross_entropy(out, y, reduction="sum"), 1),
        ("mean", lambda out, y: F.cross_entropy(out, y, reduction="none"), 10),
        ("mean", lambda out, y: torch.stack([F.cross_entropy(out[i], y[i]) for i in range(len(y))]).sum() / len(y), 10),
    ],
    ids=["mean", "sum", "unreduced", "by hand"],
)
def test_a_step_is_the_clipped_sum_of_the_batch(reduction, loss, divisor, dealt):
    dealt([0, 3, 7, 20])
    net, data = small_net(), pictures()
    before, x, y = copy.deepcopy(net), data.tensors[0][[0, 3, 7, 20]], data.tensors[1][[0, 3, 7, 20]]
    settings = {"noise_multiplier": 0, "max_grad_norm": 0.5, "loss_reduction": reduction}
    _, model, optimizer, loader = made_private(data, net, **settings)
    given_x, given_y = next(iter(loader))
    assert torch.equal(given_x, x)
    assert torch.equal(given_y, y)
    loss(model(given_x), given_y).backward()
    optimizer.step()
    for p, old, total in zip(net.parameters(), before.parameters(), oracle(before, x, y, 0.5), strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - 0.1 * total / divisor, rtol=1e-4, atol=1e-6)


def test_noise_is_added_and_charged_before():
    with injected_entropy(3):
        _, model, optimizer, loader = made_private(noise_multiplier=50.0)
        before = numbers(model)
        train(model, optimizer, loader)
    # Six steps of N(0, (0.1 * 50 * 1 / 10)^2).
    assert (numbers(model) - before).std() == pytest.approx(0.5 * math.sqrt(6), rel=0.1)


def test_the_mode_is_off_after_a_loop_and_survives_exceptions_and_breaks():
    model, optimizer, loader = made_private()[1:]
    mode = loader.session._between
    assert train(model, optimizer, loader) == 6
    assert mode not in stack()
    for _ in loader:
        break
    with pytest.raises(ZeroDivisionError):  # noqa: PT012
        for x, _y in loader:
            model(x)
            raise ZeroDivisionError
    for x, _y in loader:
        model(x)
        break
    assert mode in stack()  # the batch may still become a step
    assert train(model, optimizer, loader) == 6
    assert mode not in stack()
    for _ in loader:
        break
    assert mode in stack()
    del model, optimizer, loader
    gc.collect()
    modes.sweep()  # as the next loop does
    assert mode not in stack()


def test_it_lives_beside_other_modes():
    _, model, optimizer, loader = made_private()
    with torch.device("cpu"):
        for x, y in loader:
            with torch.device("cpu"):
                out = model(x)
            optimizer.zero_grad()
            F.cross_entropy(out, y).backward()
            optimizer.step()
    assert loader.session._between not in stack()


def test_an_empty_sample_is_a_step_of_noise_alone(dealt):
    dealt([], [1, 2], [])
    engine, model, optimizer, loader = made_private()
    seen = []
    for x, y in loader:
        before = numbers(model)
        optimizer.zero_grad()
        out = model(x)
        loss = F.cross_entropy(out, y)
        loss.backward()
        optimizer.step()
        assert not torch.equal(before, numbers(model))
        seen.append((tuple(x.shape), tuple(y.shape), tuple(out.shape), y.dtype))
    assert seen[0] == ((0, 3, 6, 6), (0,), (0, 5), torch.int64)
    assert len(engine.accountant) == 6


def test_an_empty_sample_needs_no_backward(dealt):
    dealt([])
    engine, _model, optimizer, loader = made_private()
    for _ in loader:
        optimizer.step()
    assert len(engine.accountant) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_are_poisson_and_of_the_systems_entropy(workers):
    data = TensorDataset(torch.arange(100))
    loader = DataLoader(data, batch_size=10, num_workers=workers, generator=torch.Generator().manual_seed(0))
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    _, _, loader = dpfast.PrivacyEngine().make_private(
        module=net, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    torch.manual_seed(0)
    first = [batch[0].tolist() for batch in loader]
    torch.manual_seed(0)
    again = [batch[0].tolist() for batch in loader]
    assert len(first) == len(loader) == 10
    assert first != again
    assert len({len(batch) for batch in first + again}) > 2
    assert 100 < sum(map(len, first + again)) < 300  # 200 on average, deviation 13


def test_the_physical_batches_of_a_sample_are_one_step(dealt):
    dealt([0, 3, 7, 20, 21, 30, 41], [])
    net, data = small_net(), pictures()
    before = copy.deepcopy(net)
    engine, model, optimizer, loader = made_private(data, net, noise_multiplier=0, max_grad_norm=0.5)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        sizes = []
        for x, y in parts:
            sizes.append(len(x))
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            moved = numbers(net)
            optimizer.step()
            assert torch.equal(moved, numbers(net)) == (len(sizes) != 3)
            optimizer.zero_grad()
            if len(sizes) == 3:
                break
    assert sizes == [3, 2, 2]
    assert len(engine.accountant) == 1
    chosen = [0, 3, 7, 20, 21, 30, 41]
    total = oracle(before, data.tensors[0][chosen], data.tensors[1][chosen], 0.5)
    for p, old, grad in zip(net.parameters(), before.parameters(), total, strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - 0.1 * grad / 10, rtol=1e-4, atol=1e-6)


def test_rows_of_one_example_are_one_contribution(dealt):
    dealt([2, 5])
    net, data = small_net(), pictures()
    before = copy.deepcopy(net)
    _, model, optimizer, loader = made_private(data, net, noise_multiplier=0, max_grad_norm=0.2, augmult=2)
    for x, y in loader:
        rows = torch.stack([x, x.flip(-1)], 1).flatten(0, 1)
        F.cross_entropy(model(rows), y.repeat_interleave(2)).backward()
        optimizer.step()
        break
    total = [torch.zeros_like(p) for p in before.parameters()]
    for i in (2, 5):
        x, y = data.tensors[0][i : i + 1], data.tensors[1][i : i + 1]
        loss = (F.cross_entropy(before(x), y) + F.cross_entropy(before(x.flip(-1)), y)) / 2
        grads = torch.autograd.grad(loss, list(before.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for t, g in zip(total, grads, strict=True):
            t += g * min(1.0, 0.2 / norm)
    for p, old, grad in zip(net.parameters(), before.parameters(), total, strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - 0.1 * grad / 10, rtol=1e-4, atol=1e-6)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"classes": self.one(h), "parts": (self.two(h), h.detach())}


def test_outputs_come_in_their_tree_and_several_calls_add_up(dealt):
    dealt([0, 1, 2])
    data = TensorDataset(torch.randn(20, 4), torch.randint(0, 3, (20,)))
    net = TwoHeads()
    before = copy.deepcopy(net)
    _, model, optimizer, loader = made_private(data, net, batch_size=4, noise_multiplier=0, max_grad_norm=100.0)

    def loss(out, other, y):
        out["classes"] += 1  # in place, as the user may
        values = out["parts"][0].squeeze(1) - other["parts"][0].squeeze(1)
        return F.cross_entropy(out["classes"] * out["parts"][1].mean(1, keepdim=True), y) + (values**2).mean()

    for x, y in loader:
        loss(model(x), model(-x), y).backward()
        optimizer.step()
        break
    x, y = data.tensors[0][:3], data.tensors[1][:3]
    (3 * loss(before(x), before(-x), y)).backward()
    for p, old in zip(net.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - 0.1 * old.grad / 4, rtol=1e-4, atol=1e-6)


def test_evaluation_is_no_part_of_a_step():
    engine, model, optimizer, loader = made_private()
    assert train(model, optimizer, loader) == 6
    model.eval()
    x = pictures().tensors[0]
    out = model(x)
    assert out.requires_grad
    assert out.shape == (60, 5)
    model.train()
    with torch.no_grad():
        model(x)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            model(torch.zeros(2, 3, 6, 6))
        optimizer.step()
    assert len(engine.accountant) == 12


def test_an_update_under_autocast():
    _, model, optimizer, loader = made_private()
    for x, y in loader:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert numbers(model).isfinite().all()


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Flatten(), nn.Linear(108, 8), nn.Tanh()), nn.Linear(8, 5)

    def forward(self, x):
        hidden = torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=False)
        return self.last(hidden)


def test_checkpointed_activations(dealt):
    dealt([0, 3, 7, 20])
    net, data = Checkpointed(), pictures()
    before = copy.deepcopy(net)
    _, model, optimizer, loader = made_private(data, net, noise_multiplier=0, max_grad_norm=0.5)
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        break
    total = oracle(before, data.tensors[0][[0, 3, 7, 20]], data.tensors[1][[0, 3, 7, 20]], 0.5)
    for p, old, grad in zip(net.parameters(), before.parameters(), total, strict=True):
        torch.testing.assert_close(p.detach(), old.detach() - 0.1 * grad / 10, rtol=1e-4, atol=1e-6)


# torch's own, of whatever is no leaf and goes into a compiled function.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_compiled_losses(dealt):
    dealt([0, 3, 7, 20])
    _, model, optimizer, loader = made_private()

    @torch.compile(backend="eager")
    def loss(out, y):
        return F.cross_entropy(out, y)

    train(model, optimizer, loader, loss)


def test_a_loss_of_each_text_by_the_ghost_criterion():
    torch.manual_seed(0)
    tokens = torch.randint(0, 9, (60, 6))
    net = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 9))
    _, model, optimizer, criterion, loader = made_private(
        TensorDataset(tokens), net, criterion=nn.CrossEntropyLoss(ignore_index=0), grad_sample_mode="ghost"
    )
    for (text,) in loader:
        logits = model(text[:, :-1])
        loss = criterion(logits.flatten(0, 1), text[:, 1:].flatten(), shape=logits.shape)
        each = [F.cross_entropy(one, target, ignore_index=0) for one, target in zip(logits, text[:, 1:], strict=True)]
        assert loss.item() == pytest.approx(torch.stack(each).nan_to_num().mean().item(), rel=1e-5)
        loss.backward()
        optimizer.step()
    assert criterion.reduction == "mean"
    assert criterion.ignore_index == 0


def test_accelerate_back_propagates():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    engine, model, optimizer, loader = made_private()
    for x, y in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
    assert len(engine.accountant) == 6


def test_learning_rate_schedulers_work():
    _, model, optimizer, loader = made_private(lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    train(model, optimizer, loader)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert isinstance(optimizer, torch.optim.Optimizer)


# The module


def test_the_module_is_the_users_in_all_but_its_calls():
    net = small_net()
    net.config = {"a": 1}
    _, model, *_ = made_private(net=net)
    assert model.state_dict().keys() == net.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in net.named_parameters()]
    assert list(model.children()) == list(net.children())
    assert model.config == {"a": 1}
    assert model._module is net
    assert model.eval() is model
    assert not net.training
    assert not net[0].training
    model.train()
    assert net.training
    model.note = 3
    assert net.note == 3
    model.load_state_dict(copy.deepcopy(net.state_dict()))
    assert model.to(torch.float32) is model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is nn.Sequential
        assert other is not net
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    with pytest.raises(AttributeError):
        model.nothing  # noqa: B018


# Epsilon


@pytest.mark.parametrize(("sigma", "batch_size", "epochs"), [(1.0, 10, 1), (0.7, 5, 3), (2.0, 20, 2)])
def test_epsilon_is_that_of_opacus_to_one_percent(sigma, batch_size, epochs):
    accountants = pytest.importorskip("opacus.accountants")
    engine, model, optimizer, loader = made_private(noise_multiplier=sigma, batch_size=batch_size)
    theirs = accountants.PRVAccountant()
    for _ in range(epochs):
        for _ in range(train(model, optimizer, loader)):
            theirs.step(noise_multiplier=sigma, sample_rate=1 / len(loader))
    for delta in (1e-5, 1e-3):
        assert engine.get_epsilon(delta) == pytest.approx(theirs.get_epsilon(delta), rel=0.01)
    assert engine.accountant.history == [(sigma, batch_size / 60, len(theirs.history) and theirs.history[0][2])]


def test_a_budget_is_kept_and_its_steps_are_counted():
    engine, model, optimizer, loader = with_epsilon(3.0, epochs=2)
    for _ in range(2):
        train(model, optimizer, loader)
    assert 2.9 < engine.get_epsilon(1e-4) <= 3.0
    with pytest.raises(BudgetExhausted):
        train(model, optimizer, loader)
    assert len(engine.accountant) == 12


def test_a_loop_that_goes_on_ends_with_the_budget(tmp_path):
    """Steps that an interruption has lost are spent: the last pass is shorter, and the loop comes to its end."""

    def begun():
        return with_epsilon(3.0, epochs=2, engine=dpfast.PrivacyEngine(ledger=tmp_path / "ledger.jsonl"))

    engine, model, optimizer, loader = begun()
    train(model, optimizer, loader)
    engine.save_checkpoint(path=tmp_path / "checkpoint.pt", module=model, optimizer=optimizer)
    for x, y in loader:  # of which nothing is saved
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        break
    engine.close()
    engine, model, optimizer, loader = begun()
    engine.load_checkpoint(path=tmp_path / "checkpoint.pt", module=model, optimizer=optimizer)
    with pytest.warns(UserWarning, match="all 12 planned steps are charged, those that an interruption has lost"):
        assert train(model, optimizer, loader) == 5
    assert train(model, optimizer, loader) == 0
    assert optimizer.steps_taken == 12


def test_no_seed_that_others_know_outlives_make_private():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        made_private()
        drawn.append((torch.rand(1).item(), random.random(), np.random.rand()))  # noqa: NPY002
    assert all(one != other for one, other in zip(*drawn, strict=True))


def test_no_noise_is_no_privacy():
    engine, model, optimizer, loader = with_epsilon()
    assert engine.get_epsilon(1e-4) == 0
    train(model, optimizer, loader)
    assert engine.get_epsilon(1e-4) == math.inf


def test_two_trainings_on_one_data_set_add_up():
    engine, model, optimizer, loader = made_private()
    train(model, optimizer, loader)
    once = engine.get_epsilon(1e-5)
    made = engine.make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0
    )
    assert len(made[2]) == len(loader)
    train(*made)
    assert engine.get_epsilon(1e-5) > 1.2 * once
    assert len(engine.accountant) == 12
    with pytest.raises(PrivacyError, match="data set of 60 examples"):
        made_private(pictures(50), engine=engine)
    with pytest.warns(UserWarning, match="charged to this engine already"):
        engine.make_private_with_epsilon(
            module=model,
            optimizer=made[1],
            data_loader=loader,
            target_epsilon=3.0,
            target_delta=1e-4,
            epochs=1,
            max_grad_norm=1.0,
        )


def test_a_ledger_on_disk_is_charged_before_and_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    engine, model, optimizer, loader = made_private(engine=dpfast.PrivacyEngine(ledger=path))
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        with pytest.MonkeyPatch.context() as patch:

            def broken():
                assert read_ledger(path).charged_steps == 1
                raise KeyboardInterrupt

            patch.setattr(optimizer.optimizer, "step", broken)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
        break
    engine.close()
    engine, model, optimizer, loader = made_private(engine=dpfast.PrivacyEngine(ledger=path))
    train(model, optimizer, loader)
    assert len(engine.accountant) == read_ledger(path).charged_steps == 7
    with pytest.raises(PrivacyError, match="holds one plan"):
        made_private(engine=engine)
    engine.close()


def test_secure_mode_puts_noise_on_a_grid():
    _, _, optimizer, _ = made_private(engine=dpfast.PrivacyEngine(secure_mode=True))
    assert optimizer.plan.noise == "grid"


# Checkpoints


def test_a_checkpoint_holds_module_optimizer_and_steps():
    file = io.BytesIO()
    engine, model, optimizer, loader = made_private(optimizer=torch.optim.Adam, lr=0.01)
    train(model, optimizer, loader)
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer, checkpoint_dict={"epoch": 1})
    file.seek(0)
    other, new, new_optimizer, new_loader = made_private(optimizer=torch.optim.Adam, lr=0.01)
    assert other.load_checkpoint(path=file, module=new, optimizer=new_optimizer)["epoch"] == 1
    assert torch.equal(numbers(new), numbers(model))
    assert new_optimizer.state_dict()["state"][0]["step"] == 6
    assert len(other.accountant) == 6
    assert other.get_epsilon(1e-5) == engine.get_epsilon(1e-5)
    train(new, new_optimizer, new_loader)
    assert len(other.accountant) == new_optimizer.steps_taken == 12
    file.seek(0)
    other.load_checkpoint(path=file, module=new, optimizer=new_optimizer)
    assert len(other.accountant) == 12  # what is spent is spent


def test_a_checkpoint_of_another_plan_adds_to_epsilon():
    file = io.BytesIO()
    engine, model, optimizer, loader = made_private(noise_multiplier=0.8)
    train(model, optimizer, loader)
    engine.save_checkpoint(path=file, module=model)
    other, new, new_optimizer, new_loader = made_private(noise_multiplier=2.0)
    train(new, new_optimizer, new_loader)
    file.seek(0)
    other.load_checkpoint(path=file, module=new)
    assert len(other.accountant) == 12
    assert other.get_epsilon(1e-5) > engine.get_epsilon(1e-5)
    file.seek(0)
    other.load_checkpoint(path=file, module=new)
    assert len(other.accountant) == 12  # the same steps


def test_a_checkpoint_of_a_plan_that_is_spent_leaves_none():
    file = io.BytesIO()
    engine, model, optimizer, loader = with_epsilon(3.0)
    train(model, optimizer, loader)
    engine.save_checkpoint(path=file, module=model, optimizer=optimizer)
    file.seek(0)
    other, new, new_optimizer, new_loader = with_epsilon(3.0)
    other.load_checkpoint(path=file, module=new, optimizer=new_optimizer)
    with pytest.raises(BudgetExhausted):
        train(new, new_optimizer, new_loader)


def test_a_checkpoint_of_opacus_is_refused(tmp_path):
    engine, model, _optimizer, _ = made_private()
    file = tmp_path / "x.pt"
    torch.save({"module_state_dict": {}, "privacy_accountant_state_dict": {"history": [], "mechanism": "prv"}}, file)
    with pytest.raises(DPFastError, match="state of a dpfast accountant"):
        engine.load_checkpoint(path=file, module=model)
    with pytest.raises(ConfigError, match="schedulers"):
        engine.save_checkpoint(path=file, module=model, noise_scheduler=object())


# Loops that are refused


def refused(loop, message, kind=DPFastError, **settings):
    """``loop(model, optimizer, x, y)`` for each batch of some: refused, and nothing has moved since the last step."""
    _, model, optimizer, loader = made_private(**settings)
    with pytest.raises(kind, match=message):  # noqa: PT012
        for _ in range(2):
            for x, y in loader:
                before, charged = numbers(model), optimizer.steps_taken
                loop(model, optimizer, x, y)
                assert optimizer.steps_taken <= charged + 1
    assert optimizer.steps_taken - charged in (0, 1)
    if optimizer.steps_taken == charged:
        assert torch.equal(before, numbers(model))
    return model, optimizer


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def two_losses(model, optimizer, x, y):
    out = model(x)
    F.cross_entropy(out, y).backward(retain_graph=True)
    out.square().mean().backward()


def two_forwards(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    F.cross_entropy(model(x), y).backward()


def two_steps(model, optimizer, x, y):
    step(model, optimizer, x, y)
    optimizer.step()


def no_backward(model, optimizer, x, y):
    model(x)
    optimizer.step()


def cleared(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()


def cleared_by_the_inner_module(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    model._module.zero_grad()
    optimizer.step()


def cleared_by_hand(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad = None
    optimizer.step()


def skipped(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()


def skipped_before_backward(model, optimizer, x, y):
    F.cross_entropy(model(x), y).isnan()


def part_of_the_batch(model, optimizer, x, y):
    F.cross_entropy(model(x[:-1]), y[:-1]).backward()


def more_than_the_batch(model, optimizer, x, y):
    F.cross_entropy(model(torch.cat([x, x])), torch.cat([y, y])).backward()


def weight_penalty(model, optimizer, x, y):
    (F.cross_entropy(model(x), y) + sum(p.square().sum() for p in model.parameters())).backward()


def penalty_alone(model, optimizer, x, y):
    model(x)
    sum(p.square().sum() for p in model.parameters()).backward()


def a_part_of_the_model(model, optimizer, x, y):
    F.cross_entropy(model[4](model[3](model[2](model[1](model[0](x))))), y).backward()


def the_inner_module(model, optimizer, x, y):
    F.cross_entropy(model._module(x), y).backward()


def a_weight_again(model, optimizer, x, y):
    F.cross_entropy(model(x) @ model[4].weight[:, :5], y).backward()


def clipped_by_torch(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def scaled(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad *= 2
    optimizer.step()


def replaced(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def norm_for_the_log(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    print(sum(p.grad.norm() for p in model.parameters()))
    optimizer.step()


def by_a_scaler(model, optimizer, x, y):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)


def by_closure(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    optimizer.step(lambda: None)


def second_derivatives(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward(create_graph=True)


def tokens_left(model, optimizer, x, y):
    model(x).backward(torch.ones(len(x), 5))


def inner_step(model, optimizer, x, y):
    F.cross_entropy(model(x), y).backward()
    optimizer.original_optimizer.step()


LOOPS = {
    two_losses: "second backward",
    two_forwards: "in training after loss.backward",
    two_steps: "expected one batch of the private loader since the last step",
    no_backward: "expected one loss.backward",
    cleared: "noise alone",
    cleared_by_the_inner_module: r"clear with optimizer\.zero_grad",
    cleared_by_hand: "noise alone",
    skipped: r"optimizer.step\(\) was not called for the last one",
    skipped_before_backward: r"optimizer.step\(\) was not called for the last one",
    part_of_the_batch: "has not the batch's rows|another order",  # of 3 examples it seems to have, along the channels
    more_than_the_batch: "has not the batch's rows|another order",
    weight_penalty: "weight_decay",
    penalty_alone: "weight_decay",
    a_part_of_the_model: "other than through what model",
    the_inner_module: "other than through what model",
    a_weight_again: "other than through what model",
    clipped_by_torch: "neither GradScaler nor clip_grad_norm_",
    scaled: r"p\.grad of the private model was read",
    replaced: "the gradient is not what the clipper wrote",
    norm_for_the_log: "no number computed from it",
    by_closure: "closure",
    by_a_scaler: "neither GradScaler nor clip_grad_norm_",
    second_derivatives: "second derivatives",
    tokens_left: "expected one number, the mean over the rows",
    inner_step: "without noise, uncharged",
}


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_loop_that_would_not_be_one_private_step_a_batch(loop):
    refused(loop, LOOPS[loop])


def test_other_rows_than_the_batchs_in_a_batch_that_is_not_looked_at(dealt):
    dealt([0, 1], [0, 1], [0, 1, 2])
    _, model, optimizer, loader = made_private()
    with pytest.raises(CaptureError, match="no output of the model has a row for each of the batch's"):  # noqa: PT012
        for x, y in loader:
            step(model, optimizer, x[:2], y[:2])
    assert optimizer.steps_taken == 2


def test_other_data_than_the_loaders():
    _, model, optimizer, _ = made_private()
    x, y = pictures().tensors
    with pytest.raises(PrivacyError, match="without a batch of its own"):
        F.cross_entropy(model(x), y).backward()
    with pytest.raises(PrivacyError, match="expected one batch of the private loader"):
        optimizer.step()


def test_a_temperature_that_is_no_parameter_of_the_module():
    scale = torch.nn.Parameter(torch.ones(()))
    refused(
        lambda model, optimizer, x, y: F.cross_entropy(model(x) * scale, y).backward(),
        "no parameters of the private model",
    )
    assert scale.grad is None


def test_another_models_backward_pass_is_its_own():
    other = nn.Linear(3, 1)
    _, model, optimizer, loader = made_private()
    for x, y in loader:
        optimizer.zero_grad()
        out = model(x)
        other(torch.ones(1, 3)).sum().backward()
        F.cross_entropy(out, y).backward()
        optimizer.step()
    assert other.weight.grad is not None


class OwnLoss(nn.Module):
    """Like those of transformers, which average over the batch."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x, y=None):
        logits = self.net(x)
        return {"logits": logits, "loss": None if y is None else F.cross_entropy(logits, y)}


def test_a_loss_that_the_model_averages_itself():
    refused(
        lambda model, optimizer, x, y: model(x, y)["loss"].backward(),
        "output of the model that has no row",
        CaptureError,
        net=OwnLoss(),
    )
    _, model, optimizer, loader = made_private(net=OwnLoss())
    for x, y in loader:
        out = model(x, y)
        assert torch.allclose(out["loss"], F.cross_entropy(out["logits"], y))
        optimizer.zero_grad()
        F.cross_entropy(out["logits"], y).backward()
        optimizer.step()


def test_zero_grad_gives_up_a_batch_that_was_left():
    _, model, optimizer, loader = made_private()
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        break
    with pytest.raises(PrivacyError, match="gradients of an earlier batch"):  # noqa: PT012
        for x, _ in loader:
            model(x)
    optimizer.zero_grad()
    assert train(model, optimizer, loader) == 6


def test_zero_grad_between_the_parts_of_a_sample_after_backward():
    _, model, optimizer, loader = made_private(batch_size=30)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        seen = 0
        with pytest.raises(PrivacyError, match="noise alone"):  # noqa: PT012
            for x, y in parts:
                seen += 1
                F.cross_entropy(model(x), y).backward()
                if seen == 2:
                    optimizer.zero_grad()
                optimizer.step()


def test_the_same_batch_twice_under_a_memory_manager():
    _, model, optimizer, loader = made_private(batch_size=30)
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        for x, y in parts:
            step(model, optimizer, x, y)
            with pytest.raises(PrivacyError, match="without a batch"):
                step(model, optimizer, x, y)
            break


# Settings that are refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poisson_sampling": False}, "poisson_sampling=False: epsilon is that of Poisson samples"),
        ({"noise_generator": torch.Generator()}, "noise comes from the operating system"),
        ({"clipping": "per_layer", "max_grad_norm": [1.0, 1.0]}, "per-layer and adaptive clipping"),
        ({"clipping": "adaptive", "target_unclipped_quantile": 0.5}, "target_unclipped_quantile"),
        ({"batch_first": False}, "batch_first=False"),
        ({"wrap_model": False}, "wrap_model=False"),
        ({"rand_on_empty": True}, "rand_on_empty"),
        ({"grad_sample_mode": "ghost_fsdp"}, "grad_sample_mode='ghost_fsdp'"),
        ({"loss_reduction": "none"}, "loss_reduction='none'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        made_private(**settings)


def test_modules():
    normed = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(CaptureError, match=r"batch norm \(1\).*GroupNorm.*ModuleValidator.fix"):
        made_private(net=normed)
    assert not dpfast.PrivacyEngine().is_compatible(module=normed)
    assert dpfast.PrivacyEngine().is_compatible(module=small_net())
    with pytest.raises(CaptureError, match=r"nn.LSTM.*DPLSTM"):
        made_private(net=nn.Sequential(nn.LSTM(3, 3)))
    with pytest.raises(CaptureError, match=r"DataParallel cuts the batch.*model.module"):
        made_private(net=nn.DataParallel(small_net()))
    with pytest.raises(PrivacyError, match="optimized but not clipped"):
        made_private(optimizer=lambda parameters, lr: torch.optim.SGD([nn.Parameter(torch.ones(1)), *parameters], lr))


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


def test_loaders():
    net = small_net()
    subset = DataLoader(pictures(), batch_size=3, sampler=torch.utils.data.SubsetRandomSampler(range(30)))
    buckets = DataLoader(pictures(), batch_sampler=[[0, 1], [2, 3]])
    for loader, message in (
        (subset, r"SubsetRandomSampler would be replaced.*torch\.utils\.data\.Subset"),
        (buckets, "its list of a SequentialSampler"),
        (DataLoader(Endless(), batch_size=3), "IterableDataset"),
        (DataLoader(pictures(), batch_size=None), "batch_size=None"),
    ):
        with pytest.raises(ConfigError, match=message):
            dpfast.PrivacyEngine().make_private(
                module=net,
                optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
                data_loader=loader,
                noise_multiplier=1.0,
                max_grad_norm=1.0,
            )
    _, _, optimizer, loader = made_private()
    assert isinstance(loader, PrivateLoader)
    assert isinstance(loader, DataLoader)
    with pytest.raises(ConfigError, match="two calls of make_private"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=made_private()[2])
    with pytest.raises(ConfigError, match="that make_private returned"):
        BatchMemoryManager(data_loader=DataLoader(pictures()), max_physical_batch_size=2, optimizer=optimizer)
    with pytest.raises(ConfigError, match="max_physical_batch_size=0"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=0, optimizer=optimizer)
    with pytest.raises(ConfigError, match="accountant='moments'"):
        dpfast.PrivacyEngine(accountant="moments")


def test_opacus_memory_manager_says_which_to_take():
    manager = pytest.importorskip("opacus.utils.batch_memory_manager").BatchMemoryManager
    _, _, optimizer, loader = made_private()
    with (
        manager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts,
        pytest.raises(ConfigError, match=r"BatchMemoryManager from dpfast\.engine"),
    ):
        next(iter(parts))


def test_batches_and_outputs_of_transformers():
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, pixels):
            return outputs.SequenceClassifierOutput(logits=self.net(pixels), hidden_states=(pixels,))

    def collate(items):  # as tokenizers do
        x, y = zip(*items, strict=True)
        return UserDict({"pixels": torch.stack(x), "labels": torch.stack(y), "names": ["name"] * len(x)})

    engine, model, optimizer, loader = made_private(net=Model(), batch_size=1, collate_fn=collate)  # some are empty
    empty = 0
    for batch in loader:
        labels = batch.pop("labels")
        out = model(batch["pixels"])
        assert type(out) is outputs.SequenceClassifierOutput
        assert out["logits"] is out.logits
        assert len(batch["names"]) == len(labels) == len(out.logits)
        F.cross_entropy(out.logits, labels).backward()
        optimizer.step()
        empty += not len(labels)
    assert 0 < empty < len(loader) == len(engine.accountant) == 60
