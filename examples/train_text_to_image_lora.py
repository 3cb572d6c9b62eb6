"""Fine-tune a text-to-image model with low-rank adapters (LoRA), with accelerate, diffusers and peft.

    accelerate launch train_text_to_image_lora.py --pretrained_model_name_or_path stable-diffusion \\
        --train_data_dir photos --resolution 512   # images, and their texts in files of the same name (1.png, 1.txt)
    accelerate launch train_text_to_image_lora.py  # a tiny model of random weights, generated images and captions

In the shape of diffusers' script of the same name. `train_text_to_image_lora.py` is the ordinary script,
`train_text_to_image_lora_private.py` the same one under differential privacy: only the adapters are trained, so only
their gradients are clipped and noised.
"""

import argparse
import math
import random
import string
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

COLOURS, SHAPES = ("red", "green", "blue", "white", "black"), ("ellipse", "rectangle")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", help="a tiny model of random weights otherwise")
    parser.add_argument("--train_data_dir", type=Path, help="images and texts; generated ones otherwise")
    parser.add_argument("--num_generated", type=int, default=500, help="how many images to generate")
    parser.add_argument("--validation_prompt", default="a red ellipse on blue")
    parser.add_argument("--output_dir", type=Path, default=Path("lora-model"))
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--num_train_epochs", type=int, default=10)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--lr_warmup_steps", type=int, default=0)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_models(path):
    """Tokenizer, text encoder, autoencoder, UNet and noise schedule, of a folder or tiny ones of random weights."""
    if path:
        tokenizer = CLIPTokenizer.from_pretrained(path, subfolder="tokenizer")
        parts = {"text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
        loaded = (kind.from_pretrained(path, subfolder=name) for name, kind in parts.items())
        return tokenizer, *loaded, DDPMScheduler.from_pretrained(path, subfolder="scheduler")
    letters = [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]  # a token is a letter
    vocabulary = {token: number for number, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    tokenizer = CLIPTokenizer(vocabulary, merges=[], model_max_length=32)
    text_config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        layers_per_block=1,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return tokenizer, CLIPTextModel(text_config), vae, unet, scheduler


def generate(count, resolution):
    """(image, caption) pairs: "a red ellipse on blue" and the like."""
    chance = random.Random(1)
    for _ in range(count):
        (colour, ground), shape = chance.sample(COLOURS, 2), chance.choice(SHAPES)
        image = Image.new("RGB", (resolution, resolution), ground)
        corners = [chance.uniform(*share) * resolution for share in ((0.1, 0.3),) * 2 + ((0.6, 0.9),) * 2]
        getattr(ImageDraw.Draw(image), shape)(corners, fill=colour)
        yield image, f"a {colour} {shape} on {ground}"


def read(folder):
    texts = sorted(folder.glob("*.txt"))
    for text in texts:
        (image,) = (file for file in folder.glob(f"{text.stem}.*") if file != text)
        yield Image.open(image).convert("RGB"), text.read_text().strip()


class Captioned(Dataset):
    """Images [3, resolution, resolution] in [-1, 1] and the token numbers of their captions."""

    def __init__(self, pairs, resolution, tokenizer):
        images, captions = zip(*pairs, strict=True)
        images = np.stack([image.resize((resolution, resolution)) for image in images])
        self.images = torch.from_numpy(images).permute(0, 3, 1, 2)
        length = tokenizer.model_max_length
        found = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        self.input_ids = found.input_ids

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index] / 127.5 - 1, "input_ids": self.input_ids[index]}


def main(argv=None):
    args = parse_args(argv)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
    )
    set_seed(args.seed)

    tokenizer, text_encoder, vae, unet, noise_scheduler = load_models(args.pretrained_model_name_or_path)
    for frozen in (text_encoder, vae, unet):
        frozen.requires_grad_(False).to(accelerator.device)
    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    lora_layers = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(lora_layers, lr=args.learning_rate)

    folder = args.train_data_dir
    pairs = read(folder) if folder else generate(args.num_generated, args.resolution)
    dataset = Captioned(pairs, args.resolution, tokenizer)
    train_dataloader = DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.num_train_epochs * num_update_steps_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )

    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        unet, optimizer, train_dataloader, lr_scheduler
    )

    progress_bar = tqdm(total=max_train_steps, disable=not accelerator.is_local_main_process)
    for _ in range(args.num_train_epochs):
        model.train()
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                with torch.no_grad():
                    latents = vae.encode(batch["pixel_values"]).latent_dist.sample() * vae.config.scaling_factor
                    encoder_hidden_states = text_encoder(batch["input_ids"])[0]
                noise = torch.randn_like(latents)
                num_steps = noise_scheduler.config.num_train_timesteps
                timesteps = torch.randint(0, num_steps, (len(latents),), device=latents.device)
                noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)

                model_pred = model(noisy_latents, timesteps, encoder_hidden_states).sample
                loss = F.mse_loss(model_pred.float(), noise)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(lora_layers, 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                progress_bar.update(1)
        progress_bar.set_postfix(loss=loss.item(), lr=lr_scheduler.get_last_lr()[0])

    if accelerator.is_main_process:
        unet.eval()
        lora_state_dict = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=lora_state_dict)
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler.from_config(noise_scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        (image,) = pipeline(args.validation_prompt, num_inference_steps=args.num_inference_steps).images
        image.save(args.output_dir / "validation.png")
        print(f"adapters and an image of {args.validation_prompt!r}: {args.output_dir}")
    accelerator.end_training()
    return unet


if __name__ == "__main__":
    main()
