"""What the user's code does around the private model: where it lets examples meet, it is refused."""

import copy
import gc
import json
import pickle
import weakref
from decimal import Decimal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dpfast.engine.batches import copied
from dpfast.engine.shadows import Shadows
from dpfast.errors import DPFastError, PrivacyError
from dpfast.testing import injected_entropy
from engine_cases import Negated, made_private, numbers, pictures, small_net

APART = "the loss of one example depends on others"
INPUTS = "what the model is given for one example depends on other examples"


def embeddings():
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 8))


class Centred(nn.Module):
    """DINO's centre: of the batches before."""

    def __init__(self, *, in_place):
        super().__init__()
        self.register_buffer("centre", torch.zeros(5))
        self.in_place = in_place

    def forward(self, out, y):
        loss = F.cross_entropy(out - self.centre, y)
        with torch.no_grad():
            if self.in_place:
                self.centre.mul_(0.5).add_(out.detach().mean(0), alpha=0.5)
            else:
                self.centre = 0.5 * self.centre + 0.5 * out.detach().mean(0)
        return loss


class Queue:
    """MoCo's negatives: keys of the batches before."""

    def __init__(self):
        self.keys = torch.randn(6, 8)

    def __call__(self, out, y):
        loss = F.cross_entropy(out @ self.keys.T, y)
        self.keys = torch.cat([self.keys, out.detach()])[-6:]
        return loss


def in_batch_negatives(out, y):
    return F.cross_entropy(out @ out.T, torch.arange(len(out)))


def detached_negatives(out, y):
    return F.cross_entropy(out @ out.detach().T, torch.arange(len(out)))


def negatives_without_grad(out, y):
    with torch.no_grad():
        keys = F.normalize(out, dim=1)
    return F.cross_entropy(out @ keys.T, torch.arange(len(out)))


def mean_over_tokens_not_ignored(out, y):
    return F.cross_entropy(out.view(-1, 2), torch.where(y.unsqueeze(1) > torch.arange(4), 1, -100).flatten())


def divided_by_counts(out, y):
    counts = torch.bincount(y, minlength=5)
    return (F.cross_entropy(out, y, reduction="none") / counts[y]).mean()


def weighted_by_classes(out, y):
    weights = 1 / torch.bincount(y, minlength=8).clamp(min=1)
    return F.cross_entropy(out, y, weight=weights.float())


def standardised_targets(out, y):
    target = (y - y.float().mean()) / y.float().std()
    return F.mse_loss(out[:, 0], target)


def normalised_over_the_batch(out, y):
    return F.cross_entropy(F.normalize(out, dim=0), y)


def softmax_over_the_batch(out, y):
    return out.log_softmax(0)[:, 0].mean()


def written_in_place(out, y):
    losses = torch.zeros(len(y))
    losses[:] = F.cross_entropy(out, y, reduction="none")
    weights = torch.ones(len(y))
    weights.div_(y.sum() + 1)
    return (losses * weights).sum()


def hardest(out, y):
    return F.cross_entropy(out, y, reduction="none").topk(2).values.mean()


def mean_of_a_loop(out, y):
    centre = out.detach()[0]
    for row in out.detach()[1:]:
        centre = centre + row
    return (out - centre).square().mean()


def divided_by_an_item(out, y):
    weights = (y > 1).float()
    return (F.cross_entropy(out, y, reduction="none") * weights).sum() / weights.sum().item()


def divided_by_a_number_of_python(out, y):
    return (F.cross_entropy(out, y, reduction="none") * (y > 1)).sum() * (1 / int((y > 1).sum()))


def divided_by_how_many_are_valid(out, y):
    valid = F.cross_entropy(out, y, reduction="none")[y > 1]
    return valid.sum() / len(valid)


def divided_by_a_shape(out, y):
    valid = out[y > 1]
    return out.square().sum() / valid.shape[0]


def divided_by_a_size(out, y):
    return out.square().sum().div_(out[y > 1].numel())


def less_a_mean_from_python(out, y):
    return (out - out.mean().item()).square().mean()


def written_into_a_view(out, y):
    table = torch.zeros(3 * len(y), 8)
    table[len(y) : 2 * len(y)].copy_(out.detach())
    return (out - table.mean(0)).square().mean()


def written_into_data(out, y):
    centre = nn.Parameter(torch.zeros(8))
    centre.data.copy_(out.detach().mean(0))
    return (out - centre.detach()).square().mean()


