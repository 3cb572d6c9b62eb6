"""Train a diffusion model on a folder of images, with accelerate and diffusers.

    accelerate launch train_unconditional.py --train_data_dir photos --resolution 64 --output_dir ddpm-photos
    accelerate launch train_unconditional.py         # on generated images

In the shape of diffusers' script of the same name. `train_unconditional.py` is the ordinary script,
`train_unconditional_private.py` the same one under differential privacy.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from dpfast import PrivacyEngine
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, help="a folder of images; generated ones otherwise")
    parser.add_argument("--num_generated", type=int, default=1000, help="how many images to generate")
    parser.add_argument("--output_dir", type=Path, default=Path("ddpm-model"))
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--train_batch_size", type=int, default=32)
    parser.add_argument("--eval_batch_size", type=int, default=16)
    parser.add_argument("--num_epochs", type=int, default=20)
    parser.add_argument("--save_images_epochs", type=int, default=10)
    parser.add_argument("--checkpointing_steps", type=int, default=500)
    parser.add_argument("--resume_from_checkpoint", type=Path, help="a folder checkpoint-N")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument("--ema_max_decay", type=float, default=0.999)
    parser.add_argument("--ddpm_num_steps", type=int, default=1000)
    parser.add_argument("--ddpm_num_inference_steps", type=int, default=100)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    return parser.parse_args(argv)


def generate(count, resolution):
    """Pictures of one disc each, on a darker ground."""
    chance = random.Random(1)
    for _ in range(count):
        image = Image.new("RGB", (resolution, resolution), tuple(chance.choices(range(80), k=3)))
        radius = chance.uniform(0.15, 0.3) * resolution
        x, y = (chance.uniform(radius, resolution - radius) for _ in range(2))
        colour = tuple(chance.choices(range(120, 256), k=3))
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        yield image


class Images(Dataset):
    """Images as float32 [3, resolution, resolution] in [-1, 1], every second time as in a mirror."""

    def __init__(self, images, resolution):
        images = [image.convert("RGB").resize((resolution, resolution)) for image in images]
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index] / 127.5 - 1
        return {"input": image.flip(-1) if torch.rand(()) < 0.5 else image}


def save_images(images, path):
    """Arrays [N, H, W, 3] in [0, 1], side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.hstack((images * 255).round().astype("uint8"))).save(path)


def main(argv=None):
    args = parse_args(argv)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps, mixed_precision=args.mixed_precision
    )

    model = UNet2DModel(
        sample_size=args.resolution,
        block_out_channels=args.block_out_channels,
        down_block_types=["DownBlock2D"] * (len(args.block_out_channels) - 1) + ["AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D"] + ["UpBlock2D"] * (len(args.block_out_channels) - 1),
        layers_per_block=1,
        norm_num_groups=8,
    )
    ema_model = EMAModel(
        model.parameters(),
        decay=args.ema_max_decay,
        use_ema_warmup=True,
        model_cls=UNet2DModel,
        model_config=model.config,
    )
    noise_scheduler = DDPMScheduler(num_train_timesteps=args.ddpm_num_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    files = sorted(args.train_data_dir.iterdir()) if args.train_data_dir else None
    images = map(Image.open, files) if files else generate(args.num_generated, args.resolution)
    dataset = Images(images, args.resolution)
    train_dataloader = DataLoader(dataset, batch_size=args.train_batch_size, shuffle=True)
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.num_epochs * num_update_steps_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )

    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    engine = PrivacyEngine(ledger=args.output_dir / "ledger.jsonl")  # after prepare(), which sees to device and dtype
    budget = {"target_epsilon": 8.0, "target_delta": 1e-5, "max_grad_norm": 1.0, "epochs": args.num_epochs}
    model, optimizer, train_dataloader = engine.make_private_with_epsilon(
        module=model, optimizer=optimizer, data_loader=train_dataloader, **budget
    )
    accelerator.register_for_checkpointing(ema_model)
    ema_model.to(accelerator.device)

    global_step = 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        global_step = optimizer.steps_taken  # also those after the checkpoint, which are lost and stay charged

    progress_bar = tqdm(total=max_train_steps, initial=global_step, disable=not accelerator.is_local_main_process)
    for epoch in range(global_step // num_update_steps_per_epoch, args.num_epochs):
        model.train()
        for batch in train_dataloader:
            clean_images = batch["input"]
            noise = torch.randn_like(clean_images)
            timesteps = torch.randint(0, args.ddpm_num_steps, (len(clean_images),), device=clean_images.device)
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)

            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps).sample
                loss = F.mse_loss(model_output.float(), noise)
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
                progress_bar.update(1)
                global_step += 1
                if global_step % args.checkpointing_steps == 0 and accelerator.is_main_process:
                    accelerator.save_state(args.output_dir / f"checkpoint-{global_step}")
            if global_step >= max_train_steps:
                break

        progress_bar.set_postfix(epsilon=engine.get_epsilon(1e-5), lr=lr_scheduler.get_last_lr()[0])
        if accelerator.is_main_process and ((epoch + 1) % args.save_images_epochs == 0 or epoch + 1 == args.num_epochs):
            unet = UNet2DModel.from_config(ema_model.model_config).to(accelerator.device)
            ema_model.copy_to(unet.parameters())
            pipeline = DDPMPipeline(unet=unet, scheduler=noise_scheduler)
            pipeline.set_progress_bar_config(disable=True)
            steps = {"num_inference_steps": args.ddpm_num_inference_steps}
            images = pipeline(batch_size=args.eval_batch_size, output_type="np", **steps).images
            save_images(images, args.output_dir / "samples" / f"{epoch + 1:04d}.png")
            pipeline.save_pretrained(args.output_dir)
    accelerator.end_training()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
