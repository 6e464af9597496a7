"""Diffusion models: U-Nets, VAEs, text encoders, noise schedules, and a transformer of rectified flow."""
