"""Tune CLIP vision encoders through a frozen diffusion U-Net (DIVA, arXiv 2407.20171), in JAX."""

__version__ = "0.1.0"
