"""What feature slicing saves and costs, at real sizes with random weights.

denoiser    what one call makes above its weights: as diffusers runs it, with diffusers' own switches, and sliced, with the
            times of all; fast attention is on where slices are and where they are not ("unsliced")
decoder     the same of one call of the VAE's `decode`, which has no attention of ours
generation  the peak of a whole generation of few steps, weights and VAE included; also with a switch that changes
            the video, where a case has one, and what that costs in dB (on random weights)
prediction  what the twin on the meta device foretold against what the device measured, of the denoiser and of the decoder

Peaks are `torch.cuda.max_memory_allocated`; outputs are held against the unsliced ones. Figures go to memory.csv, times to
slicing_time.csv.

    python -m videoattn.benchmarks.memory                              # some minutes on an H200
    python -m videoattn.benchmarks.memory --part denoiser --only svd
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

import videoattn
from videoattn.benchmarks import forward, models, results, timing
from videoattn.slicing import forecast
from videoattn.slicing.session import Choice, Slicing, slicing_of

TOLERANCE = 0.05  # rel_l2 of a denoiser's output: at these depths two exact kernels differ by a percent


@dataclass(frozen=True, kw_only=True)
class Case:
    """Args:
    size: height, width, frames.
    denoiser, decoder: GiB that each may make above what lies there; a generation has the larger of both above the weights.
    lossy: an option of slicing that saves memory of the decoder and changes the video. With it a generation has the denoiser's.
    """

    name: str
    size: tuple[int, int, int]
    denoiser: float
    decoder: float
    lossy: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.size))}"


CASES = (
    Case(name="animatediff", size=(576, 1024, 16), denoiser=1.6, decoder=1.6),
    Case(name="svd-xt", size=(576, 1024, 25), denoiser=3.0, decoder=6.5, lossy=(("vae_frames", 8),)),
    Case(name="wan-1.3b", size=(480, 832, 81), denoiser=0.8, decoder=3.6),
)
SMALL = 2**28  # beside the weights: buffers, embeddings of the text, latents, what cuBLAS keeps
CHUNKS = (1, 2, 4)  # of diffusers' forward chunking, along the rows of a feed-forward's input

Figure = dict[str, object]


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call makes above what was there; on a CPU, of what torch's operators make."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return forward.peak(call, device)
    return forecast.peak(call)[0]


def switched(plain: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The denoiser with diffusers' own switches, where it has any."""
    if not hasattr(plain, "enable_forward_chunking"):
        return
    for chunk in CHUNKS:
        twin = forward.twin(plain)
        try:
            twin.enable_forward_chunking(chunk, 0)
        except ValueError as refusal:
            print(f"forward chunking of {chunk}: {refusal}")
            continue
        yield f"forward chunking {chunk}", twin


def runs(name: str, call: Callable[[], object]) -> bool:
    """Whether a switch takes this size."""
    try:
        call()
    except ValueError as refusal:
        print(f"{name}: {refusal}")
        return False
    return True


def budget(gib: float, device: torch.device, *models: nn.Module) -> int:
    """Bytes: so many GiB above what lies on the device, or on a CPU above what the models hold."""
    lies = sum(x.nbytes for model in models for x in (*model.parameters(), *model.buffers()))
    return int((torch.cuda.memory_allocated(device) if device.type == "cuda" else lies) + gib * 2**30)


def cut(*models: nn.Module) -> str:
    """Into how many slices a budget had them cut, at most."""
    counts = [n for each in chosen(models) for groups in each.counts.values() for n in groups.values()]
    return f"up to {max(counts)} slices"


def denoiser(
    case: Case, device: torch.device, seconds: float, overrides: models.Spec | None = None
) -> tuple[list[Figure], timing.Comparison]:
    """Figures of one call, and the time of the sliced one over the unsliced."""
    plain = models.denoiser(case.name, device=device, overrides=overrides)
    unsliced = videoattn.enable_fast_attention(forward.twin(plain), "exact")
    sliced = videoattn.enable_fast_attention(forward.twin(plain), "exact")
    videoattn.enable_feature_slicing(sliced, memory=budget(case.denoiser, device, sliced))

    def run(model: nn.Module) -> Callable[..., torch.Tensor]:
        @torch.no_grad()
        def call(kwargs: dict[str, object]) -> torch.Tensor:
            return model(**kwargs)[0]

        return call

    def inputs(seed: int) -> timing.Inputs:
        return (models.inputs(case.name, *case.size, device=device, overrides=overrides, seed=seed),)

    run(sliced)(*inputs(0))  # chooses its slices, before there are tensors of the timing
    others = {name: model for name, model in switched(plain) if runs(name, lambda m=model: run(m)(*inputs(0)))}
    candidates = {"sliced": sliced, **others}
    options = {"device": device, "seconds": seconds, "min_rounds": 3, "full_queue": False}
    compared = timing.compare(
        run(unsliced),
        {name: run(model) for name, model in candidates.items()},
        inputs,
        forward.check(TOLERANCE),
        **options,
    )
    arguments = inputs(0)
    peaks = {"plain": plain, "unsliced": unsliced, **candidates}
    peaks = {name: peak(lambda model=model: run(model)(*arguments), device) for name, model in peaks.items()}
    figures = [gib(case, f"activations {name}", size) for name, size in peaks.items()]
    figures.append(figure(case, "activation_ratio", peaks["plain"] / peaks["sliced"], f"plain/{cut(sliced)}"))
    no_slower = [name for name in others if compared[name].median_ms <= compared["sliced"].median_ms]
    best = min((peaks[name] for name in no_slower), default=peaks["plain"])
    unit = "the least of diffusers' switches that take no more time / ours"
    figures.append(figure(case, "activation_ratio_switches", best / peaks["sliced"], unit))
    return figures, compared["sliced"]


