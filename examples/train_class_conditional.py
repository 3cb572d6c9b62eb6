"""Train a class-conditional diffusion model, sampled with classifier-free guidance, with accelerate and diffusers.

    accelerate launch train_class_conditional.py --train_data_dir photos   # a folder of images for each class
    accelerate launch train_class_conditional.py                           # on the digits of scikit-learn

`train_class_conditional.py` is the ordinary script, `train_class_conditional_private.py` the same one under
differential privacy.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_data_dir", type=Path, help="a folder of folders of images; scikit-learn's otherwise")
    parser.add_argument("--output_dir", type=Path, default=Path("class-conditional-model"))
    parser.add_argument("--resolution", type=int, default=8)
    parser.add_argument("--block_out_channels", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--num_epochs", type=int, default=40)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--lr_scheduler", default="cosine")
    parser.add_argument("--lr_warmup_steps", type=int, default=50)
    parser.add_argument("--label_dropout", type=float, default=0.1, help="share of images that are trained without")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--ema_max_decay", type=float, default=0.999)
    parser.add_argument("--ddpm_num_steps", type=int, default=1000)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def load_images(folder, resolution):
    """Images [N, 3, resolution, resolution] in [-1, 1], labels [N] and the names of the classes."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files = [(label, file) for label, name in enumerate(classes) for file in sorted((folder / name).iterdir())]
    images = [Image.open(file).convert("RGB").resize((resolution, resolution)) for _, file in files]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    return pixels, torch.tensor([label for label, _ in files]), classes


def digits(resolution):
    """Handwritten digits [N, 1, resolution, resolution] in [-1, 1], their labels and their names."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 8 - 1
    return F.interpolate(images, resolution), torch.from_numpy(found.target), [str(digit) for digit in range(10)]


@torch.no_grad()
def sample(unet, scheduler, labels, guidance_scale, num_inference_steps):
    """An image in [-1, 1] for each label; the last class is "none"."""
    none = torch.full_like(labels, unet.config.num_class_embeds - 1)
    images = torch.randn(len(labels), unet.config.in_channels, *[unet.config.sample_size] * 2, device=labels.device)
    scheduler.set_timesteps(num_inference_steps)
    for t in tqdm(scheduler.timesteps, desc="sampling", leave=False):
        with_label, without = unet(torch.cat([images, images]), t, torch.cat([labels, none])).sample.chunk(2)
        images = scheduler.step(without + guidance_scale * (with_label - without), t, images).prev_sample
    return images.clamp(-1, 1)


def main(argv=None):
    args = parse_args(argv)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",
        project_dir=args.output_dir,
    )
    accelerator.init_trackers("logs")
    set_seed(args.seed)

    folder = args.train_data_dir
    images, labels, classes = load_images(folder, args.resolution) if folder else digits(args.resolution)
    train_dataloader = DataLoader(TensorDataset(images, labels), batch_size=args.train_batch_size, shuffle=True)
    model = UNet2DModel(
        sample_size=args.resolution,
        in_channels=images.shape[1],
        out_channels=images.shape[1],
        block_out_channels=args.block_out_channels,
        down_block_types=["DownBlock2D"] * len(args.block_out_channels),
        up_block_types=["UpBlock2D"] * len(args.block_out_channels),
        layers_per_block=1,
        norm_num_groups=8,
        num_class_embeds=len(classes) + 1,
    )
    ema_model = EMAModel(model.parameters(), args.ema_max_decay, model_cls=UNet2DModel, model_config=model.config)
    noise_scheduler = DDPMScheduler(num_train_timesteps=args.ddpm_num_steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    num_update_steps_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    max_train_steps = args.num_epochs * num_update_steps_per_epoch
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )

    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    ema_model.to(accelerator.device)

    global_step = 0
    progress_bar = tqdm(total=max_train_steps, disable=not accelerator.is_local_main_process)
    for _ in range(args.num_epochs):
        model.train()
        for clean_images, class_labels in train_dataloader:
            rows, device = len(clean_images), clean_images.device
            noise = torch.randn_like(clean_images)
            timesteps = torch.randint(0, args.ddpm_num_steps, (rows,), device=device)
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)
            dropped = torch.rand(rows, device=device) < args.label_dropout
            class_labels = class_labels.masked_fill(dropped, len(classes))

            with accelerator.accumulate(model):
                model_output = model(noisy_images, timesteps, class_labels).sample
                loss = F.mse_loss(model_output.float(), noise, reduction="none").mean((1, 2, 3)).mean()
                accelerator.backward(loss)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if accelerator.sync_gradients:
                ema_model.step(model.parameters())
                progress_bar.update(1)
                global_step += 1
                accelerator.log({"loss": loss.item(), "lr": lr_scheduler.get_last_lr()[0]}, step=global_step)

    if accelerator.is_main_process:
        unet = accelerator.unwrap_model(model)
        ema_model.copy_to(unet.parameters())
        scheduler = DDIMScheduler.from_config(noise_scheduler.config, timestep_spacing="trailing")
        unet.save_pretrained(args.output_dir / "unet")
        scheduler.save_pretrained(args.output_dir / "scheduler")
        wanted = torch.arange(len(classes), device=accelerator.device)
        pictures = sample(unet.eval(), scheduler, wanted, args.guidance_scale, args.num_inference_steps)
        rows = ((pictures + 1) * 127.5).round().byte().cpu().permute(0, 2, 3, 1).numpy()
        Image.fromarray(np.hstack(rows).squeeze()).save(args.output_dir / "samples.png")
        print(f"one image for each of {', '.join(classes)}: {args.output_dir / 'samples.png'}")
    accelerator.end_training()
    return accelerator.unwrap_model(model)


if __name__ == "__main__":
    main()
