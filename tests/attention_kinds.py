"""What each attention layer of the tiny pipelines attends to, written by reading the host's forwards."""

WAN = ("wan", {"blocks.#.attn1": "full", "blocks.#.attn2": "cross"})
JOINT = {
    "context_embedder.token_refiner.refiner_blocks.#.attn": "text",
    "transformer_blocks.#.attn": "joint",
}
FULL_AND_CROSS = {"transformer_blocks.#.attn1": "full", "transformer_blocks.#.attn2": "cross"}
UNET3D = {
    "transformer_in.transformer_blocks.#.attn1": "temporal",
    "transformer_in.transformer_blocks.#.attn2": "temporal",
    "down_blocks.#.attentions.#.transformer_blocks.#.attn1": "spatial",
    "down_blocks.#.attentions.#.transformer_blocks.#.attn2": "cross",
    "down_blocks.#.temp_attentions.#.transformer_blocks.#.attn1": "temporal",
    "down_blocks.#.temp_attentions.#.transformer_blocks.#.attn2": "temporal",
    "mid_block.attentions.#.transformer_blocks.#.attn1": "spatial",
    "mid_block.attentions.#.transformer_blocks.#.attn2": "cross",
    "mid_block.temp_attentions.#.transformer_blocks.#.attn1": "temporal",
    "mid_block.temp_attentions.#.transformer_blocks.#.attn2": "temporal",
    "up_blocks.#.attentions.#.transformer_blocks.#.attn1": "spatial",
    "up_blocks.#.attentions.#.transformer_blocks.#.attn2": "cross",
    "up_blocks.#.temp_attentions.#.transformer_blocks.#.attn1": "temporal",
    "up_blocks.#.temp_attentions.#.transformer_blocks.#.attn2": "temporal",
}

# pipeline -> (adapter, module path with numbers as # -> kind), by reading the host's forward
EXPECTED = {
    "wan": WAN,
    "wan22": WAN,
    "wan22_ti2v": WAN,
    "wan22_i2v": WAN,
    "wan21_i2v": WAN,
    "wan_v2v": WAN,
    "skyreels_v2": ("generic", WAN[1]),
    "hunyuan_video": ("hunyuan_video", JOINT | {"single_transformer_blocks.#.attn": "joint"}),
    "hunyuan_video15": ("hunyuan_video15", JOINT),
    "cogvideox": ("cogvideox", {"transformer_blocks.#.attn1": "joint"}),
    "cogvideox_rope": ("cogvideox", {"transformer_blocks.#.attn1": "joint"}),
    "ltx": ("ltx", FULL_AND_CROSS),
    "ltx2": (
        "generic",
        FULL_AND_CROSS
        | {
            "transformer_blocks.#.audio_attn1": "audio",
            "transformer_blocks.#.audio_attn2": "cross",
            "transformer_blocks.#.audio_to_video_attn": "cross",
            "transformer_blocks.#.video_to_audio_attn": "cross",
        },
    ),
    "mochi": ("generic", {"transformer_blocks.#.attn1": "joint"}),
    "latte": (
        "generic",
        {
            "transformer_blocks.#.attn1": "spatial",
            "transformer_blocks.#.attn2": "cross",
            "temporal_transformer_blocks.#.attn1": "temporal",
        },
    ),
    "allegro": ("generic", FULL_AND_CROSS),
    "cosmos": ("generic", FULL_AND_CROSS),
    "kandinsky5": (
        "generic",
        {
            "text_transformer_blocks.#.self_attention": "text",
            "visual_transformer_blocks.#.self_attention": "full",
            "visual_transformer_blocks.#.cross_attention": "cross",
        },
    ),
    "animatediff": (
        "animatediff",
        {
            "down_blocks.#.attentions.#.transformer_blocks.#.attn1": "spatial",
            "down_blocks.#.attentions.#.transformer_blocks.#.attn2": "cross",
            "down_blocks.#.motion_modules.#.transformer_blocks.#.attn1": "temporal",
            "down_blocks.#.motion_modules.#.transformer_blocks.#.attn2": "temporal",
            "mid_block.attentions.#.transformer_blocks.#.attn1": "spatial",
            "mid_block.attentions.#.transformer_blocks.#.attn2": "cross",
            "mid_block.motion_modules.#.transformer_blocks.#.attn1": "temporal",
            "mid_block.motion_modules.#.transformer_blocks.#.attn2": "temporal",
            "up_blocks.#.attentions.#.transformer_blocks.#.attn1": "spatial",
            "up_blocks.#.attentions.#.transformer_blocks.#.attn2": "cross",
            "up_blocks.#.motion_modules.#.transformer_blocks.#.attn1": "temporal",
            "up_blocks.#.motion_modules.#.transformer_blocks.#.attn2": "temporal",
        },
    ),
    "text_to_video_sd": ("modelscope", UNET3D),
    "svd": (
        "svd",
        {
            f"{block}.attentions.#.{blocks}.#.{attn}": kind
            for block in ("down_blocks.#", "mid_block", "up_blocks.#")
            for blocks, attn, kind in (
                ("transformer_blocks", "attn1", "spatial"),
                ("transformer_blocks", "attn2", "cross"),
                ("temporal_transformer_blocks", "attn1", "temporal"),
                ("temporal_transformer_blocks", "attn2", "cross"),
            )
        },
    ),
    "i2vgen_xl": ("generic", UNET3D | {"image_latents_temporal_encoder.attn1": "temporal"}),
}