def with_a_number_of_pythons(out, y):
    losses = F.cross_entropy(out, y, reduction="none")
    return (losses * losses.gt(losses.detach().quantile(0.7).item())).mean()


def by_its_mean_and_one(out, y):
    return (out / (1 + out.detach().square().mean().item())).square().mean()


def made_of_numbers(out, y):
    losses = F.cross_entropy(out, y, reduction="none")
    return losses.mean() * torch.tensor([losses.mean().item(), 1.0]).softmax(0)[0]


MIXING = [
    *(in_batch_negatives, detached_negatives, negatives_without_grad, mean_over_tokens_not_ignored, divided_by_counts),
    *(weighted_by_classes, standardised_targets, normalised_over_the_batch, softmax_over_the_batch, written_in_place),
    *(hardest, mean_of_a_loop, divided_by_an_item, divided_by_a_number_of_python, divided_by_how_many_are_valid),
    *(divided_by_a_shape, divided_by_a_size, less_a_mean_from_python, with_a_number_of_pythons),
    *(by_its_mean_and_one, made_of_numbers, written_into_a_view, written_into_data),
]


def tried(loss, net=None, prepare=lambda x, y: (x, y), batches=1, **settings):
    """A training that is refused, with all that was there before."""
    _, model, optimizer, loader = made_private(net=net, **{"batch_size": 20, "noise_multiplier": 0, **settings})
    for seen, (x, y) in enumerate(loader, 1):
        before = numbers(model)
        x, y = prepare(x, y)
        try:
            loss(model(x), y).backward()
        except DPFastError:
            assert all(p.grad is None for p in model.parameters())
            assert torch.equal(before, numbers(model))
            raise
        optimizer.step()
        if seen == batches:
            break
    return model


@pytest.mark.parametrize("loss", MIXING, ids=lambda loss: loss.__name__)
def test_losses_that_mix_examples_are_refused_before_anything_is_written(loss):
    with pytest.raises(PrivacyError, match=f"{APART}|a sum over the rows|neither a mean nor"):  # also of few examples
        tried(loss, nn.Sequential(nn.Flatten(), nn.Linear(108, 8)), batches=4)


@pytest.mark.parametrize(
    "loss", [Centred(in_place=True), Centred(in_place=False), Queue()], ids=["in place", "anew", "queue"]
)
def test_what_is_kept_of_a_batch_is_refused_with_the_next(loss):
    net = small_net() if isinstance(loss, Centred) else embeddings()
    with pytest.raises(PrivacyError, match=f"{APART}.*in the batch before"):
        tried(loss, net, batches=2)


class Replay:
    """Outputs of some batches ago."""

    def __init__(self, ago):
        self.seen, self.ago = [], ago

    def __call__(self, out, y):
        self.seen.append(out.detach().mean(0))
        loss = F.cross_entropy(out, y)
        return loss + (out - self.seen[0]).square().mean() if len(self.seen) > self.ago else loss


@pytest.mark.parametrize("ago", [1, 2, 5])
def test_what_is_kept_for_longer(ago):
    with pytest.raises(PrivacyError, match=f"{APART}.*in the batch before"):
        tried(Replay(ago), embeddings(), batches=8, dataset=pictures(200))


class Bank:
    """A memory bank: a place for each batch, written to through views."""

    def __init__(self):
        self.means, self.at = torch.zeros(4, 8), 0

    def __call__(self, out, y):
        loss = (out @ self.means.clone().T).square().mean()
        self.means[self.at % 4].lerp_(out.detach().mean(0), 0.5)
        self.at += 1
        return loss


def test_what_is_kept_in_a_part_of_a_tensor():
    with pytest.raises(PrivacyError, match=f"{APART}.*in the batch before"):
        tried(Bank(), embeddings(), batches=3)


def test_a_mode_is_not_left_on_by_what_is_kept_for_the_log():
    losses = []

    def loss(out, y):
        losses.append(F.cross_entropy(out, y).detach())
        return F.cross_entropy(out, y)

    tried(loss, batches=8, dataset=pictures(200))
    assert len(losses) == 8


def mixed_up(x, y):
    return 0.7 * x + 0.3 * x.flip(0), y


def standardised(x, y):
    return (x - x.mean(0)) / x.std(0), y


