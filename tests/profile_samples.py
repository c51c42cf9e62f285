"""Profiles as a GPU would give them, made without one: sizes are those of the models, times follow from work and rates.

Deterministic. `wan` is a DiT (one sequence length), `svd` a UNet (the length goes down and up with its levels).
"""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from videoattn.profiling.comparison import Comparison, Control, Pair, Quality, Timing
from videoattn.profiling.profile import (
    Alive,
    AttentionCall,
    Ceilings,
    Check,
    Io,
    Memory,
    ModuleMemory,
    Profile,
    Row,
)

CEILINGS = Ceilings(
    flops={"bfloat16": 712e12, "float32": 388e12},
    copy_bandwidth=4.02e12,
    l2_bytes=50 << 20,
    sm_count=132,
    sm_bytes=228 << 10,
)
ENVIRONMENT = {
    "device": "NVIDIA H200, 141 GB, 132 multiprocessors, driver 570.124",
    "python": "3.11.7",
    "torch": "2.13.0+cu128",
    "triton": "3.7.1",
    "diffusers": "0.42.1",
    "videoattn": "0.1.0",
    "host": "Linux 6.8, 16 cores",
    "date": "2026-11-24 14:05 UTC",
}
_RATES = {  # of the ceilings: matrix products by FLOP/s, the rest by bandwidth
    "full": 0.71,
    "spatial": 0.58,
    "temporal": 0.034,
    "cross": 0.22,
    "convolution": 0.46,
    "linear": 0.79,
    "normalisation": 0.52,
    "elementwise": 0.81,
    "layout": 0.63,
}
_KERNELS = {
    "full": ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128_4x1x1_kernel0_0",),
    "spatial": ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_128x128x64_4x1x1_kernel0_0",),
    "temporal": ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4>>",),
    "cross": ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80",),
    "convolution": ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x256x64",),
    "linear": ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNN", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNN"),
    "normalisation": ("vectorized_layer_norm_kernel", "rms_norm_kernel"),
    "elementwise": ("vectorized_elementwise_kernel<4, mul>", "elementwise_kernel<128, 4, add>", "silu_kernel"),
    "layout": ("direct_copy_kernel", "CatArrayBatchedCopy_aligned16_contig"),
}


@dataclass
class _Run:
    """Collects what a run does, forward by forward."""

    steps: int
    rows: dict[tuple[str, str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0] * 5))
    calls: list[AttentionCall] = field(default_factory=list)

    def work(
        self, module: str, operator: str, *, flops: int = 0, moved: int = 0, calls: int = 1, stage: str = ""
    ) -> float:
        """ms of it; `moved` in bytes."""
        top = CEILINGS.flops["bfloat16"]
        rate = _RATES.get(operator, 0.5)
        seconds = max(flops / (top * rate), moved / (CEILINGS.copy_bandwidth * (0.85 if flops else rate)))
        ms = max(1e3 * seconds, 0.0035 * calls)
        row = self.rows[stage or module.partition(".")[0], module, operator]
        pointwise = 0 if flops or operator == "layout" else moved // 4  # one operation for each bf16 element written
        for i, value in enumerate((calls, ms, flops, pointwise, moved)):
            row[i] += value
        return ms

    def attention(
        self,
        module: str,
        kind: str,
        step: int,
        branch: str,
        batch: int,
        heads: int,
        q: int,
        kv: int,
        dim: int,
        backend: str,
    ) -> None:
        flops, size = 4 * batch * heads * q * kv * dim, 2 * batch * heads * dim
        moved = size * (2 * q + 2 * kv)
        ms = self.work(module, kind, flops=flops, moved=moved)
        layout = 2 * size * q if kind == "temporal" else 0
        block_m, block_n = (64, 32) if kind == "temporal" else (128, 128)
        tiles = math.ceil(q / block_m)
        padded = tiles * block_m * math.ceil(kv / block_n) * block_n
        sm = size * (2 * q + 2 * tiles * kv)
        words = CEILINGS.sm_bytes // 2
        bound = max(moved, 2 * batch * heads * int(q * kv * dim * dim / (words + 4 * dim * dim)))
        self.calls.append(
            AttentionCall(
                stage=module.partition(".")[0],
                site=module,
                kind=kind,
                step=step,
                steps=self.steps,
                branch=branch,
                batch=batch,
                heads=heads,
                kv_heads=heads,
                q_len=q,
                kv_len=kv,
                head_dim=dim,
                dtype="bfloat16",
                backend=backend,
                ms=ms,
                flops=flops,
                bytes=moved,
                layout_bytes=layout,
                padding_waste=1 - q * kv / padded,
                io=Io(
                    block_m=block_m,
                    block_n=block_n,
                    sm_bytes=sm,
                    sm_bound=bound,
                    hbm_bytes=int(moved * 1.04),
                    hbm_bound=moved,
                    regime="large cache" if words >= dim * dim else "small cache",
                ),
            )
        )

    def finished(self, idle: float) -> tuple[Row, ...]:
        """All rows, and idle time as a share of the whole."""
        rows = [
            Row(
                stage=stage,
                module=module,
                operator=operator,
                calls=int(calls),
                ms=ms,
                host_ms=0.012 * calls,
                flops=int(flops),
                pointwise=int(pointwise),
                bytes=int(moved),
                ops=_split(operator, ms),
            )
            for (stage, module, operator), (calls, ms, flops, pointwise, moved) in self.rows.items()
        ]
        busy = sum(row.ms for row in rows)
        gap = busy * idle / (1 - idle)
        gaps = (("pipeline", "pipeline", 0.7), ("scheduler", "scheduler.step", 0.2), ("vae.decode", "vae.decode", 0.1))
        rows += [
            Row(stage=stage, module=module, operator="host", calls=self.steps, ms=gap * share, host_ms=gap * share)
            for stage, module, share in gaps
        ]
        return tuple(rows)


