"""AnimateDiff on a Stable Diffusion 1.5 model with fast attention: 16 frames of 512x512. Needs an NVIDIA GPU."""

import torch
from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter
from diffusers.utils import export_to_gif

import videoattn

adapter = MotionAdapter.from_pretrained("guoyww/animatediff-motion-adapter-v1-5-2", dtype=torch.float16)
model = "emilianJR/epiCRealism"
scheduler = DDIMScheduler.from_pretrained(
    model, subfolder="scheduler", clip_sample=False, timestep_spacing="linspace", beta_schedule="linear", steps_offset=1
)
pipe = AnimateDiffPipeline.from_pretrained(model, motion_adapter=adapter, scheduler=scheduler, dtype=torch.float16).to(
    "cuda"
)

pipe = videoattn.enable_fast_attention(pipe)

frames = pipe(prompt="waves roll onto a beach at sunset", negative_prompt="low quality", num_frames=16).frames[0]
export_to_gif(frames, "animatediff.gif")
print(videoattn.report(pipe))
