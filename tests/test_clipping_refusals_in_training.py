"""What DPTrainer tells the user to do, where it refuses or warns."""

import re

import pytest
import torch

from dpfast import DPTrainer
from dpfast.errors import CaptureError, CheckpointError, ConfigError, PrivacyError
from test_trainer import EXAMPLES, fit_without, images, network, objective, plan, sgd, trainer


def of_another_data_set():
    DPTrainer(network(), images(), plan(dataset_size=13), objective=objective, optimizer=sgd)


def with_an_optimizer():
    model = network()
    trainer(model, optimizer=torch.optim.Adam(model.parameters()))


def out_of_memory(*_):
    raise torch.OutOfMemoryError("none left")


def without_memory():
    t = trainer()
    t.objective = out_of_memory
    t._accumulate(1, torch.arange(EXAMPLES), torch.ones(EXAMPLES, dtype=torch.bool))


def standardised(model, pixels, labels, keys):
    losses = objective(model, pixels, labels, keys)
    return losses / losses.detach().std()


def joined_by_a_sum():
    def spoiled(model, rows, keys):
        return model(rows.repeat_interleave(keys.augmult, 0)).square().mean(1) + 0 * rows.sum()

    rows = list(torch.ones(EXAMPLES, 4))
    DPTrainer(torch.nn.Linear(4, 3), rows, plan(), objective=spoiled, optimizer=sgd).fit()


REFUSED = {  # what runs, the error, what is wrong and the cure
    "data set": (of_another_data_set, PrivacyError, r"made for 13: make the plan with dataset_size=len\(dataset\)"),
    "ema_decay": (lambda: trainer(ema_decay=1.0), ConfigError, r"ema_decay=1\.0: expected 0 <= decay < 1, or None"),
    "optimizer": (with_an_optimizer, ConfigError, r"like torch\.optim\.Adam or lambda parameters: .* got a Adam"),
    "memory": (without_memory, ConfigError, "one row of one example does not fit .*: train a smaller model"),
    "mixing": (
        lambda: trainer(objective=standardised).fit(),
        CaptureError,
        r"changes the loss of another\. Use no statistics of the batch .*; draw random numbers from the keys",
    ),
    "infinities": (
        joined_by_a_sum,
        CaptureError,
        r"not finite makes the losses of others so\. Keep the rows .*, or replace such numbers first \(torch\.nan_to",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_cures_of_training(name) -> None:
    run, error, told = REFUSED[name]
    with pytest.raises(error) as caught:
        run()
    assert re.search(told, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("gone", "error", "told"),
    [
        (
            "checkpoint",
            CheckpointError,
            "the checkpoint is gone: .* Restore it, or begin anew in another folder, with a budget that adds",
        ),
        (
            "ledger.jsonl",
            PrivacyError,
            "the ledger was cut or replaced. Restore the ledger .*, or begin anew in another",
        ),
    ],
)
def test_cures_of_a_folder_that_lacks_a_file(gone, error, told, tmp_path) -> None:
    with pytest.raises(error, match=told):
        fit_without(gone, tmp_path).fit()


def test_an_objective_that_draws_its_own_numbers_is_said() -> None:
    generator = torch.Generator()

    def noisy(model, pixels, labels, keys):
        return objective(model, pixels, labels, keys) * torch.rand((), generator=generator)

    with pytest.warns(
        UserWarning, match=r"objective keeps examples apart: .* \(random numbers that are not of the keys"
    ):
        trainer(objective=noisy)._show_objective()