def shifted_by_a_number(x, y):
    return x - x.mean(), y


@pytest.mark.parametrize("prepare", [mixed_up, standardised, shifted_by_a_number], ids=lambda f: f.__name__)
def test_inputs_that_mix_examples_are_refused(prepare):
    with pytest.raises(PrivacyError, match=INPUTS):
        tried(F.cross_entropy, prepare=prepare, batches=4)  # pairs of examples may lie in the same half by chance


def standardised_but_for_one(x, y):
    table = x.flatten(1).clone()
    table[:, 1:] -= table[:, 1:].mean(0)
    return table.view_as(x), y


def test_a_column_of_large_numbers_does_not_hide_the_others():
    data = pictures()
    data.tensors[0][:, 0, 0, 0] = 1.8e9
    with pytest.raises(PrivacyError, match=INPUTS):
        tried(F.cross_entropy, prepare=standardised_but_for_one, dataset=data)


ENCODER = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU()).eval()


@torch.no_grad()
def encoded(x):
    return ENCODER(x)


def of_each_image(x):
    x = x - x.mean((1, 2, 3), keepdim=True)
    return x / x.square().mean((1, 2, 3), keepdim=True).sqrt()


def projected(x):
    with torch.autocast("cpu", torch.bfloat16):
        return (x.flatten(1) @ torch.ones(x.shape[1:].numel(), 32)).relu().float()


LAYOUTS = {
    "last channels": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "cropped": lambda x: x[..., 1:14, 2:13],
    "in steps": lambda x: x[..., ::2, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "windows": lambda x: x.unfold(3, 5, 1)[..., 0],
    "one of many channels": lambda x: x[..., ::2, ::2, None].repeat(1, 1, 1, 1, 40)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prepare", [encoded, of_each_image, projected], ids=lambda f: f.__name__)
def test_rounding_that_depends_on_how_a_batch_is_laid_out(layout, prepare):
    torch.manual_seed(0)
    images = torch.randn(30, 3, 16, 16)

    def collate(items):
        return LAYOUTS[layout](torch.stack([x for x, _ in items])), torch.stack([y for _, y in items])

    data = torch.utils.data.TensorDataset(images, torch.randint(0, 5, (30,)))
    size = prepare(LAYOUTS[layout](images))[0].numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, 5))
    _, model, optimizer, loader = made_private(data, net, batch_size=5, collate_fn=collate)
    for x, y in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(prepare(x)), y).backward()
        optimizer.step()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_are_laid_out_alike(layout):
    t = LAYOUTS[layout](torch.randn(6, 3, 16, 16))
    some = t[[1, 0, 4]]
    for copy_, one in ((copied(t), t), (copied(some, like=t), some)):
        assert torch.equal(copy_, one)
        assert copy_.stride() == t.stride()
        assert copy_.untyped_storage().data_ptr() != t.untyped_storage().data_ptr()


def test_windows_over_several_examples_are_copied_as_they_are():
    t = torch.randn(100).unfold(0, 20, 10)
    assert torch.equal(copied(t), t)
    assert torch.equal(copied(t[[3, 1, 1]], like=t), t[[3, 1, 1]])


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, x, level):
        return self.net(x + level)


def test_an_argument_without_rows_that_is_computed_from_the_batch():
    _, model, _, loader = made_private(net=Conditioned())
    with pytest.raises(PrivacyError, match=INPUTS):  # noqa: PT012
        for x, _ in loader:
            model(x, x.mean())


def test_a_number_that_is_computed_from_the_batch():
    _, model, _, loader = made_private(net=Conditioned())
    with pytest.raises(PrivacyError, match="a number that was read from the batch"):  # noqa: PT012
        for x, _ in loader:
            model(x, x.std().item())


