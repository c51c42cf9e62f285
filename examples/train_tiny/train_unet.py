"""Trains the UNet of tiny-animatediff together with its text encoder, by v-prediction on latents of the trained VAE.

    python examples/train_tiny/train_unet.py --run runs/animatediff --compile --seconds 540

Needs the folder that train_frame_vae.py left, and writes the whole pipeline into its subfolder `pipeline`.

Shape letters: B clips, C latent channels, T frames, Y x X latents, L prompt tokens.
"""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from data import Size
from diffusers import AutoencoderKL, DDIMScheduler, UNetMotionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
from latent_pool import LatentPool
from tiny_animatediff import (
    DEMO,
    LARGEST,
    LATENT_CHANNELS,
    LATENT_PIXELS,
    PROMPT_TOKENS,
    WIDTHS,
    encode,
    new_scheduler,
    new_text_encoder,
    new_unet,
    number_frames,
    save,
)
from tiny_model import new_tokenizer
from training import Budget, Course, Log, Trainer, denoiser_options, graphed_steps, half_call, prepare, train
from transformers import CLIPTextModel, PreTrainedTokenizerFast

PEAK_RATE = 1e-3
EMPTY_PROMPTS = 0.1  # for classifier-free guidance

COURSES = {  # by height
    128: Course(size=DEMO, batch=48, share=0.4, shift=3.2, start=0.0),
    192: Course(size=LARGEST, batch=24, share=0.4, shift=4.0, start=0.3),
}
SMOKE = {
    128: Course(size=Size(frames=4, height=32, width=32), batch=2, share=0.5, shift=2.0, start=0.0),
    192: Course(size=Size(frames=4, height=32, width=64), batch=2, share=0.5, shift=2.0, start=0.3),
}


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """[B, L] token ids, padded as AnimateDiffPipeline pads them."""
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


