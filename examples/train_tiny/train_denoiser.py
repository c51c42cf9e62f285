"""Trains the tiny denoiser together with its text encoder, by flow matching on latents of the trained VAE.

    python examples/train_tiny/train_denoiser.py --run runs/tiny --seconds 330

Needs the folder that train_vae.py left, and writes the whole pipeline into its subfolder `pipeline`.

Shape letters: B clips, L prompt tokens, D text width.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import whole_clip
from data import DEMO, LARGEST, Size, layouts
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from render import render
from scenes import sample_scene
from tiny_model import new_text_encoder, new_tokenizer, new_transformer, save
from training import Budget, GraphedStep, Log, Trainer, half_precision
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

PEAK_RATE = 1e-3
EMPTY_PROMPTS = 0.1  # for classifier-free guidance
PROMPT_TOKENS = 23  # the longest caption has 18
CONTEXT_TOKENS = 512  # WanPipeline pads the embeddings with zeros to this length and masks nothing
MASKED = -1e4  # added to the score of a padded token; its softmax weight is exactly 0
FIRST_CLIPS = 16  # batches in a pool before the first step
REUSE = 40  # how many steps a latent is drawn for, on average
ENCODED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Course:
    """A size of the training mix, drawn with weight `share` once the part `start` of the time is over.

    Larger sizes need more noise before a thing is lost in it, so a larger `shift` of the noise levels.
    """

    size: Size
    batch: int
    share: float
    shift: float
    start: float


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


class LatentPool:
    """Normalised latents of freshly drawn clips of one size with their captions; the oldest make room for new ones."""

    def __init__(self, vae: AutoencoderKLWan, tokenizer: PreTrainedTokenizerFast, size: Size, capacity: int):
        self.vae, self.tokenizer, self.size, self.capacity = vae, tokenizer, size, capacity
        self.statistics = [
            torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        ]
        self.latents = self.ids = None
        self.made = 0

    @torch.no_grad()
    def refill(self, count: int, rng: np.random.Generator) -> None:
        for _ in range(0, count, ENCODED_AT_ONCE):
            scenes = [sample_scene(rng) for _ in range(ENCODED_AT_ONCE)]
            things, background = layouts(scenes, rng, self.size, self.vae.device)
            video, _ = render(things, background, self.size.frames, self.size.height, self.size.width)
            with half_precision(video.device):
                latents, _ = whole_clip.encode(self.vae, video)
            mean, deviation = self.statistics
            latents = ((latents.float() - mean) / deviation).to(torch.bfloat16)
            ids = tokenize(self.tokenizer, [scene.caption() for scene in scenes]).to(latents.device)
            if self.latents is None:
                self.latents = latents.new_zeros(self.capacity, *latents.shape[1:])
                self.ids = ids.new_zeros(self.capacity, ids.shape[1])
            slots = torch.arange(self.made, self.made + len(scenes), device=ids.device) % self.capacity
            self.latents[slots], self.ids[slots] = latents, ids
            self.made += len(scenes)

    def draw(self, count: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(min(self.made, self.capacity), (count,), device=self.ids.device)
        return {"latents": self.latents[chosen], "ids": self.ids[chosen]}


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder with the trained VAE; all results go there")
    parser.add_argument("--seconds", type=float, default=330, help="training time")
    parser.add_argument("--peak-rate", type=float, default=PEAK_RATE)
    parser.add_argument("--resume", action="store_true", help="continue from the folder's checkpoint")
    parser.add_argument(
        "--start-from", type=Path, help="pipeline folder whose denoiser and text encoder are trained on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="torch.compile the transformer's blocks")
    parser.add_argument("--warm-up", action="store_true", help="only fill the cache of torch.compile, one step a size")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see the script run on a CPU")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.manual_seed(args.seed)
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
    graphed = device.type == "cuda" and not args.eager
    memory = torch.cuda.graph_pool_handle() if graphed else None
    empty_prompt = tokenize(tokenizer, [""]).to(device)
    budget = Budget(args.seconds, used)
    log = Log(args.run / "denoiser.csv", ("step", "seconds", "size", "loss", "norm", "rate", "clips"))

    pools = {course: LatentPool(vae, tokenizer, course.size, 512 * course.batch) for course in courses}
    steps = {
        course: GraphedStep(
            denoiser_step(transformer, text_encoder, trainer, empty_prompt, course.shift), graphed=graphed, pool=memory
        )
        for course in courses
    }
    if args.warm_up:
        for course in courses:
            pools[course].refill(ENCODED_AT_ONCE, rng)
            steps[course](**pools[course].draw(course.batch))
        return
    calls = dict.fromkeys(courses, 0)
    losses = {course: [] for course in courses}
    next_save = budget.used + 60
    while budget.part < 1:
        ready = [course for course in courses if course.start <= budget.part]
        shares = np.array([course.share for course in ready])
        course = ready[rng.choice(len(ready), p=shares / shares.sum())]
        if calls[course] % REUSE == 0:
            pools[course].refill(course.batch * (1 if calls[course] else FIRST_CLIPS), rng)
        rate = budget.rate(args.peak_rate)
        trainer.set_rate(rate)
        figures = steps[course](**pools[course].draw(course.batch))
        trainer.after_step()
        calls[course] += 1
        losses[course].append(figures["loss"].clone())
        if trainer.steps % 5 == 0 and device.type == "cuda":
            torch.cuda.synchronize()  # or the queue runs ahead of the clock
        if len(losses[course]) == 50:
            loss = torch.stack(losses[course]).mean().item()
            losses[course].clear()
            log.write(
                step=trainer.steps,
                seconds=budget.used,
                size=course.size,
                loss=loss,
                norm=figures["norm"].item(),
                rate=rate,
                clips=pools[course].made,
            )
        if budget.used > next_save:
            trainer.save(checkpoint, budget)
            next_save = budget.used + 60
    trainer.save(checkpoint, budget)

    trainer.load_average()
    steps.clear()
    save(args.run / "pipeline", vae, transformer, text_encoder)


if __name__ == "__main__":
    main()