def test_a_reduction_that_is_not_the_one_that_was_said():
    def summed(out, y):
        return F.cross_entropy(out, y, reduction="sum")

    with pytest.raises(PrivacyError, match='say loss_reduction="sum"'):
        tried(summed, loss_reduction="mean", batches=3)
    with pytest.raises(PrivacyError, match='say loss_reduction="sum"'):
        tried(lambda out, y: summed(out, y) / 100, loss_reduction="mean", batches=3)
    with pytest.raises(PrivacyError, match='say loss_reduction="mean"'):
        tried(F.cross_entropy, loss_reduction="sum", batches=3)
    tried(summed, loss_reduction="sum", batches=3)
    tried(lambda out, y: summed(out, y) / len(y), loss_reduction="mean", batches=3)
    tried(lambda out, y: out.square().sum() / out.numel(), loss_reduction="mean", batches=3)
    tried(lambda out, y: out.square().sum() * (1 / out.shape[0]), loss_reduction="mean", batches=3)
    with pytest.raises(PrivacyError, match='say loss_reduction="sum"'):
        tried(lambda out, y: F.cross_entropy(out, y) * len(y), loss_reduction="mean", batches=3)
    with pytest.raises(PrivacyError, match='say loss_reduction="sum"'):
        tried(lambda out, y: F.cross_entropy(out, y) * out.shape[0], loss_reduction="mean", batches=3)
    tried(lambda out, y: F.cross_entropy(out, y, reduction="none"), loss_reduction="sum", batches=3)


def with_targets_drawn(reduction):
    def loss(out, y):
        target = torch.randn_like(out) * torch.rand(len(out), 1) + torch.empty_like(out).normal_()
        return F.mse_loss(F.dropout(out, 0.3), target, reduction=reduction)

    return loss


def test_a_reduction_where_random_numbers_are_drawn():
    with pytest.raises(PrivacyError, match='say loss_reduction="sum"'):
        tried(with_targets_drawn("sum"), loss_reduction="mean")
    with pytest.raises(PrivacyError, match='say loss_reduction="mean"'):
        tried(with_targets_drawn("mean"), loss_reduction="sum")
    tried(with_targets_drawn("mean"), loss_reduction="mean", batches=3)


def mean_and_sum(out, y):
    return F.cross_entropy(out, y) + 0.1 * out.square().sum()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_mean_of_a_part_and_a_sum_of_another(reduction):
    with pytest.raises(PrivacyError, match="neither a mean nor a sum over the rows"):
        tried(mean_and_sum, loss_reduction=reduction, batches=8, dataset=pictures(200))


def test_a_sum_divided_by_twice_the_size_is_no_sum():
    def loss(out, y):
        return F.cross_entropy(out, y, reduction="sum") / (2 * len(y))

    tried(loss, loss_reduction="mean", batches=3)
    with pytest.raises(PrivacyError, match="divided by a multiple of how many examples"):
        tried(loss, loss_reduction="sum", batches=8, dataset=pictures(200))


def picked_by_place(out, y):
    return -out.log_softmax(1)[torch.arange(len(y)), y].view(len(y), 1).mean(1).sum()


def row_by_row(out, y):
    return torch.stack([F.cross_entropy(out[i], y[i]) for i in range(len(y))]).sum()


@pytest.mark.parametrize("loss", [picked_by_place, row_by_row], ids=lambda loss: loss.__name__)
def test_a_sum_of_rows_that_are_picked_is_seen(loss):
    with pytest.raises(PrivacyError, match='say loss_reduction="sum"'):
        tried(loss, embeddings(), loss_reduction="mean")
    tried(loss, embeddings(), loss_reduction="sum", batches=3)


def test_numbers_of_the_log_are_numbers(tmp_path):
    """They may be saved, printed, added up, and are plain ones when the batch is gone."""
    _, model, optimizer, loader = made_private(noise_multiplier=0.0)
    total = count = 0
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total, count = total + loss.item() * x.shape[0], count + x.shape[0]
        assert isinstance(total, float)
        assert json.loads(json.dumps([total, count])) == [total, count]
        assert type(copy.deepcopy(total)) is type(pickle.loads(pickle.dumps(total))) is float
        assert f"{total:.3f} {count}" == f"{float(total):.3f} {int(count)}"
        torch.save({"total": total, "count": [count]}, tmp_path / "log.pt")
        saved = torch.load(tmp_path / "log.pt", weights_only=True)
        assert (saved["total"], saved["count"]) == (total, [count])
    assert type(total / count) is float
    assert type(total + 0.0) is float


def test_numbers_that_are_equal_by_chance():
    def loss(out, y):
        y.tolist(), (out.argmax(1) == y).sum().item(), len(y)
        return 10 * F.cross_entropy(out / 4.0, y) + 3 * out.square().mean()

    tried(loss, embeddings(), batches=16, dataset=pictures(200), batch_size=10)