def _split(operator: str, ms: float) -> dict[str, float]:
    names = _KERNELS.get(operator, (operator,))
    weights = [0.62**i for i in range(len(names))]
    return {name: ms * weight / sum(weights) for name, weight in zip(names, weights, strict=True)}


def wan(steps: int = 4, layers: int = 30, backend: str = "sdpa_cudnn", attention_speed: float = 1.0) -> Profile:
    """Wan 2.1 1.3B at 832 x 480, 81 frames: 32 760 tokens, two calls of the denoiser a step."""
    run = _Run(steps)
    n, text, width, heads, dim, hidden = 32_760, 512, 1536, 12, 128, 8960
    tokens = 2 * n * width
    run.work("text_encoder.encoder", "linear", flops=int(0.9e12), moved=2 << 30, calls=14, stage="text_encoder")
    for step in range(steps):
        for branch in ("0", "1"):
            run.work("transformer.patch_embedding", "convolution", flops=2 * n * 16 * 4 * width, moved=tokens)
            run.work("transformer.condition_embedder.time_proj", "linear", flops=2 * width * 6 * width, moved=40 << 20)
            for layer in range(layers):
                block = f"transformer.blocks.{layer}"
                run.work(f"{block}.norm1", "normalisation", moved=2 * tokens)
                run.work(block, "elementwise", moved=14 * tokens, calls=9)
                for name in ("to_q", "to_k", "to_v", "to_out.0"):
                    run.work(f"{block}.attn1.{name}", "linear", flops=2 * n * width * width, moved=2 * tokens)
                for name in ("norm_q", "norm_k"):
                    run.work(f"{block}.attn1.{name}", "normalisation", moved=2 * tokens)
                run.work(f"{block}.attn1", "elementwise", moved=10 * tokens, calls=8)
                run.work(f"{block}.attn1", "layout", moved=4 * tokens, calls=2)
                run.attention(f"{block}.attn1", "full", step, branch, 1, heads, n, n, dim, backend)
                for name, rows in (("to_q", n), ("to_k", text), ("to_v", text), ("to_out.0", n)):
                    flops = 2 * rows * width * width
                    run.work(f"{block}.attn2.{name}", "linear", flops=flops, moved=4 * rows * width)
                run.work(f"{block}.attn2.norm_q", "normalisation", moved=2 * tokens)
                run.attention(f"{block}.attn2", "cross", step, branch, 1, heads, n, text, dim, "sdpa_efficient")
                run.work(
                    f"{block}.ffn.net.0.proj", "linear", flops=2 * n * width * hidden, moved=tokens + 2 * n * hidden
                )
                run.work(f"{block}.ffn.net.0", "elementwise", moved=4 * n * hidden)
                run.work(f"{block}.ffn.net.2", "linear", flops=2 * n * width * hidden, moved=tokens + 2 * n * hidden)
            run.work("transformer.proj_out", "linear", flops=2 * n * width * 64, moved=tokens)
            run.work("transformer", "layout", moved=2 * tokens)
        run.work("scheduler.step", "elementwise", moved=60 << 20, calls=22, stage="scheduler")
    _decode(run, frames=81)
    profile = _finish(
        run,
        title=f"Wan 2.1 T2V 1.3B, 832 x 480, 81 frames, {steps} steps, bfloat16",
        pipeline="WanPipeline",
        denoisers=("WanTransformer3DModel",),
        arguments={
            "prompt": "A red fox runs through deep snow at dusk, tracking shot",
            "negative_prompt": "",
            "height": 480,
            "width": 832,
            "num_frames": 81,
            "num_inference_steps": steps,
            "guidance_scale": 5.0,
        },
        weights={"transformer.blocks.*": 2.71e9, "text_encoder": 11.36e9, "vae.decoder": 0.29e9, "vae.encoder": 0.21e9},
        burst=4.4e9,
        decode=9.2e9,
        idle=0.031,
    )
    return profile if attention_speed == 1 else _with_attention(profile, attention_speed)