def decoder(case: Case, device: torch.device, seconds: float) -> tuple[list[Figure], timing.Comparison]:
    """Figures of one call of `decode` with what the pipeline gives it, and the time of the sliced one over the unsliced."""
    pipe = models.load(case.name, device=device)
    pipe.set_progress_bar_config(disable=True)
    latents, options = _decoded(pipe, case)
    whole, sliced = pipe.vae, copy.deepcopy(pipe.vae)
    del pipe
    gc.collect()
    Slicing(sliced, "decode", budget=budget(case.decoder, device, sliced)).attach()

    def run(vae: nn.Module) -> Callable[..., torch.Tensor]:
        @torch.no_grad()
        def call(latents: torch.Tensor) -> torch.Tensor:
            return vae.decode(latents, **options, return_dict=False)[0]

        return call

    def inputs(seed: int) -> timing.Inputs:
        generator = torch.Generator(device.type).manual_seed(seed)
        return (torch.randn(latents.shape, dtype=latents.dtype, device=device, generator=generator),)

    run(sliced)(*inputs(0))  # as above
    timings = {"device": device, "seconds": seconds, "min_rounds": 3, "full_queue": False}
    compared = timing.compare(run(whole), {"sliced": run(sliced)}, inputs, forward.check(TOLERANCE), **timings)
    arguments = inputs(0)
    peaks = {
        name: peak(lambda vae=vae: run(vae)(*arguments), device) for name, vae in (("plain", whole), ("sliced", sliced))
    }
    figures = [gib(case, f"decoder {name}", size) for name, size in peaks.items()]
    figures.append(figure(case, "decoder_ratio", peaks["plain"] / peaks["sliced"], f"plain/{cut(sliced)}"))
    return figures, compared["sliced"]


def _decoded(pipe: object, case: Case) -> tuple[torch.Tensor, dict[str, object]]:
    """What a generation gives `vae.decode` first."""

    class Seen(Exception):
        pass

    def seen(latents: torch.Tensor, **options: object) -> None:
        seen.call = latents, {name: value for name, value in options.items() if name != "return_dict"}
        raise Seen

    pipe.vae.decode = seen
    with contextlib.suppress(Seen):
        call_of(pipe, case, steps=1)()
    del pipe.vae.decode
    return seen.call


def call_of(pipe: object, case: Case, steps: int) -> Callable[[], object]:
    """A generation; a picture where the pipeline takes one."""
    from PIL import Image

    height, width, frames = case.size
    arguments = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
    if case.name.startswith("svd"):
        arguments["image"] = Image.new("RGB", (width, height))
        arguments["decode_chunk_size"] = frames
    else:
        arguments["prompt"] = "a cat walks on the grass"

    def call() -> object:
        generator = torch.Generator(pipe.device.type).manual_seed(0)
        return pipe(generator=generator, output_type="pt", **arguments).frames

    return call


