"""Wan 2.1 1.3B with fast attention: 81 frames of 480x832. Needs an NVIDIA GPU."""

import torch
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video

import videoattn

model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
vae = AutoencoderKLWan.from_pretrained(model, subfolder="vae", dtype=torch.float32)
pipe = WanPipeline.from_pretrained(model, vae=vae, dtype=torch.bfloat16).to("cuda")

pipe = videoattn.enable_fast_attention(pipe)

frames = pipe(prompt="a cat walks on the grass", height=480, width=832, num_frames=81).frames[0]
export_to_video(frames, "wan.mp4", fps=16)
print(videoattn.report(pipe))
