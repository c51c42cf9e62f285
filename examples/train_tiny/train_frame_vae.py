"""Trains the image VAE of tiny-animatediff on frames drawn on the fly, and measures it on held-out clips.

    python examples/train_tiny/train_frame_vae.py --run runs/animatediff --seconds 130

Shape letters: B clips, T frames of each, N = B * T images, C latent channels, H x W pixels.
"""

import json

import numpy as np
import torch
from data import Size, layouts, mixed_layouts
from diffusers import AutoencoderKL
from evaluate import vae_psnr
from render import render
from scenes import held_out_scenes, sample_scene
from tiny_animatediff import DEMO, LARGEST, encode, new_vae, standardise
from torch import nn
from training import Budget, Course, Log, Trainer, graphed_steps, half_call, options, prepare, train

PEAK_RATE = 8e-4
SQUARED_WEIGHT = 5.0  # of the squared error beside the absolute one
KL_WEIGHT = 3e-4

COURSES = (
    Course(size=Size(frames=4, height=128, width=128), batch=16, share=0.7, start=0.0),
    Course(size=Size(frames=2, height=256, width=256), batch=8, share=0.3, start=0.3),
)
SMOKE = (Course(size=Size(frames=2, height=32, width=32), batch=2, share=1.0, start=0.0),)


class Codec(nn.Module):
    """`AutoencoderKL` with its own weights, from images to images and to the latents on the way."""

    def __init__(self, vae: AutoencoderKL):
        super().__init__()
        self.vae = vae

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images [N, 3, H, W] in -1..1 -> the same decoded, mean and log variance of the latents, [N, C, H / 8, W / 8] each."""
        moments = self.vae.quant_conv(self.vae.encoder(images))
        mean, log_variance = moments.float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)
        latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        decoded = self.vae.decoder(self.vae.post_quant_conv(latents.to(moments.dtype)))
        return decoded.float(), mean, log_variance


def vae_step(codec: Codec, trainer: Trainer, size: Size, kl_weight: float):
    """The training step of one size: draws the clips, encodes, decodes, and descends."""

    def step(things: torch.Tensor, background: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            clips = render(things, background, size.frames, size.height, size.width)
            images, weight = (clip.transpose(1, 2).flatten(0, 1) for clip in clips)
            weight = weight / weight.mean()
        decoded, mean, log_variance = half_call(codec, images)
        error = decoded - images
        picture = (weight * (error.abs() + SQUARED_WEIGHT * error.square())).mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        norm = trainer.descend(picture + kl_weight * kl)
        return {"loss": picture.detach(), "mse": error.detach().square().mean(), "kl": kl.detach(), "norm": norm}

    return step


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, rng: np.random.Generator, sizes: tuple[Size, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation [C] of the latents of captioned training clips."""
    latents = []
    for size in sizes:
        for _ in range(16):
            things, background = layouts([sample_scene(rng)], rng, size, vae.device)
            video, _ = render(things, background, size.frames, size.height, size.width)
            latents.append(encode(vae, video).transpose(0, 1).flatten(1))
    deviation, mean = torch.std_mean(torch.cat(latents, 1), dim=1)
    return mean, deviation


def main() -> None:
    parser = options(__doc__, seconds=130, peak_rate=PEAK_RATE)
    parser.add_argument("--kl-weight", type=float, default=KL_WEIGHT, help="more of it, and latents hold less")
    args = parser.parse_args()
    device = prepare(args.seed)
    courses = SMOKE if args.smoke else COURSES

    vae = new_vae().to(device)
    codec = Codec(vae)
    trainer = Trainer({"vae": vae}, decay=0.998)
    checkpoint = args.run / "vae.pt"
    budget = Budget(args.seconds, trainer.load(checkpoint) if args.resume else 0.0)
    rng = np.random.default_rng((args.seed, trainer.steps))
    graphed = device.type == "cuda" and not args.eager
    steps = graphed_steps(lambda course: vae_step(codec, trainer, course.size, args.kl_weight), courses, graphed)

    def step(course: Course) -> dict[str, torch.Tensor]:
        things, background = mixed_layouts(course.batch, rng, course.size, device)
        return steps[course](things=things, background=background)

    log = Log(args.run / "vae.csv", ("step", "seconds", "size", "loss", "mse", "kl", "norm", "rate"))
    train(step, courses, trainer, budget, peak_rate=args.peak_rate, rng=rng, log=log, checkpoint=checkpoint)

    trainer.load_average()
    steps.clear()
    sizes = (courses[-1].size,) if args.smoke else (DEMO, LARGEST)
    standardise(vae, *latent_statistics(vae, rng, sizes))
    vae.to(torch.float16).save_pretrained(args.run / "vae")
    vae.to(torch.float32)
    figures = {str(size): vae_psnr(vae, held_out_scenes(16, seed=1), size) for size in sizes}
    (args.run / "vae.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures)


if __name__ == "__main__":
    main()
