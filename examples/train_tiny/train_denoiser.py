"""Trains the tiny denoiser together with its text encoder, by flow matching on latents of the trained VAE.

    python examples/train_tiny/train_denoiser.py --run runs/tiny --seconds 330

Needs the folder that train_vae.py left, and writes the whole pipeline into its subfolder `pipeline`.

Shape letters: B clips, L prompt tokens, D text width.
"""

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import whole_clip
from data import DEMO, LARGEST, Size
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from latent_pool import LatentPool
from tiny_model import LATENT_CHANNELS, new_text_encoder, new_tokenizer, new_transformer, save
from training import Budget, Course, Log, Trainer, denoiser_options, graphed_steps, half_precision, prepare, train
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

PEAK_RATE = 1e-3
EMPTY_PROMPTS = 0.1  # for classifier-free guidance
PROMPT_TOKENS = 23  # the longest caption has 18
CONTEXT_TOKENS = 512  # WanPipeline pads the embeddings with zeros to this length and masks nothing
MASKED = -1e4  # added to the score of a padded token; its softmax weight is exactly 0

COURSES = (
    Course(size=Size(frames=17, height=128, width=128), batch=128, share=0.35, shift=4.0, start=0.0),
    Course(size=DEMO, batch=48, share=0.35, shift=5.0, start=0.3),
    Course(size=LARGEST, batch=12, share=0.3, shift=8.0, start=0.3),
)
SMOKE = (
    Course(size=Size(frames=5, height=32, width=32), batch=8, share=0.5, shift=3.0, start=0.0),
    Course(size=Size(frames=9, height=32, width=48), batch=8, share=0.5, shift=3.0, start=0.3),
)


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """[B, L] token ids, padded with 0."""
    return tokenizer(captions, padding="max_length", max_length=PROMPT_TOKENS, return_tensors="pt").input_ids


def prompt_embeddings(text_encoder: UMT5EncoderModel, ids: torch.Tensor) -> torch.Tensor:
    """ids [B, L] -> [B, L + 1, D]: what WanPipeline.encode_prompt makes of the prompts, with one zero for all its padding."""
    real = ids != text_encoder.config.pad_token_id
    mask = torch.where(real, 0.0, MASKED)[:, None, None, :]
    embeddings = text_encoder(ids, mask).last_hidden_state * real.unsqueeze(-1)
    return F.pad(embeddings, (0, 0, 0, 1))


class PaddedContext(WanAttnProcessor):
    """Cross-attention to `prompt_embeddings` that equals attention to all CONTEXT_TOKENS.

    WanPipeline pads with equal zeros, so their keys and values are equal too: one of them, its softmax weight multiplied
    by their number, stands for all, and the context shrinks from 512 tokens to 24.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.bias = torch.zeros(1, 1, 1, PROMPT_TOKENS + 1, device=device)
        self.bias[..., -1] = math.log(CONTEXT_TOKENS - PROMPT_TOKENS)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)


def shorten_context(transformer: WanTransformer3DModel) -> None:
    for block in transformer.blocks:
        block.attn2.set_processor(PaddedContext(transformer.device))


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """video [B, 3, 1 + 4k, H, W] -> normalised latents [B, C, 1 + k, H / 8, W / 8]."""
    with half_precision(video.device):
        latents, _ = whole_clip.encode(vae, video)
    mean, deviation = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (latents.float() - mean) / deviation


def latent_shape(course: Course) -> tuple[int, ...]:
    size = course.size
    return course.batch, LATENT_CHANNELS, 1 + size.frames // 4, size.height // 8, size.width // 8


def denoiser_step(
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    trainer: Trainer,
    empty_prompt: torch.Tensor,
    shift: float,
):
    """The flow-matching step: x = (1 - s) latents + s noise, and the network predicts noise - latents."""

    def step(latents: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        count, device = len(latents), latents.device
        latents = latents.float()
        dropped = torch.rand(count, 1, device=device) < EMPTY_PROMPTS
        context = prompt_embeddings(text_encoder, torch.where(dropped, empty_prompt, ids))
        level = torch.rand(count, device=device)
        level = shift * level / (1 + (shift - 1) * level)
        noise = torch.randn_like(latents)
        noisy = torch.lerp(latents, noise, level.view(-1, 1, 1, 1, 1))
        with half_precision(device):
            flow = transformer(noisy, level * 1000, context, return_dict=False)[0]
        loss = F.mse_loss(flow.float(), noise - latents)
        norm = trainer.descend(loss)
        return {"loss": loss.detach(), "norm": norm}

    return step


def main() -> None:
    args = denoiser_options(__doc__, seconds=330, peak_rate=PEAK_RATE).parse_args()
    device = prepare(args.seed)
    courses = SMOKE if args.smoke else COURSES

    vae = AutoencoderKLWan.from_pretrained(args.run / "vae").to(device).requires_grad_(False)
    tokenizer = new_tokenizer()
    if args.start_from is None:
        transformer, text_encoder = new_transformer(), new_text_encoder(len(tokenizer))
    else:
        transformer = WanTransformer3DModel.from_pretrained(args.start_from / "transformer", dtype=torch.float32)
        text_encoder = UMT5EncoderModel.from_pretrained(args.start_from / "text_encoder", dtype=torch.float32)
    transformer, text_encoder = transformer.to(device).train(), text_encoder.to(device).train()
    shorten_context(transformer)
    trainer = Trainer({"transformer": transformer, "text_encoder": text_encoder}, decay=0.998)
    checkpoint = args.run / "denoiser.pt"
    used = trainer.load(checkpoint) if args.resume else 0.0
    if args.compile:
        torch._dynamo.config.recompile_limit = 2 * len(courses)
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    rng = np.random.default_rng((args.seed, trainer.steps))
    torch.manual_seed(args.seed + trainer.steps)
    empty_prompt = tokenize(tokenizer, [""]).to(device)
    pools = {
        course: LatentPool(partial(encode, vae), partial(tokenize, tokenizer), course.size, course.batch, device)
        for course in courses
    }
    steps = graphed_steps(
        lambda course: denoiser_step(transformer, text_encoder, trainer, empty_prompt, course.shift),
        courses,
        graphed=device.type == "cuda" and not args.eager,
    )
    if args.warm_up:
        for course in courses:
            latents = torch.randn(latent_shape(course), device=device)
            steps[course](latents=latents, ids=empty_prompt.expand(course.batch, -1))
        return

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
    save(args.run / "pipeline", vae, transformer, text_encoder)


if __name__ == "__main__":
    main()
