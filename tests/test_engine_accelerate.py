"""PrivacyEngine on what ``accelerator.prepare`` returns: accumulated gradients, precision, schedulers, checkpoints."""

import contextlib
import gc
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import dpfast
from dpfast.engine import BatchMemoryManager, modes
from oracle import errors, per_example

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

CLIP = 0.3


@pytest.fixture(autouse=True)
def _anew():
    """Accelerators share their state in a process. Nothing of a private loop is left once its objects are gone."""
    before = set(torch.overrides._get_current_function_mode_stack())  # of tests that another still holds
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    modes.sweep()
    assert not set(torch.overrides._get_current_function_mode_stack()) - before


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def rows(count=23):
    torch.manual_seed(1)
    return TensorDataset(torch.randn(count, 4), torch.randint(0, 3, (count,)), torch.arange(count))


def prepared(batch_size, accumulated=1, precision="no", lr=1.0, dataset=None):
    """accelerator, and model, optimizer, loader and scheduler as prepare returns them."""
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=accumulated, mixed_precision=precision, cpu=True)
    model, dataset = net(), dataset or rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    loader = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def private(engine, model, optimizer, loader, **settings):
    given = {"noise_multiplier": 0, "max_grad_norm": CLIP, **settings}
    return engine.make_private(module=model, optimizer=optimizer, data_loader=loader, **given)


def one_pass(accelerator, model, optimizer, loader, scheduler, reduction="mean"):
    """Ids of the examples of each batch, and after which of them accelerate takes a step."""
    ids, steps = [], []
    for x, y, number in loader:
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(x), y, reduction=reduction))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        ids.append(number.tolist())
        steps.append(accelerator.sync_gradients)
    return ids, steps


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
@pytest.mark.parametrize("parts", [1, 3, 40])
def test_accumulated_batches_are_one_sample_clipped_by_example(parts, reduction):
    """All examples are in the sample; with 40 parts many are empty."""
    size = len(rows())
    accelerator, model, optimizer, loader, scheduler = prepared(math.ceil(size / parts), accumulated=parts)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y, _ = rows().tensors
    losses = lambda m, r: F.cross_entropy(m(r[0]), r[1], reduction="none")  # noqa: E731
    exact = per_example(net(), losses, (x, y), augmult=1, max_grad_norm=CLIP)
    assert (exact.norms > CLIP).any()
    engine = dpfast.PrivacyEngine()
    settings = {"loss_reduction": "sum"} if reduction == "sum" else {}
    wrapped, optimizer, loader = private(engine, model, optimizer, loader, **settings)
    assert len(loader) == parts
    ids, steps = one_pass(accelerator, wrapped, optimizer, loader, scheduler, reduction)
    assert sorted(number for batch in ids for number in batch) == list(range(size))
    assert steps == [False] * (parts - 1) + [True]
    assert optimizer.steps_taken == 1
    divisor = 1 if reduction == "sum" else size
    moved = {name: (before[name] - p.detach()) * divisor for name, p in model.named_parameters()}
    assert errors(type(exact)(exact.norms, moved), exact)[1] < 1e-5


def test_each_sample_has_as_many_batches_as_accelerate_counts():
    accelerator, model, optimizer, loader, scheduler = prepared(4, accumulated=3, lr=0.1)
    assert len(loader) == 6
    engine = dpfast.PrivacyEngine()
    given = {"target_epsilon": 8.0, "target_delta": 1e-3, "max_grad_norm": CLIP, "epochs": 5}
    model, optimizer, loader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=loader, **given
    )
    assert (len(loader), loader.sample_rate, optimizer.plan.steps) == (6, 0.5, 10)
    for epoch in range(5):
        ids, steps = one_pass(accelerator, model, optimizer, loader, scheduler)
        assert steps == 2 * [False, False, True]
        for sample in (list(itertools.chain(*ids[:3])), list(itertools.chain(*ids[3:]))):
            assert len(sample) == len(set(sample))
        assert optimizer.steps_taken == 2 * (epoch + 1)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**10
    assert 7.9 < engine.get_epsilon(1e-3) <= 8
    with pytest.raises(dpfast.DPFastError, match="spent"):
        one_pass(accelerator, model, optimizer, loader, scheduler)


def test_a_sample_that_is_left_in_the_middle_makes_no_step():
    accelerator, model, optimizer, loader, _ = prepared(4, accumulated=3)
    model, optimizer, loader = private(dpfast.PrivacyEngine(), model, optimizer, loader)
    before = [p.detach().clone() for p in model.parameters()]
    for x, y, _ in loader:
        accelerator.backward(F.cross_entropy(model(x), y))
        break
    x, *_ = next(iter(loader))
    with pytest.raises(dpfast.DPFastError, match="gradients of an earlier batch"):
        model(x)
    optimizer.zero_grad()
    assert optimizer.steps_taken == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_batch_of_a_sample_that_is_not_back_propagated_is_refused():
    _, model, optimizer, loader, _ = prepared(4, accumulated=3)
    model, optimizer, loader = private(dpfast.PrivacyEngine(), model, optimizer, loader)
    batches = iter(loader)
    model(next(batches)[0])
    with pytest.raises(dpfast.DPFastError, match=r"optimizer\.step\(\) was not called"):
        next(batches)


