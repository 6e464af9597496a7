"""What `import diva_jax` offers to people who write Python: commands as functions, encoders and losses as objects."""

from diva_jax.api.actions import evaluate, export, train
from diva_jax.api.encoder import Encoder, load
from diva_jax.api.losses import Loss, objective

__all__ = ["Encoder", "Loss", "evaluate", "export", "load", "objective", "train"]
