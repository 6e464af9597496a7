"""Objectives that make the world's models; a config names them by their dotted paths."""

CLIP, LATENT, DIVA = (f"{__name__}.{name}" for name in ("clip", "latent", "diva"))