def test_the_step_after_the_last_batch_of_a_sample_is_not_to_be_left_out():
    accelerator, model, optimizer, loader, _ = prepared(4, accumulated=3)
    model, optimizer, loader = private(dpfast.PrivacyEngine(), model, optimizer, loader)
    batches = iter(loader)
    for _ in range(3):
        x, y, _ = next(batches)
        accelerator.backward(F.cross_entropy(model(x), y))
    with pytest.raises(dpfast.DPFastError, match=r"optimizer\.step\(\) was not called"):
        next(batches)


def test_bfloat16_is_computed_inside_the_step():
    accelerator, model, optimizer, loader, scheduler = prepared(8, precision="bf16", lr=0.1)
    seen = []
    model[0].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    wrapped, optimizer, loader = private(dpfast.PrivacyEngine(), model, optimizer, loader, noise_multiplier=1.0)
    one_pass(accelerator, wrapped, optimizer, loader, scheduler)
    assert set(seen) == {torch.bfloat16}
    assert optimizer.steps_taken == len(loader)


def test_scaled_losses_are_refused():
    _, model, optimizer, loader, _ = prepared(8)
    optimizer.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(dpfast.DPFastError, match='use Accelerator\\(mixed_precision="bf16"\\)'):
        private(dpfast.PrivacyEngine(), model, optimizer, loader)


def test_batches_go_where_the_prepared_loader_sends_them():
    _, model, optimizer, loader, _ = prepared(8)
    loader.device = torch.device("meta")
    _, _, loader = private(dpfast.PrivacyEngine(), model, optimizer, loader)
    assert {part.device.type for batch in loader for part in batch} == {"meta"}


def test_a_prepared_loader_has_the_sampler_that_it_was_given():
    for seedable, sampler, fits in [(True, None, True), (False, None, True), (False, [1.0] * 23, False)]:
        dataloaders = accelerate.DataLoaderConfiguration(use_seedable_sampler=seedable)
        accelerator = accelerate.Accelerator(cpu=True, dataloader_config=dataloaders)
        given = {"shuffle": True} if sampler is None else {"sampler": WeightedRandomSampler(sampler, 23)}
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        made = accelerator.prepare(model, optimizer, DataLoader(rows(), batch_size=8, **given))
        refused = pytest.raises(dpfast.DPFastError, match="of a WeightedRandomSampler would be replaced")
        with contextlib.nullcontext() if fits else refused:
            private(dpfast.PrivacyEngine(), *made)


def test_prepare_after_make_private_says_what_to_do():
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    made = private(dpfast.PrivacyEngine(), model, optimizer, DataLoader(rows(), batch_size=8))
    model, optimizer, loader = accelerator.prepare(*made)
    x, *_ = next(iter(loader))
    with pytest.raises(dpfast.DPFastError, match="with accelerate, after prepare"):
        model(x)


def test_two_ways_to_divide_a_sample_are_refused():
    _, model, optimizer, loader, _ = prepared(8, accumulated=2)
    _, optimizer, loader = private(dpfast.PrivacyEngine(), model, optimizer, loader)
    with pytest.raises(dpfast.DPFastError, match="gradient_accumulation_steps"):
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer)


def test_a_checkpoint_of_accelerate_goes_on_with_the_ledger(tmp_path):
    accelerator, model, optimizer, loader, scheduler = prepared(8, lr=0.1)
    engine = dpfast.PrivacyEngine(ledger=tmp_path / "ledger.jsonl")
    wrapped, private_optimizer, private_loader = private(engine, model, optimizer, loader, noise_multiplier=1.0)
    one_pass(accelerator, wrapped, private_optimizer, private_loader, scheduler)
    accelerator.save_state(tmp_path / "checkpoint")
    saved = [p.detach().clone() for p in model.parameters()]
    one_pass(accelerator, wrapped, private_optimizer, private_loader, scheduler)  # not saved
    spent, rate = engine.get_epsilon(1e-3), scheduler.get_last_lr()
    engine.close()
    accelerator.load_state(tmp_path / "checkpoint")
    assert all(torch.equal(a, b) for a, b in zip(saved, model.parameters(), strict=True))
    assert scheduler.get_last_lr() != rate
    again = dpfast.PrivacyEngine(ledger=tmp_path / "ledger.jsonl")
    wrapped, private_optimizer, private_loader = private(again, model, optimizer, loader, noise_multiplier=1.0)
    assert private_optimizer.steps_taken == 6
    assert again.get_epsilon(1e-3) == spent
    one_pass(accelerator, wrapped, private_optimizer, private_loader, scheduler)
    assert private_optimizer.steps_taken == 9
