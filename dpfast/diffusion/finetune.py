"""Other ways to fine-tune privately: which parameters move. Call one before the clipper, or the trainer, is made.

Frozen parameters need neither clipping nor noise: the noise's norm grows with the square root of the number of
trainable parameters, the clip norm stays. All of these end in a network that plain diffusers opens.

The whole network under augmentations and biased timesteps (Ghalebikesabi et al., arXiv 2302.13861) needs nothing from
here, nor does noise multiplicity (DPDM: Dockhorn et al., arXiv 2210.09929), which is the same less those two tricks: an
image enters K times, each with another timestep and noise, and the K gradients are averaged before they are clipped::

    objective = DiffusionObjective(scheduler=scheduler, num_classes=10)  # Augment() by default: images as they are
    trainer = DPTrainer(model, data, plan, objective=objective, optimizer=torch.optim.Adam, augmult=K)
"""

import copy
from typing import Any, TypeVar

from torch import nn

from dpfast.errors import ConfigError
from dpfast.seeding import seeded

ATTENTION_MAPS = ("to_q", "to_k", "to_v", "to_out.0")  # linear maps of diffusers' attention

Network = TypeVar("Network", bound=nn.Module)


def attention_only(model: Network, *, class_embedding: bool = False) -> Network:
    """Freeze all but the attention of ``model`` (DP-LDM: Liu, Lyu et al., arXiv 2305.15759): its norms and linear maps.

    class_embedding: whether the table of classes is trained, too, as the paper does where labels are new.

    Returns ``model``, changed in place. Raises ``ConfigError`` if it has no attention of diffusers, or no such table.
    """
    from diffusers.models.attention_processor import Attention

    attention = [module for module in model.modules() if isinstance(module, Attention)]
    if not attention:
        raise ConfigError(f"attention_only: this {type(model).__name__} has no attention of diffusers; train all of it")
    table = _class_embedding(model) if class_embedding else nn.Identity()
    model.requires_grad_(False)
    for module in (*attention, table):
        module.requires_grad_(True)
    return model


def lora(
    model: Network, rank: int, *, alpha: float | None = None, class_embedding: bool = False, seed: int = 0
) -> Network:
    """Freeze ``model`` and put a trainable product of two thin matrices beside each linear map ``W`` of its attention,
    ``W x + alpha / rank * B A x`` (DP-LoRA: Tsai et al., arXiv 2406.01355; LoRA: Hu et al., arXiv 2106.09685).

    rank: of ``B A``. alpha: by default the rank. seed: of A; B begins with zeros, so that nothing changes at first.
    class_embedding: whether the table of classes is trained, too.

    Returns ``model``, changed in place: ``merge`` makes a plain one of it. Raises ``ConfigError`` without peft, and if
    the model has no such maps, has adapters already, or no table of classes.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("lora: low-rank adapters are those of peft; pip install peft") from error
    if rank < 1:
        raise ConfigError(f"lora(rank={rank}): expected 1 or more")
    if _adapters(model):
        raise ConfigError("lora: the model has adapters already; merge(model) makes them part of its weights")
    table = _class_embedding(model) if class_embedding else nn.Identity()
    # The scale is alpha / rank whatever type alpha has; peft's annotation asks for an int.
    settings: Any = {"r": rank, "lora_alpha": rank if alpha is None else alpha, "target_modules": list(ATTENTION_MAPS)}
    try:
        with seeded(seed):  # peft freezes all else
            inject_adapter_in_model(LoraConfig(**settings), model)
    except ValueError as error:
        raise ConfigError(f"lora: this {type(model).__name__} has none of {', '.join(ATTENTION_MAPS)}") from error
    table.requires_grad_(True)
    return model


def merge(model: Network) -> Network:
    """A copy of ``model`` with every adapter of ``lora`` added to the map that it stands beside: plain weights, under
    the names they had before. Outputs stay the same up to rounding. The model itself can go on being trained.
    """
    merged = copy.deepcopy(model)
    for name, adapter in _adapters(merged).items():
        adapter.merge()
        parent, _, own_name = name.rpartition(".")
        setattr(merged.get_submodule(parent), own_name, adapter.get_base_layer())
    vars(merged).pop("peft_config", None)
    return merged


def _adapters(model: nn.Module) -> dict[str, Any]:
    """Those of peft, by the name of the map that they stand beside."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}


def _class_embedding(model: nn.Module) -> nn.Module:
    table = getattr(model, "class_embedding", None)
    if not isinstance(table, nn.Module):
        raise ConfigError(
            f"class_embedding=True: this {type(model).__name__} knows no classes; relabel(model, ...) first"
        )
    return table