def svd(steps: int = 4, guided: int = 2) -> Profile:
    """Stable Video Diffusion XT at 576 x 1024, 25 frames: 9216, 2304, 576 and 144 tokens a frame, rows of 25 frames."""
    run = _Run(steps)
    frames, levels = 25, ((9216, 320), (2304, 640), (576, 1280), (144, 1280))
    batch = guided * frames
    run.work("image_encoder.vision_model.encoder", "linear", flops=int(0.33e12), moved=1 << 30, stage="image_encoder")
    run.work("vae.encode", "convolution", flops=int(1.1e12), moved=3 << 30, stage="vae.encode")
    down = [("down_blocks.0", 0, 2), ("down_blocks.1", 1, 2), ("down_blocks.2", 2, 2), ("down_blocks.3", 3, 2)]
    up = [("up_blocks.0", 3, 3), ("up_blocks.1", 2, 3), ("up_blocks.2", 1, 3), ("up_blocks.3", 0, 3)]
    for step in range(steps):
        run.work("unet.conv_in", "convolution", flops=2 * batch * 9216 * 9 * 8 * 320, moved=2 * batch * 9216 * 328)
        for name, level, layers in (*down, ("mid_block", 3, 1), *up):
            for layer in range(layers):
                _svd_layer(
                    run, f"unet.{name}", layer, step, batch, frames, *levels[level], attends=level < 3 or layers == 1
                )
        run.work("unet", "layout", moved=int(3.2e9), calls=12)  # concatenation of the skip connections
        run.work("scheduler.step", "elementwise", moved=40 << 20, calls=18, stage="scheduler")
    _decode(run, frames=frames)
    return _finish(
        run,
        title=f"Stable Video Diffusion XT, 1024 x 576, 25 frames, {steps} steps, bfloat16",
        pipeline="StableVideoDiffusionPipeline",
        denoisers=("UNetSpatioTemporalConditionModel",),
        arguments={
            "height": 576,
            "width": 1024,
            "num_frames": 25,
            "num_inference_steps": steps,
            "decode_chunk_size": 8,
        },
        weights={"unet": 3.05e9, "image_encoder": 1.26e9, "vae.decoder": 0.13e9, "vae.encoder": 0.07e9},
        burst=6.1e9,
        decode=11.8e9,
        idle=0.082,
    )


