"""One video twice from the same seed: as diffusers runs it, and after `enable_fast_attention`.

    python examples/text_to_video.py
    python examples/text_to_video.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat walks on the grass"

Writes baseline.mp4, fast.mp4 and contact_sheet.png, and prints what each run cost and what was swapped.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import videoattn
from videoattn.generation import Settings, add_arguments, generate, load
from videoattn.quality import compare_videos, noise_floor
from videoattn.video import write_contact_sheet, write_video

TINY = str(Path(__file__).parent / "models" / "tiny-wan")
TINY_SETTINGS = {
    "prompt": "a red circle moves left over a blue background",
    "steps": 25,
    "guidance": 3.0,
    "height": 192,
    "width": 192,
    "frames": 25,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=TINY, help="a folder or a hub id (default: the model shipped here)")
    add_arguments(parser, out="outputs")
    args = parser.parse_args(argv)
    settings = Settings.of(args, **(TINY_SETTINGS if args.model == TINY else {}))

    pipe = load(args.model)
    generate(pipe, replace(settings, steps=1))  # the first run in a process is slower, whatever it runs
    baseline = generate(pipe, settings)
    policy = videoattn.Policy.of(args.preset)
    videoattn.enable_fast_attention(pipe, policy)
    fast = generate(pipe, settings)

    write_video(baseline.frames, args.out / "baseline.mp4")
    write_video(fast.frames, args.out / "fast.mp4")
    write_contact_sheet({"diffusers": baseline.frames, policy.name: fast.frames}, args.out / "contact_sheet.png")

    table = Table(title=settings.prompt, title_justify="left", caption=f"memory: {fast.memory}")
    for column in ("run", "seconds", "denoiser calls", "peak memory", "PSNR to diffusers"):
        table.add_column(column, justify="left" if column == "run" else "right")
    difference = compare_videos(fast.frames, baseline.frames)
    psnr = "identical" if difference.identical else f"{difference.psnr:.1f} dB"
    for label, run, against in (("diffusers", baseline, ""), (policy.name, fast, psnr)):
        table.add_row(label, f"{run.seconds:.1f}", str(run.calls), f"{run.peak_gib:.2f} GiB", against)
    Console().print(table)
    print(videoattn.report(pipe))
    if not difference.identical:
        floor = noise_floor(pipe, lambda: generate(pipe, settings).frames)
        print(f"Noise floor: two exact kernels of torch are {floor.psnr:.1f} dB apart on this video.")
    if not torch.cuda.is_available():
        print(
            "On a CPU no speed-up is to be expected: attention is computed exactly, by the kernel that diffusers uses."
        )
    print(f"{args.out}: baseline.mp4, fast.mp4, contact_sheet.png")


if __name__ == "__main__":
    main()