def test_a_table_of_as_many_rows_as_the_batch():
    def loss(out, y):
        return (out[:, :5] - torch.eye(5)[y]).square().mean()

    tried(loss, embeddings(), batches=30, dataset=pictures(200), batch_size=5)


def test_outputs_that_are_constant_or_codes():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = embeddings(), nn.Parameter(torch.ones(()))
            self.register_buffer("priors", torch.randn(3, 8))

        def forward(self, x):
            out = self.net(x) * self.scale
            return out, self.priors, self.scale.detach().exp(), out.view(-1, 4).argmax(1)

    def loss(outputs, y):
        out, priors, scale, codes = outputs
        book = torch.arange(8.0).view(4, 2)
        return (out @ priors.T).square().mean() * scale + (out.view(-1, 4)[:, :2] - book[codes]).square().mean()

    tried(loss, Several(), batches=3)


def test_complex_outputs():
    def loss(out, y):
        turned = torch.complex(out[:, :4], out[:, 4:])
        return (turned - 1j * turned.detach().mean(0).imag).abs().square().mean()

    with pytest.raises(PrivacyError, match=APART):
        tried(loss, embeddings())


def test_a_reduction_of_few_examples():
    def loss(out, y):
        return F.cross_entropy(out, y, reduction="sum")

    with pytest.raises(PrivacyError, match='say loss_reduction="sum"'):
        tried(loss, dataset=pictures(60), batch_size=2, batches=30)


# What stays apart is not refused


def smoothed(out, y):
    return F.cross_entropy(out, y, label_smoothing=0.1)


def with_dropout_of_the_users(out, y):
    return F.cross_entropy(F.dropout(out, 0.5), y)


def noisy(out, y):
    return F.mse_loss(out, torch.randn_like(out))


def own_centre(out, y):
    out -= out.detach().mean(1, keepdim=True)
    out[:, 1] *= 2
    return F.cross_entropy(out, y)


def by_hand(out, y):
    total = 0.0
    for row, label in zip(out, y, strict=True):
        total = total + F.cross_entropy(row, label)
    return total / len(y)


def tokens_of_each(out, y):
    target = torch.where(y.unsqueeze(1) >= torch.arange(4), 1, -100)
    losses = F.cross_entropy(out.view(-1, 4, 2).transpose(1, 2), target, reduction="none", ignore_index=-100)
    return (losses.sum(1) / (target != -100).sum(1)).mean()


def public_weights(out, y):
    return F.cross_entropy(out, y, weight=torch.arange(1.0, 9.0), reduction="none").mean()


def logged(out, y):
    accuracy = (out.argmax(1) == y).float().mean().item()
    assert 0 <= accuracy <= 1
    return F.cross_entropy(out, y)


def with_a_nan(out, y):
    return F.cross_entropy(out, y) + (out.sum(1) * torch.where(y == 0, torch.inf, 0.0)).mean()


APART_LOSSES = [
    *(smoothed, with_dropout_of_the_users, noisy, own_centre, by_hand, tokens_of_each, public_weights, logged),
    with_a_nan,
]


@pytest.mark.parametrize("loss", APART_LOSSES, ids=lambda loss: loss.__name__)
def test_losses_that_keep_examples_apart_are_not_refused(loss):
    tried(loss, nn.Sequential(nn.Flatten(), nn.Linear(108, 8)), batches=3)