def _svd_layer(
    run: _Run, block: str, layer: int, step: int, batch: int, frames: int, n: int, width: int, *, attends: bool
) -> None:
    size = 2 * batch * n * width
    for part, taps in (("spatial_res_block", 9), ("temporal_res_block", 3)):
        resnet = f"{block}.resnets.{layer}.{part}"
        for name in ("norm1", "norm2"):
            run.work(f"{resnet}.{name}", "normalisation", moved=2 * size)
        for name in ("conv1", "conv2"):
            run.work(f"{resnet}.{name}", "convolution", flops=2 * batch * n * taps * width * width, moved=2 * size)
        run.work(resnet, "elementwise", moved=7 * size, calls=5)
        if taps == 3:
            run.work(resnet, "layout", moved=4 * size, calls=2)
    if not attends:
        return
    heads, videos = width // 64, batch // frames
    for inner, kind, rows, length in (
        ("transformer_blocks.0", "spatial", batch, n),
        ("temporal_transformer_blocks.0", "temporal", videos * n, frames),
    ):
        site = f"{block}.attentions.{layer}.{inner}"
        for attention, kv, how in (("attn1", length, kind), ("attn2", 1, "cross")):
            for name in ("to_q", "to_out.0") if how == "cross" else ("to_q", "to_k", "to_v", "to_out.0"):
                flops = 2 * batch * n * width * width
                run.work(f"{site}.{attention}.{name}", "linear", flops=flops, moved=2 * size)
            backend = {"spatial": "sdpa_cudnn", "temporal": "sdpa_flash", "cross": "sdpa_efficient"}[how]
            run.attention(f"{site}.{attention}", how, step, "0", rows, heads, length, kv, 64, backend)
        for name in ("norm1", "norm2", "norm3"):
            run.work(f"{site}.{name}", "normalisation", moved=2 * size)
        for name in ("ff.net.0.proj", "ff.net.2"):
            run.work(f"{site}.{name}", "linear", flops=8 * batch * n * width * width, moved=5 * size)
        run.work(site, "elementwise", moved=9 * size, calls=6)
        if kind == "temporal":
            run.work(site, "layout", moved=4 * size, calls=2)


def _decode(run: _Run, frames: int) -> None:
    for block in range(4):
        pixels = frames * (480 >> (3 - min(block, 3))) * (832 >> (3 - min(block, 3)))
        width = (384, 384, 192, 96)[block]
        for resnet in range(3):
            name = f"vae.decoder.up_blocks.{block}.resnets.{resnet}"
            for conv in ("conv1", "conv2"):
                flops = 2 * pixels * 27 * width * width
                run.work(f"{name}.{conv}", "convolution", flops=flops, moved=8 * pixels * width, stage="vae.decode")
            run.work(f"{name}.norm1", "normalisation", moved=16 * pixels * width, stage="vae.decode")
            run.work(name, "elementwise", moved=24 * pixels * width, calls=4, stage="vae.decode")


def _finish(
    run: _Run, *, weights: dict[str, float], burst: float, decode: float, idle: float, **facts: object
) -> Profile:
    rows = run.finished(idle)
    total = sum(row.ms for row in rows)
    return Profile(
        **facts,
        policy="",
        environment=ENVIRONMENT,
        device="NVIDIA H200",
        clock="device",
        clean_ms=(total, 0.996 * total, 1.007 * total),
        recorded_ms=1.043 * total,
        busy_ms=1.043 * total * (1 - idle),
        rows=rows,
        calls=tuple(run.calls),
        memory=_memory(run.steps, total, {k: int(v) for k, v in weights.items()}, int(burst), int(decode)),
        ceilings=CEILINGS,
        checks=(
            Check(name="time in named categories", value="99.6 %", wanted="at least 97 %", passed=True),
            Check(name="attention calls labelled", value="100 %", wanted="at least 99 %", passed=True),
            Check(name="rows sum to the wall time", value="1.0000", wanted="1 within 0.01", passed=True),
            Check(name="cost of recording", value="1.04x", wanted="at most 2x", passed=True),
            Check(name="output is finite", value="yes", wanted="yes", passed=True),
        ),
        notes=(
            "Bytes are of unfused operators: inputs read once and outputs written once, as if nothing stayed in a cache.",
            "The FLOPs of attention are those of the dense form; masks are not deducted.",
        ),
        frames=tuple(frame(i) for i in range(3)),
    )