def generation(case: Case, device: torch.device, steps: int) -> Iterator[Figure]:
    """Peaks with weights, of the plain pipeline and of the sliced one, and how near their videos are."""
    pipe = models.load(case.name, device=device)
    pipe.set_progress_bar_config(disable=True)
    peaks, videos = {}, {}
    weights = sum(
        x.nbytes for part in pipe.components.values() if isinstance(part, nn.Module) for x in part.parameters()
    )
    call = call_of(pipe, case, steps)
    runs = {"plain": {}, "sliced": {}} | ({"sliced, lossy": dict(case.lossy)} if case.lossy else {})
    allowed = {"sliced": max(case.denoiser, case.decoder), "sliced, lossy": case.denoiser}
    for name, more in runs.items():
        if name in allowed:
            videoattn.enable_fast_attention(pipe, "exact")
            videoattn.enable_feature_slicing(pipe, memory=int(weights + SMALL + allowed[name] * 2**30), **more)
        made = []
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        peaks[name] = before + peak(lambda made=made: made.append(call()), device)
        video = made.pop()
        videos[name] = (video if isinstance(video, torch.Tensor) else torch.stack(list(video))).cpu()
        yield gib(case, f"peak {name}", peaks[name])
        if name != "plain":
            error = (videos[name].float() - videos["plain"].float()).square().mean()
            yield figure(case, f"psnr_db {name}", float(-10 * error.clamp_min(1e-12).log10()), "dB against plain")
    told = "plain/sliced"
    yield figure(case, "peak_ratio_exact", peaks["plain"] / peaks["sliced"], told)
    least = min(peaks, key=peaks.get)
    switched = ", ".join(f"{switch}={value}" for switch, value in runs[least].items())
    yield figure(case, "peak_ratio", peaks["plain"] / peaks[least], f"{told}{', ' * bool(switched)}{switched}")
    above = {name: size - weights for name, size in peaks.items()}
    yield figure(
        case, "activation_ratio_generation", above["plain"] / above["sliced"], "whole generation, above all weights"
    )


def prediction(case: Case, device: torch.device, steps: int) -> Iterator[Figure]:
    """A budget that asks for slices, and what became of it."""
    pipe = models.load(case.name, device=device)
    pipe.set_progress_bar_config(disable=True)
    call = call_of(pipe, case, steps)
    videoattn.enable_feature_slicing(pipe, memory="1 TiB")
    call()
    most = max(chosen(parts(pipe)), key=lambda choice: choice.total)
    for share in (1.0, 0.6):
        videoattn.enable_feature_slicing(pipe, memory=int(most.resident + share * most.activations))
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        measured = before + peak(call, device)
        told = max(choice.total for choice in chosen(parts(pipe)))
        yield gib(case, f"predicted at {share:.0%}", told)
        yield gib(case, f"measured at {share:.0%}", measured)
        yield figure(case, "prediction_error", abs(told - measured) / measured, f"of the measured peak, at {share:.0%}")


def parts(pipe: object) -> list[nn.Module]:
    """Those that are sliced."""
    found = (getattr(pipe, name, None) for name in ("transformer", "unet", "vae"))
    return [model for model in found if model is not None]


def chosen(models: Iterable[nn.Module]) -> list[Choice]:
    """What was chosen for their last calls."""
    slicings = [slicing_of(model) for model in models]
    return [slicing.choice for slicing in slicings if slicing is not None and slicing.choice is not None]


def gib(case: Case, metric: str, size: int) -> Figure:
    return figure(case, metric, size / 2**30, "GiB")


def figure(case: Case | str, metric: str, value: float, unit: str) -> Figure:
    return {"case": str(case), "metric": metric, "value": value, "unit": unit}


TIMED = {"denoiser": denoiser, "decoder": decoder}
PARTS = ("denoiser", "decoder", "generation", "prediction")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results.add_arguments(parser)
    parser.add_argument("--seconds", type=float, default=6.0, help="of the timing of a case")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--part", choices=PARTS, help="one of them (default: all)")
    parser.add_argument("--steps", type=int, default=2, help="of a generation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    env, device, failed = results.environment(args.commit), torch.device(args.device), []
    cases = [case for case in CASES if args.only in str(case)]
    if not cases:
        raise ValueError(f"--only {args.only!r}: wanted a part of one of {[*map(str, CASES)]}")
    for case in cases:
        for part in PARTS if args.part is None else (args.part,):
            try:
                if part in TIMED:
                    figures, compared = TIMED[part](case, device, args.seconds)
                    told = {"shape": f"at most {getattr(case, part)} GiB", "dtype": models.spec(case.name)["dtype"]}
                    baseline = "unsliced" if part == "denoiser" else f"unsliced {part}"
                    row = results.timing(compared, case=str(case), kernel="sliced", baseline=baseline, **told)
                    results.append("slicing_time", [row], env, args.results)
                    print(f"{case} {part}: {compared}", flush=True)
                else:
                    measure = generation if part == "generation" else prediction
                    figures = list(measure(case, device, args.steps))
            except (timing.WrongOutput, torch.OutOfMemoryError, ValueError) as error:
                failed.append(f"{case} {part}: {error}")
                continue
            results.append_figures("memory", figures, env, args.results)
            for each in figures:
                print(f"{each['case']:24s} {each['metric']:34s} {each['value']:.4g} {each['unit']}", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print("\n".join(f"FAILED {line}" for line in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