def test_bfloat16_losses_are_not_refused():
    def loss(out, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(out @ torch.eye(5), y)

    tried(loss, batches=3)


def test_random_numbers_are_drawn_as_without_checks():
    drawn = []
    for first in (False, True):
        _, model, _, loader = made_private(batch_size=30)
        batches = iter(loader)
        with injected_entropy(1):
            x, _ = next(batches)
        torch.manual_seed(0)
        F.dropout(model(x), 0.5)
        loader.session._between.worlds = () if first else loader.session._between.worlds
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


def test_running_means_for_the_log_are_not_refused():
    _, model, optimizer, loader = made_private()
    total = torch.zeros(())
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        total += loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert total > 0


def test_a_loss_that_begins_to_mix_is_refused_with_the_next_batch():
    _, model, optimizer, loader = made_private(pictures(300), batch_size=10)
    seen = 0
    with pytest.raises(PrivacyError, match=APART):  # noqa: PT012
        for x, y in loader:
            seen += 1
            out = model(x)
            loss = F.cross_entropy(out if seen < 11 else out - out.mean(0), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert seen == 12  # 1, 2, 4, 8, (16) are looked at anyway


def test_numbers_that_leave_torch_are_said_not_to_be_seen():
    with pytest.warns(UserWarning, match="was not seen to be computed from the batch"):
        tried(F.cross_entropy, prepare=lambda x, y: (torch.from_numpy(x.numpy() * 2), y))
    with pytest.warns(UserWarning, match="loss was not seen to be computed from the batch by torch functions"):
        tried(lambda out, y: Negated.apply(F.cross_entropy(out, y)))


def test_transforms_of_torch_func_are_said_not_to_be_seen():
    def loss(out, y):
        return torch.vmap(lambda row: row.square().mean())(out - out.detach().mean(0)).mean()

    with pytest.warns(UserWarning, match=r"torch\.func"):
        tried(loss)


def test_another_model_is_not_trained_on_the_batch_without_noise():
    probe = nn.Linear(5, 5)
    _, model, _, loader = made_private()
    with pytest.raises(DPFastError, match="trained on private data without noise"):  # noqa: PT012
        for x, y in loader:
            out = model(x)
            F.cross_entropy(probe(out.detach()), y).backward()
    assert probe.weight.grad is None


def test_running_statistics_of_another_model_change_once():
    teacher = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(108, momentum=1.0))
    _, _model, _, loader = made_private()
    for x, _y in loader:
        with torch.no_grad():
            teacher(x)
        expected = x.flatten(1).mean(0)
        assert torch.allclose(teacher[1].running_mean, expected, atol=1e-6)
        assert teacher[1].num_batches_tracked == 1
        break


def test_shadows_die_with_their_tensors():
    shadows, t, shadow = Shadows(), torch.ones(3), torch.zeros(3)
    gone = weakref.ref(shadow)
    shadows[t] = shadow
    assert shadows.get(t, None) is shadow
    del shadow
    assert gone() is not None
    del t
    gc.collect()
    assert gone() is None
    assert len(shadows) == 0


def test_a_batch_does_not_outlive_the_users_use_of_it():
    _, model, optimizer, loader = made_private()
    batches = iter(loader)
    x, y = next(batches)
    gone = weakref.ref(x)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    del x, y
    _x, _y = next(batches)
    gc.collect()
    assert gone() is None


# Collating


def padded(items, value=0):
    length = max(len(x) for x, _ in items)
    rows = torch.stack([F.pad(x, (0, length - len(x)), value=value) for x, _ in items])
    return rows, torch.stack([y for _, y in items])


def padded_left(items):
    length = max(len(x) for x, _ in items)
    rows = torch.stack([F.pad(x, (length - len(x), 0)) for x, _ in items])
    return rows, torch.stack([y for _, y in items])


def standardising(items):
    rows = torch.stack([x[:3].float() for x, _ in items])
    return (rows - rows.mean(0)) / (rows.std(0) + 1e-3), torch.stack([y for _, y in items])


def mixing_up(items):
    rows = torch.stack([x[:3].float() for x, _ in items])
    return rows + 0.1 * rows.flip(0), torch.stack([y for _, y in items])


def counted_from(start):
    def collate(items):
        so_far = sum(int(x[:3].sum()) for x, _ in items)
        return torch.stack([start + so_far + y for _, y in items]), torch.stack([y for _, y in items])

    return collate


def in_numpy(kind):
    def collate(items):
        rows = np.stack([x[:3].float().numpy() for x, _ in items])
        return kind(rows - rows.mean(0)), torch.stack([y for _, y in items])

    return collate


def beside_times(items):
    """In a list of rows, and alone."""
    rows = [torch.tensor([1e9, 2e9, float(x[0])]) for x, _ in items]
    mean = torch.stack(rows).mean(0)
    return [row - mean * torch.tensor([0, 0, 1]) for row in rows], torch.stack([y for _, y in items])


def alone_beside_times(items):
    return torch.stack([y for _, y in items]), torch.tensor([1e9, 2e9, sum(float(x[0]) for x, _ in items)])


def as_objects(rows):
    return rows.astype("O")


def as_structures(rows):
    return rows.view([(name, rows.dtype) for name in "abc"])[:, 0]


def as_structure(rows):
    return as_structures(rows)[0]


def as_times(rows):
    return (1e6 * rows).astype("i8").astype("M8[us]")


def as_durations(rows):
    return list((1e6 * rows[0]).astype("i8").astype("m8[s]"))


def as_a_mask(rows):
    return np.ma.masked_array(np.ones_like(rows), rows > 0)


def with_a_number(kind):
    def collate(items):
        x, y = padded([(x[:3], y) for x, y in items])
        return x, y, kind(x.sum().item())

    return collate


def repeated(items):
    """Each example as often as there are examples, which a model would take for rows."""
    return [x[:3].expand(len(items), -1) for x, _ in items], torch.stack([y for _, y in items])


def of_each(row):
    """In a list with a row for each example."""

    def collate(items):
        total = sum(int(x[0]) for x, _ in items)
        return [row(total) for _ in items], torch.stack([y for _, y in items])

    return collate


def sometimes(total):
    return [None if total >> bit & 1 else 1.0 for bit in range(8)]


def turned(items):
    rows = torch.stack([x[:3].float() for x, _ in items])
    return torch.complex(rows, rows - rows.mean(0)), torch.stack([y for _, y in items])


def with_nothing_known(items):
    x, y = padded([(x.float(), y) for x, y in items], value=torch.nan)
    arrays = [
        np.stack([x[:3].numpy() for x, _ in items]).astype(kind) for kind in (">f4", "f4", "g", "G", "O", "U", "M8[s]")
    ]
    arrays[1].setflags(write=False)
    arrays += [as_structures(arrays[1]), as_a_mask(arrays[1] - 4)]
    numbers = [np.float32(0.5), True, np.array(x.shape[1]), np.longdouble(0.1), np.datetime64("NaT"), np.array(None)]
    rows = [list(arrays[0]), list(as_structures(arrays[1]))]
    return x, y, [torch.nan] * len(items), torch.nan, arrays[:5], arrays[5:], numbers, rows


def centred(x):
    """At each one's own mean, which rounds by how long the batch is."""
    mask = x > 0
    return (x - x.sum(1, keepdim=True) / mask.sum(1, keepdim=True)) * mask


def as_fractions(items):
    x, y = padded([(x.float(), y) for x, y in items])
    x = centred(x)
    return x / (1 + x.square().sum(1, keepdim=True)).sqrt(), y


def constant_channels(items):
    """Beside others: what is left of them is rounding."""
    x, y = padded([(x.float(), y) for x, y in items])
    return torch.stack([centred(x), centred(37.3 * (x > 0))], -1), y


def masking(items):
    rows, y = padded([(x[:3], y) for x, y in items])
    return torch.where(torch.rand(rows.shape) < 0.2, 0, rows), y


class Texts(torch.utils.data.Dataset):
    def __init__(self):
        torch.manual_seed(0)
        self.items = [(torch.randint(1, 9, (3 + i % 5,)), torch.tensor(i % 3)) for i in range(40)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def collated(collate, workers=0):
    return made_private(Texts(), nn.Linear(1, 1), batch_size=20, collate_fn=collate, num_workers=workers)[-1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "collate",
    [
        *(standardising, mixing_up, turned, beside_times, alone_beside_times),
        *map(in_numpy, (np.array, as_objects, as_structures, as_structure, as_times, as_durations, as_a_mask)),
        *(counted_from(start) for start in (18 * 10**8, 18 * 10**17, torch.tensor(1.8e9, dtype=torch.float64))),
        of_each(lambda total: [0.1, 10**15 + total]),
        of_each(lambda total: [None, 2**52 + total]),
        of_each(lambda total: [0.5, 1e6 + total]),
        repeated,
        *(with_a_number(kind) for kind in (int, float, complex, np.float32, Decimal, sometimes)),
    ],
    ids=lambda f: f.__name__,
)
def test_a_collate_function_that_mixes_examples_is_refused(collate, workers):
    with pytest.raises(PrivacyError, match="collate_fn: what it makes of one example depends on others"):
        list(collated(collate, workers))


@pytest.mark.filterwarnings("ignore:collate_fn pads to the longest")  # masked at random
@pytest.mark.parametrize(
    "collate",
    [padded, padded_left, with_nothing_known, as_fractions, constant_channels, masking],
    ids=lambda f: f.__name__,
)
def test_a_collate_function_that_pads_or_masks_is_not_refused(collate):
    assert len(list(collated(collate))) == 2