def _memory(steps: int, total: float, weights: dict[str, int], burst: int, decode: int) -> Memory:
    """Every forward allocates and frees; the decoder has the peak."""
    base = sum(weights.values())
    timeline, denoised = [(0.0, base)], 0.86 * total
    points = 24 * steps
    for i in range(points):
        phase = i % 24
        rise = burst if phase in (7, 15) else int(burst * (0.35 + 0.3 * (phase % 4) / 3))
        timeline.append((denoised * (i + 1) / points, base + rise))
    for i, share in enumerate((0.2, 0.35, 0.5, 0.72, 1.0, 0.4, 0.05)):
        timeline.append((denoised + (total - denoised) * (i + 1) / 7, base + int(decode * share)))
    peak_ms, peak = max(timeline, key=lambda point: point[1])
    activations = {"vae.decoder.up_blocks.3.resnets.0.conv1": 0.52, "vae.decoder.up_blocks.3.resnets.0": 0.31}
    return Memory(
        weights_bytes=base,
        peak_bytes=peak,
        peak_ms=peak_ms,
        peak_module="vae.decoder.up_blocks.3.resnets.0.conv1",
        timeline=tuple(timeline),
        modules=(
            ModuleMemory(
                module="vae.decoder.up_blocks.3.resnets.0", peak_bytes=peak, allocated_bytes=int(0.8 * decode)
            ),
            ModuleMemory(
                module="vae.decoder.up_blocks.3.resnets.1", peak_bytes=peak - 2**28, allocated_bytes=decode // 2
            ),
            *(
                ModuleMemory(
                    module=f"transformer.blocks.{i}.{part}",
                    peak_bytes=base + int(burst * scale),
                    allocated_bytes=int(burst * scale / 2),
                )
                for i in range(4)
                for part, scale in (("ffn.net.0", 1.0), ("attn1", 0.72), ("attn2", 0.41))
            ),
        ),
        alive=(
            *(Alive(module=module, what="weights", bytes=size) for module, size in weights.items()),
            *(Alive(module=module, what="activations", bytes=int(decode * s)) for module, s in activations.items()),
            Alive(module="vae.decoder", what="caches", bytes=int(0.15 * decode)),
            Alive(module="pipeline", what="activations", bytes=int(0.02 * decode)),
        ),
    )


