"""Parts of a model run slice by slice, with the same result and less memory.

After "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (Zhan et al., NeurIPS 2024): a group of operators
of one domain (spatial: each frame by itself; temporal: each place by itself; tokens) runs on one slice after the other and
writes into an output made beforehand, so that what stands between its operators exists for one slice only.

    budget.py      "11GiB" -> bytes
    slices.py      how a group is cut, and what runs it
    norm.py        GroupNorm over what lies in other slices
    whole.py       when a module runs whole nevertheless
    registry.py    which file knows the sliced forward of a class, one file a family:
                   unet_motion.py, unet_spatio_temporal.py, unet_3d.py (they share spatial_temporal.py and handover.py);
                   tokens.py with attending.py; decoders.py, decoder_wan.py
    install.py     a sliced forward in a module's place, and back
    session.py     what was done to one model, its slices by a number or by a budget, and the undoing
    forecast.py    what a call will take; decoding.py: what a generation will decode
    decoder_switches.py   diffusers' own switches of a VAE
    streaming.py   attention whose keys and values stay in the host's memory
"""
