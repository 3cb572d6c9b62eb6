"""Ways around the loss of a private model: gradients, numbers and rows that would reach it by another door."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dpfast.errors import CaptureError, DPFastError, PrivacyError
from engine_cases import Negated, made_private, numbers, small_net


@pytest.fixture
def private():
    """Model, optimizer, loader without noise, and the first batch."""
    _, model, optimizer, loader = made_private(noise_multiplier=0.0)
    return model, optimizer, loader


def test_a_backward_pass_after_the_step_does_not_reach_the_model(private):
    model, optimizer, loader = private
    x, y = next(iter(loader))
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = numbers(model)
    model.eval()
    with pytest.raises(PrivacyError, match=r"reached 1\.weight|reached .* by another way"):
        F.cross_entropy(model(x), y).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert torch.equal(numbers(model), before)


def test_gradients_of_inputs_are_ones_own_affair(private):
    model, _, loader = private
    x, _ = next(iter(loader))
    model.eval()
    x.requires_grad_()
    (saliency,) = torch.autograd.grad(model(x).sum(), x)
    assert saliency.shape == x.shape


def test_copies_of_the_model_are_free(private):
    student = copy.deepcopy(private[0])
    student(torch.randn(2, 3, 6, 6)).sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_weight_of_the_loss_that_is_computed_from_the_batch(private):
    model, _, loader = private
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        with pytest.raises(PrivacyError, match="the loss of one example depends on others"):
            loss.backward(x.abs().mean())
        break


class Told(nn.Module):
    """Adds what somebody has put into it."""

    def __init__(self):
        super().__init__()
        self.inner = small_net()
        self.register_buffer("running", torch.zeros(5))
        self.context = None

    def forward(self, x):
        return self.inner(x) + self.running + (0 if self.context is None else self.context)


@pytest.mark.parametrize("place", ["running", "context"])
def test_what_the_loop_writes_into_the_model(place):
    _, model, _, loader = made_private(net=Told())
    for x, _ in loader:
        mean = x.flatten(1).mean(0)[:5]
        if place == "running":
            model.running.lerp_(mean, 0.1)
        else:
            model.context = mean
        with pytest.raises(PrivacyError, match=rf"{place} of the private model was computed from a batch"):
            model(x)
        break


class WithMean(nn.Module):
    """Outputs, and their mean over the batch without a gradient."""

    def __init__(self):
        super().__init__()
        self.inner = small_net()

    def forward(self, x):
        out = self.inner(x)
        return out, out.detach().mean(0)


def test_a_result_without_rows_in_the_loss():
    _, model, optimizer, loader = made_private(net=WithMean())

    def one_pass():
        for x, _ in loader:  # of 5 examples the mean looks like rows
            optimizer.zero_grad()
            out, mean = model(x)
            (out - mean).square().mean().backward()
            optimizer.step()

    with pytest.raises(DPFastError, match=r"depends on others|changing one example's input"):
        one_pass()


def test_a_loss_that_mixes_now_and_then_is_looked_at_when_it_comes_again(private):
    model, optimizer, loader = private
    mixed = []

    def one_pass():
        for number, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            out = model(x)
            loss = F.cross_entropy(out, y)
            if number % 3 == 2:
                mixed.append(number)
                loss = loss + (out - out.detach().mean(0)).square().mean()
            loss.backward()
            optimizer.step()

    with pytest.raises(PrivacyError, match="the loss of one example depends on others"):
        one_pass()
    assert len(mixed) <= 2


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.full((1 + i,), 1 + i % 15), i % 5  # no two are equally long


def padded(items):
    return pad_sequence([tokens for tokens, _ in items], batch_first=True), torch.tensor([label for _, label in items])


def with_count(items):
    tokens, labels = padded(items)
    return tokens, labels, int((tokens != 0).sum())


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(16, 8), nn.Linear(8, 5)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


def test_numbers_of_tokens_from_a_collate_function():
    *_, loader = made_private(Texts(), Reader(), batch_size=20, collate_fn=with_count)
    with pytest.raises(PrivacyError, match="collate_fn: what it makes of one example depends on others"):
        list(loader)


def test_a_batch_that_is_read_ahead(private):
    model, optimizer, loader = private
    batches = iter(loader)
    x, y = next(batches)
    next(batches)
    with pytest.raises(PrivacyError, match="To read ahead, give the DataLoader num_workers"):
        F.cross_entropy(model(x), y).backward()
    assert optimizer.steps_taken == 0


def test_a_gradient_penalty(private):
    model, _, loader = private
    x, _ = next(iter(loader))
    out = model(x.requires_grad_())
    with pytest.raises(CaptureError, match="gradient penalty is not supported"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
    (ones,) = torch.autograd.grad(out.sum(), out)  # one's own affair
    assert torch.equal(ones, torch.ones_like(out))


@pytest.mark.filterwarnings("ignore:.*[Dd]ynamo")
def test_a_private_model_that_is_compiled_from_outside(private):
    model, _, loader = private
    compiled = torch.compile(model, backend="eager")
    x, _ = next(iter(loader))
    with pytest.raises(CaptureError, match=r"give torch\.compile the module before it is made private"):
        compiled(x)


def test_hooks_on_outputs_that_keep_rows_apart(private):
    model, optimizer, loader = private
    seen = []
    for x, y in loader:
        optimizer.zero_grad()
        out = model(x)
        out.register_hook(lambda g: seen.append(g) or 2 * g)
        F.cross_entropy(out, y).backward()
        optimizer.step()
    assert seen


def test_hooks_on_outputs_that_mix_rows(private):
    model, _, loader = private
    for x, y in loader:
        out = model(x)
        out.register_hook(lambda g: g - g.mean(0))
        with pytest.raises(PrivacyError, match="the loss of one example depends on others"):
            F.cross_entropy(out, y).backward()
        break


def test_a_learning_rate_that_is_computed_from_the_loss(private):
    model, optimizer, loader = private
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.1 * loss.item()
        with pytest.raises(PrivacyError, match="a setting of the optimizer"):
            optimizer.step()
        break


class ReadsAround(nn.Module):
    """Takes what somebody has left in a dict, a list, a closure."""

    def __init__(self, left):
        super().__init__()
        self.inner, self.left = small_net(), left

    def forward(self, x):
        left = self.left() if callable(self.left) else self.left[0]
        return self.inner(x) + left


@pytest.mark.parametrize("how", ["dict", "list", "closure", "hook"])
def test_what_the_model_reads_of_the_loop_in_other_ways_than_its_arguments(how):
    box = {0: 0.0} if how != "list" else [0.0]
    net = small_net() if how == "hook" else ReadsAround((lambda: box[0]) if how == "closure" else box)
    if how == "hook":
        net[0].register_forward_hook(lambda module, args, out: out + box[0])
    _, model, _, loader = made_private(net=net)
    for x, y in loader:
        box[0] = x.flatten(1).mean()
        with pytest.raises(PrivacyError, match="the model is given"):
            F.cross_entropy(model(x), y).backward()
        break


def test_gradients_taken_in_the_loop_are_followed(private):
    model, _, loader = private
    for x, y in loader:
        out = model(x)
        first, second = F.cross_entropy(out, y), out.square().mean()
        a, b = (torch.autograd.grad(loss, out, retain_graph=True)[0] for loss in (first, second))
        with pytest.raises(PrivacyError, match="the loss of one example depends on others"):
            (first + second * (a.norm() / b.norm())).backward()
        break


def test_sums_are_gone_when_a_loop_is_refused(private):
    model, _, loader = private

    def without_steps():
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()

    with pytest.raises(PrivacyError, match=r"optimizer\.step\(\) was not called"):
        without_steps()
    assert all(p.grad is None for p in model.parameters())


def test_an_autograd_function_in_a_part_of_the_loss_is_said_not_to_be_seen(private):
    model, _, loader = private
    for x, y in loader:
        out = model(x)
        with pytest.warns(UserWarning, match=r"an autograd\.Function\?"):
            (F.cross_entropy(out, y) + Negated.apply(out).square().mean()).backward()
        break


class Boxes(torch.utils.data.Dataset):
    """Images with boxes, of which there are more or fewer."""

    def __len__(self):
        return 60

    def __getitem__(self, i):
        chance = torch.Generator().manual_seed(i)
        return torch.randn(3, 6, 6, generator=chance), {"boxes": torch.rand(1 + i % 4, 4, generator=chance), "id": i}


def as_lists(items):
    return torch.stack([image for image, _ in items]), [target for _, target in items]


def of_each_image(boxes, targets):
    losses = [(box - target["boxes"]).square().mean() for box, target in zip(boxes, targets, strict=True)]
    return torch.stack(losses).mean()


def over_all_boxes(boxes, targets):
    found = torch.cat([(box - target["boxes"]).square() for box, target in zip(boxes, targets, strict=True)])
    return found.sum() / found.shape[0]


@pytest.mark.parametrize("loss", [of_each_image, over_all_boxes], ids=lambda loss: loss.__name__)
def test_lists_with_an_entry_for_each_example(loss):
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    _, model, optimizer, loader = made_private(Boxes(), net, collate_fn=as_lists)

    def one_pass():
        for images, targets in loader:
            optimizer.zero_grad()
            loss(model(images), targets).backward()
            optimizer.step()

    if loss is of_each_image:
        one_pass()
    else:
        with pytest.raises(PrivacyError, match="the loss of one example depends on others"):
            one_pass()
