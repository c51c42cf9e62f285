"""Step rehash: some of a sampler's steps run the network, the others reuse what those gave.

After "Fast and Memory-Efficient Video Diffusion Using Streamlined Inference" (Zhan et al., NeurIPS 2024), Step Rehash. What a
step gives is always a sum of what the network gave at earlier steps, with weights; which steps run (`keysteps.py`), what is
reused (`families.py`) and with which weights (`weights.py`) are three choices of their own.
"""
