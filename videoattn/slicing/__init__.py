"""Parts of a model run slice by slice, with the same result and less memory.

After "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (Zhan et al., NeurIPS 2024): a group of operators
of one domain (spatial: each frame by itself; temporal: each place by itself; tokens) runs on one slice after the other and
writes into an output made beforehand, so that what stands between its operators exists for one slice only.

    budget.py      "11GiB" -> bytes
    slices.py      how a group is cut, and what runs it
    norm.py        GroupNorm over what lies in other slices
    registry.py    which file knows the sliced forward of a class; one file a family beside it
"""
