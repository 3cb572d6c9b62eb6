"""Pre-trained networks: from a diffusers folder, and for other labels."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dpfast.errors import ConfigError, FileError
from dpfast.files import is_there, read_json
from dpfast.seeding import seeded

if TYPE_CHECKING:
    from diffusers import UNet2DModel


def load_unet(folder: str | Path) -> "UNet2DModel":
    """The UNet2DModel that ``save_pretrained`` wrote there, alone or as the ``unet`` of a pipeline, in eval mode.

    Weights come from safetensors, which hold numbers and no code; nothing is looked up elsewhere. Raises ``FileError``
    where the folder holds something else, or not every weight of the network.
    """
    from diffusers import UNet2DModel

    folder = Path(folder)
    folder = folder / "unet" if is_there(folder / "model_index.json") else folder
    _check_class(folder)
    network: Any = UNet2DModel
    try:
        model, found = network.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise FileError(f"{folder} holds no UNet2DModel in safetensors that can be loaded: {error}") from error
    problems = [f"{what.replace('_', ' ')}: {', '.join(map(str, names))}" for what, names in found.items() if names]
    if problems:
        raise FileError(f"{folder}: the weights are not those of its config.json ({'; '.join(problems)})")
    model.register_to_config(_name_or_path="")  # else saving it would tell where it was loaded from
    loaded: UNet2DModel = model.eval()
    return loaded


def _check_class(folder: Path) -> None:
    name = read_json(folder / "config.json", cure="give a folder that save_pretrained wrote").get("_class_name")
    if name != "UNet2DModel":
        raise FileError(f"{folder} holds a {name}; expected a UNet2DModel, which denoises images given their class")


def relabel(model: "UNet2DModel", num_classes: int, *, seed: int) -> "UNet2DModel":
    """Give ``model`` a class embedding for ``num_classes`` new labels and the null class (the last); all else stays.

    A network that knew labels gets random entries from ``seed``, as large as the old ones (their root mean square), so
    that what is added to the timestep's embedding is of the size it knows. One that knew none gets zeros: its outputs
    stay what they were until training moves them.

    Returns ``model``, changed in place. Raises ``ConfigError`` if it has no timestep embedding to add to, or
    ``num_classes`` is less than 1.
    """
    if num_classes < 1:
        raise ConfigError(f"relabel(num_classes={num_classes}): expected 1 or more")
    try:
        like: torch.Tensor = model.time_embedding.linear_2.weight
    except AttributeError as error:
        raise ConfigError(f"relabel: a {type(model).__name__} has no time_embedding; expected a UNet2DModel") from error
    old = model.class_embedding
    size = old.weight.detach().square().mean().sqrt() if isinstance(old, nn.Embedding) else torch.zeros(())
    with seeded(seed):
        new = nn.Embedding(num_classes + 1, like.shape[0])
    with torch.no_grad():
        new.weight *= size.cpu()
    model.class_embedding = new.to(device=like.device, dtype=like.dtype).train(model.training)
    config: Any = model
    config.register_to_config(num_class_embeds=num_classes + 1, class_embed_type=None)
    return model
