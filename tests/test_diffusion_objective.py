"""Losses per row, public pre-training and its resumption."""

import dataclasses

import pytest
import torch
from torch import nn

from dpfast.data import Augment, RowKeys, font_digits
from dpfast.data.images import to_signed
from dpfast.diffusion import DiffusionObjective, NoiseSpec, UNetSpec, build_scheduler, build_unet
from dpfast.diffusion.pretrain import PretrainSpec, pretrain
from dpfast.errors import CheckpointError, ConfigError, DataError

TINY = UNetSpec(widths=(8, 8), norm_groups=4)


class Recorder(nn.Module):
    """A model that predicts zero and remembers what it was asked."""

    def forward(self, noisy, t, labels):
        self.noisy, self.t, self.labels = noisy, t, labels
        return torch.zeros_like(noisy)


def keys(ids=(4, 2, 9), step=1, augmult=4) -> RowKeys:
    return RowKeys(7, torch.tensor(ids, dtype=torch.int64), step, augmult)


def objective(prediction="v_prediction", **options) -> DiffusionObjective:
    scheduler = build_scheduler(NoiseSpec(prediction_type=prediction))
    return DiffusionObjective(scheduler=scheduler, num_classes=10, **options)


@pytest.fixture(scope="module")
def fonts():
    return font_digits(64, seed=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_mean_squared_error_of_the_target(fonts, prediction):
    model, chosen = Recorder(), keys()
    value = objective(prediction)
    losses = value(model, fonts.images[:3], fonts.labels[:3], chosen)
    clean = to_signed(fonts.images[:3]).repeat_interleave(4, dim=0)
    signal = value.scheduler.alphas_cumprod[model.t].sqrt()[:, None, None, None]
    sigma = (1 - signal**2).sqrt()
    noise = (model.noisy - signal * clean) / sigma
    targets = {"epsilon": noise, "sample": clean, "v_prediction": signal * noise - sigma * clean}
    expected = targets[prediction].square().mean((1, 2, 3))
    assert losses.shape == (12,)
    # The test recovers the noise by a division by sigma, at least 0.006: two roundings of 6e-8 grow to 1e-4.
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)


def test_batches_that_do_not_fit(fonts):
    model, images, labels = build_unet(TINY, seed=0), fonts.images[:3], fonts.labels[:3]
    with pytest.raises(DataError, match=r"images are torch\.float32 with 4 dimensions; expected torch\.uint8"):
        objective()(model, images / 255, labels, keys())
    with pytest.raises(DataError, match=r"images are torch\.uint8 with 3 dimensions"):
        objective()(model, images[:, 0], labels, keys())
    with pytest.raises(DataError, match=r"labels are torch\.float32 with 1 dimensions; expected torch\.int64"):
        objective()(model, images, labels.float(), keys())
    few = build_unet(dataclasses.replace(TINY, num_classes=9), seed=0)
    assert objective()(few, images, labels, keys()).shape == (12,)
    with pytest.raises(DataError, match=r"num_class_embeds=10; expected 11: .* one for a dropped label"):
        objective(label_drop=0.1)(few, images, labels, keys())


def test_rows_follow_the_example_not_its_place(fonts):
    model = build_unet(TINY, seed=0)
    value = objective(label_drop=0.3, augment=Augment(shift=1))
    whole = value(model, fonts.images[:3], fonts.labels[:3], keys((4, 2, 9)))
    part = value(model, fonts.images[[2, 0]], fonts.labels[[2, 0]], keys((9, 4)))
    torch.testing.assert_close(part, whole.view(3, 4)[[2, 0]].flatten(), rtol=1e-5, atol=1e-6)


def test_empty_batch(fonts):
    losses = objective(augment=Augment(shift=1, flip=True))(
        build_unet(TINY, seed=0), fonts.images[:0], fonts.labels[:0], keys(())
    )
    assert losses.shape == (0,)


def test_labels_drop_to_the_null_class_at_the_stated_rate(fonts):
    value = objective(label_drop=0.25)
    labels = torch.full((2000,), 3)
    rows = value.drop_labels(labels, RowKeys(0, torch.arange(2000), 0, 2))
    assert set(rows.unique().tolist()) == {3, 10}
    # Four standard errors.
    assert abs(float((rows == 10).float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(objective().drop_labels(labels, keys(range(2000), augmult=1)), labels)


def test_bad_options():
    with pytest.raises(ConfigError, match="label_drop"):
        objective(label_drop=1.5)
    with pytest.raises(ConfigError, match=r"multiples of norm_groups.*halved"):
        UNetSpec(widths=(12, 16, 16, 16, 16), norm_groups=8)


def test_unet_is_fixed_by_its_seed_and_knows_the_null_class():
    state = torch.get_rng_state()
    first, again, other = (build_unet(TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))
    assert first.class_embedding.weight.shape[0] == 11


class StopError(Exception):
    pass


def stop_at(step):
    def progress(done, total, message):
        if done == step:
            raise StopError

    return progress


def test_interrupted_pretraining_ends_with_the_same_weights(fonts, tmp_path):
    spec = PretrainSpec(steps=9, batch_size=8, checkpoint_every=3)
    straight = build_unet(TINY, seed=0)
    state = torch.get_rng_state()
    losses = pretrain(straight, objective(), fonts, spec)
    assert torch.equal(torch.get_rng_state(), state)
    path = tmp_path / "pretrain.ckpt"
    with pytest.raises(StopError):
        pretrain(build_unet(TINY, seed=0), objective(), fonts, spec, checkpoint=path, progress=stop_at(5))
    resumed = build_unet(TINY, seed=5)  # all weights come from the file
    seen = []
    again = pretrain(
        resumed, objective(), fonts, spec, checkpoint=path, progress=lambda step, total, _: seen.append((step, total))
    )
    assert seen[0] == (4, 9)
    assert seen[-1] == (9, 9)
    assert losses == again
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_foreign_pretraining_checkpoint_is_refused(fonts, tmp_path):
    path = tmp_path / "pretrain.ckpt"
    spec = PretrainSpec(steps=2, batch_size=4, checkpoint_every=1)
    pretrain(build_unet(TINY, seed=0), objective(), fonts, spec, checkpoint=path, fingerprint="a")
    with pytest.raises(CheckpointError):
        pretrain(build_unet(TINY, seed=0), objective(), fonts, spec, checkpoint=path, fingerprint="b")


def test_pretraining_learns(fonts):
    spec = PretrainSpec(steps=40, batch_size=16, learning_rate=1e-2)
    losses = pretrain(build_unet(TINY, seed=0), objective(), fonts, spec)
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])
