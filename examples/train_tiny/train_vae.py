"""Trains the tiny video VAE on clips drawn on the fly, and measures it on held-out clips.

python examples/train_tiny/train_vae.py --run runs/tiny --seconds 330
"""

import json

import numpy as np
import torch
import whole_clip
from data import DEMO, LARGEST, Size, layouts, mixed_layouts
from diffusers import AutoencoderKLWan
from evaluate import vae_psnr
from render import render
from scenes import held_out_scenes, sample_scene
from tiny_model import new_vae
from training import Budget, Course, Log, Trainer, graphed_steps, half_precision, options, prepare, train

PEAK_RATE = 8e-4
SQUARED_WEIGHT = 5.0  # of the squared error beside the absolute one
KL_WEIGHT = 1e-4

COURSES = (
    Course(size=Size(frames=1, height=128, width=128), batch=96, share=0.04, start=0.0),
    Course(size=Size(frames=9, height=128, width=128), batch=24, share=1.0, start=0.12),
    Course(size=Size(frames=17, height=128, width=128), batch=16, share=1.5, start=0.3),
    Course(size=Size(frames=33, height=192, width=192), batch=4, share=0.7, start=0.5),
    Course(size=Size(frames=9, height=352, width=352), batch=4, share=0.7, start=0.5),
)
SMOKE = (
    Course(size=Size(frames=1, height=32, width=32), batch=2, share=0.1, start=0.0),
    Course(size=Size(frames=5, height=32, width=32), batch=2, share=1.0, start=0.3),
)


def vae_step(vae: AutoencoderKLWan, trainer: Trainer, size: Size):
    """The training step of one size: draws the clips, encodes, decodes, and descends."""

    def step(things: torch.Tensor, background: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            video, weight = render(things, background, size.frames, size.height, size.width)
            weight = weight / weight.mean()
        with half_precision(video.device):
            mean, log_variance = whole_clip.encode(vae, video)
            mean, log_variance = mean.float(), log_variance.float()
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            error = whole_clip.decode(vae, latents).float() - video
        picture = (weight * (error.abs() + SQUARED_WEIGHT * error.square())).mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        norm = trainer.descend(picture + KL_WEIGHT * kl)
        return {"loss": picture.detach(), "mse": error.detach().square().mean(), "kl": kl.detach(), "norm": norm}

    return step


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, rng: np.random.Generator, sizes: tuple[Size, ...]) -> None:
    """Write mean and deviation of each latent channel, over captioned training clips, into the VAE's config."""
    latents = []
    for size in sizes:
        scenes = [sample_scene(rng) for _ in range(32)]
        for start in range(0, len(scenes), 8):
            things, background = layouts(scenes[start : start + 8], rng, size, vae.device)
            video, _ = render(things, background, size.frames, size.height, size.width)
            mean, _ = whole_clip.encode(vae, video)
            latents.append(mean.transpose(0, 1).flatten(1))
    deviation, mean = torch.std_mean(torch.cat(latents, 1), dim=1)
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=deviation.tolist())


def main() -> None:
    args = options(__doc__, seconds=330, peak_rate=PEAK_RATE).parse_args()
    device = prepare(args.seed)
    courses = SMOKE if args.smoke else COURSES

    vae = new_vae().to(device)
    trainer = Trainer({"vae": vae}, decay=0.998)
    checkpoint = args.run / "vae.pt"
    budget = Budget(args.seconds, trainer.load(checkpoint) if args.resume else 0.0)
    rng = np.random.default_rng((args.seed, trainer.steps))
    graphed = device.type == "cuda" and not args.eager
    steps = graphed_steps(lambda course: vae_step(vae, trainer, course.size), courses, graphed)

    def step(course: Course) -> dict[str, torch.Tensor]:
        things, background = mixed_layouts(course.batch, rng, course.size, device)
        return steps[course](things=things, background=background)

    log = Log(args.run / "vae.csv", ("step", "seconds", "size", "loss", "mse", "kl", "norm", "rate"))
    train(step, courses, trainer, budget, peak_rate=args.peak_rate, rng=rng, log=log, checkpoint=checkpoint)

    trainer.load_average()
    steps.clear()
    sizes = (courses[-1].size,) if args.smoke else (DEMO, LARGEST)
    set_latent_statistics(vae, rng, sizes)
    vae.to(torch.float16).save_pretrained(args.run / "vae")
    vae.to(torch.float32)
    figures = {str(size): vae_psnr(vae, held_out_scenes(16, seed=1), size) for size in sizes}
    (args.run / "vae.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(figures)


if __name__ == "__main__":
    main()