def frame(index: int, noise: float = 0.0, size: tuple[int, int] = (120, 208)) -> str:
    """A small picture, PNG in base64: a bright disc over a dusk sky that wanders from frame to frame."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / size[0]
    sky = np.stack([0.16 + 0.55 * y, 0.22 + 0.28 * y, 0.46 - 0.14 * y], -1)
    disc = np.clip(1 - ((x - 0.5 - 0.14 * index) ** 2 + (y - 0.42) ** 2) * 26, 0, 1)[..., None]
    hills = (y > 0.74 + 0.06 * np.sin(5 * x + 0.5 * index))[..., None]
    picture = np.where(hills, 0.14, sky * (1 - disc) + disc * np.array([1.0, 0.83, 0.52]))
    picture = picture + noise * np.random.default_rng(index).normal(size=picture.shape)
    return _png(picture)


def _png(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def broken(profile: Profile) -> Profile:
    """The same, broken off after its first step: no clean run to its end, a failed check, no memory pass."""
    return replace(
        profile,
        error="OutOfMemoryError in vae.decode: CUDA out of memory. Tried to allocate 9.20 GiB",
        clean_ms=(),
        rows=tuple(row for row in profile.rows if not row.stage.startswith("vae")),
        calls=tuple(call for call in profile.calls if call.step == 0),
        memory=None,
        frames=(),
        checks=(
            Check(name="time in named categories", value="93.1 %", wanted="at least 97 %", passed=False),
            Check(name="attention calls labelled", value="100 %", wanted="at least 99 %", passed=True),
        ),
    )


def empty() -> Profile:
    """Broken off before anything was recorded."""
    return Profile(
        title="Wan 2.1 T2V 1.3B, 832 x 480, 81 frames, 4 steps",
        pipeline="WanPipeline",
        denoisers=("WanTransformer3DModel",),
        arguments={},
        policy="",
        environment={},
        device="cpu",
        clock="host",
        clean_ms=(),
        recorded_ms=0.0,
        busy_ms=0.0,
        rows=(),
        calls=(),
        memory=None,
        ceilings=None,
        checks=(),
        notes=(),
        error="RuntimeError in text_encoder: the first module raised",
    )


def large() -> Profile:
    """8000 attention calls and 5000 rows, none like another, with long kernel names."""
    profile = svd(steps=125)
    names = [
        f"void at::native::vectorized_elementwise_kernel<4, functor_{i}, std::array<char*, 3ul>>" for i in range(40)
    ]
    extra = 5000 - len(profile.rows)
    rows = tuple(
        Row(
            stage="unet",
            module=f"unet.part_{i % 61}.layer_{i // 61}.{'qkvo'[i % 4]}_of_a_rather_long_name",
            operator=("linear", "elementwise", "layout", "convolution")[i % 4],
            calls=125 + i,
            ms=0.5 + (i * 7919 % 997) / 331,
            flops=10**9 * (i + 1) if i % 4 in (0, 3) else 0,
            pointwise=10**6 * (i + 1),
            bytes=10**7 * (i + 3),
            ops={names[(i + j) % 40]: 0.1 * (j + 1) for j in range(3)},
        )
        for i in range(extra)
    )
    return replace(profile, rows=profile.rows + rows, calls=profile.calls[:8000])


def _with_attention(profile: Profile, speed: float) -> Profile:
    """The same run with full attention so many times as fast, by a kernel of ours."""
    rows = tuple(replace(row, ms=row.ms / speed) if row.operator == "full" else row for row in profile.rows)
    total = sum(row.ms for row in rows)
    return replace(
        profile,
        policy="balanced",
        rows=rows,
        calls=tuple(
            replace(call, ms=call.ms / speed, backend="flash_hopper") if call.kind == "full" else call
            for call in profile.calls
        ),
        clean_ms=(total, 0.997 * total, 1.004 * total),
        recorded_ms=1.05 * total,
        busy_ms=total,
    )


def comparison(steps: int = 4) -> Comparison:
    """Wan before and after, with attention 1.6 times as fast and a video that differs a little."""
    base, patched = wan(steps), wan(steps, attention_speed=1.6)
    psnr = tuple(34.0 - 0.07 * i + 1.8 * math.sin(1.7 * i) for i in range(81))
    ratio = base.clean_ms[0] / patched.clean_ms[0]
    quality = Quality(
        identical=False,
        psnr=31.2,
        psnr_mean=31.6,
        psnr_frames=psnr,
        worst_frame=int(np.argmin(psnr)),
        psnr_worst=min(psnr),
        ssim=0.9612,
        ssim_worst=0.9388,
        flicker_psnr=36.4,
        motion=0.992,
    )
    floor = replace(quality, psnr=33.9, psnr_frames=tuple(36.5 - 0.06 * i for i in range(81)), ssim=0.9741)
    return Comparison(
        title=base.title,
        policy="balanced",
        base=base,
        patched=patched,
        timing=Timing(
            base_ms=base.clean_ms + base.clean_ms[:1],
            patched_ms=patched.clean_ms + patched.clean_ms[:1],
            ratio=ratio,
            ci_lo=ratio - 0.012,
            ci_hi=ratio + 0.011,
            noise=0.006,
            verdict="faster",
            first_base_ms=1.4 * base.clean_ms[0],
            first_patched_ms=1.9 * patched.clean_ms[0],
            planning_ms=2140.0,
        ),
        base_calls=2 * steps,
        patched_calls=2 * steps,
        quality=quality,
        floor=floor,
        latents=tuple(0.002 * 1.6**i for i in range(steps)),
        lpips=None,
        lpips_why="the package lpips is not installed",
        control=Control(why="as many network calls as the base run: the base run itself is the control"),
        pairs=tuple(
            Pair(index=16 * i, base=frame(i), patched=frame(i, 0.03), difference=_png(_heat(i))) for i in range(5)
        ),
        notes=("The first generation of each is in no figure: it compiles and plans.",),
    )


def _heat(index: int) -> np.ndarray:
    noise = np.abs(np.random.default_rng(index).normal(size=(120, 208))) * 0.24
    return np.stack([np.clip(3 * noise, 0, 1), np.clip(3 * noise - 1, 0, 1), np.clip(3 * noise - 2, 0, 1)], -1)