class FewFrames:
    """Attention over few frames as two small matrix products.

    Fused kernels spend most of their time on tiles that 16 queries and keys leave empty, and backward more than forward.
    """

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states=None, **unused):
        q, k, v = (
            project(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        weights = (q @ k.transpose(-1, -2) * attn.scale).softmax(-1)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


def prepare_unet(unet: UNetMotionModel, compiled: bool) -> None:
    """Make its training fast; its weights and what it computes stay the same."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # rows of a few hundred tokens, heads of 32: flash is at home there
    unet.to(memory_format=torch.channels_last)
    for module in unet.modules():
        if isinstance(module, AnimateDiffTransformer3D):
            for block in module.transformer_blocks:
                block.attn1.set_processor(FewFrames())
                block.attn2.set_processor(FewFrames())
    if compiled:
        torch._dynamo.config.recompile_limit = 200  # of all parts together: they share one entry point
        for module in unet.modules():
            if isinstance(module, ResnetBlock2D | Transformer2DModel | AnimateDiffTransformer3D):
                module.compile(fullgraph=True, dynamic=False)


def draw_timesteps(count: int, shift: float, pure: float, last: int, device: torch.device) -> torch.Tensor:
    """[count] from 0 to `last`: uniform for a shift of 1, more of the noisy ones for a larger one; a share `pure` is at `last`.

    Whether a thing is a star, and where it goes, is decided at the noisy ones; at the last one, where nothing but the prompt
    and the number of a frame tells anything, that a thing which moves left is on the right first.
    """
    part = torch.rand(count, device=device)
    part = shift * part / (1 + (shift - 1) * part)
    drawn = (part * (last + 1)).long().clamp(max=last)
    return torch.where(torch.rand(count, device=device) < pure, last, drawn)


def denoiser_step(
    unet: UNetMotionModel,
    text_encoder: CLIPTextModel,
    trainer: Trainer,
    scheduler: DDIMScheduler,
    empty_prompt: torch.Tensor,
    shift: float,
    pure: float,
):
    """The v-prediction step: x = signal * latents + sigma * noise, and the network predicts signal * noise - sigma * latents."""
    kept = scheduler.alphas_cumprod.to(trainer.device)
    signals, sigmas = kept.sqrt(), (1 - kept).sqrt()

    def step(latents: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        count, frames, device = len(latents), latents.shape[2], latents.device
        latents = latents.float()
        dropped = torch.rand(count, 1, device=device) < EMPTY_PROMPTS
        context = text_encoder(torch.where(dropped, empty_prompt, ids)).last_hidden_state
        timesteps = draw_timesteps(count, shift, pure, len(kept) - 1, device)
        signal, sigma = (table[timesteps].view(-1, 1, 1, 1, 1) for table in (signals, sigmas))
        noise = torch.randn_like(latents)
        noisy = signal * latents + sigma * noise
        context = context.repeat_interleave(frames, dim=0)  # as the pipeline does
        velocity = half_call(unet, noisy, timesteps, context, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), signal * noise - sigma * latents)
        norm = trainer.descend(loss)
        return {"loss": loss.detach(), "norm": norm}

    return step


def latent_shape(course: Course) -> tuple[int, ...]:
    size = course.size
    return course.batch, LATENT_CHANNELS, size.frames, size.height // LATENT_PIXELS, size.width // LATENT_PIXELS


def main() -> None:
    parser = denoiser_options(__doc__, seconds=540, peak_rate=PEAK_RATE)
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=(128, 192), choices=COURSES, help="heights of the clips"
    )
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, help="channels of each level, if not --start-from"
    )
    parser.add_argument("--noisier", type=float, default=1.0, help="multiplies the shift of the noise levels")
    parser.add_argument("--pure-noise", type=float, default=0.4, help="share of clips that are noise and nothing else")
    parser.add_argument("--number-frames", action="store_true", help="with --start-from: anew, see `number_frames`")
    args = parser.parse_args()
    device = prepare(args.seed)
    courses = [(SMOKE if args.smoke else COURSES)[height] for height in args.sizes]

    tokenizer = new_tokenizer(PROMPT_TOKENS)
    if args.start_from is None:
        unet, text_encoder = new_unet(args.widths), new_text_encoder(tokenizer)
    else:
        unet = UNetMotionModel.from_pretrained(args.start_from / "unet", dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(args.start_from / "text_encoder", dtype=torch.float32)
        if args.number_frames:
            number_frames(unet)
    unet, text_encoder = unet.to(device).train(), text_encoder.to(device).train()
    prepare_unet(unet, args.compile)
    trainer = Trainer({"unet": unet, "text_encoder": text_encoder}, decay=0.998)
    checkpoint = args.run / "denoiser.pt"
    used = trainer.load(checkpoint) if args.resume else 0.0
    rng = np.random.default_rng((args.seed, trainer.steps))
    torch.manual_seed(args.seed + trainer.steps)
    empty_prompt, scheduler = tokenize(tokenizer, [""]).to(device), new_scheduler()
    steps = graphed_steps(
        lambda course: denoiser_step(
            unet, text_encoder, trainer, scheduler, empty_prompt, course.shift * args.noisier, args.pure_noise
        ),
        courses,
        graphed=device.type == "cuda" and not args.eager,
    )
    if args.warm_up:
        for course in courses:
            latents = torch.randn(latent_shape(course), device=device, dtype=torch.bfloat16)
            steps[course](latents=latents, ids=empty_prompt.expand(course.batch, -1))
        return

    vae = AutoencoderKL.from_pretrained(args.run / "vae").to(device).requires_grad_(False)
    if device.type == "cuda":
        vae.to(torch.bfloat16)
    pools = {
        course: LatentPool(partial(encode, vae), partial(tokenize, tokenizer), course.size, course.batch, device)
        for course in courses
    }
    log = Log(args.run / "denoiser.csv", ("step", "seconds", "size", "loss", "norm", "rate"))
    train(
        lambda course: steps[course](**pools[course].draw(rng)),
        courses,
        trainer,
        Budget(args.seconds, used),
        peak_rate=args.peak_rate,
        rng=rng,
        log=log,
        checkpoint=checkpoint,
    )
    trainer.load_average()
    steps.clear()
    save(args.run / "pipeline", AutoencoderKL.from_pretrained(args.run / "vae"), unet, text_encoder)


if __name__ == "__main__":
    main()
