"""Export: a run or any source of weights as an open_clip, transformers or plain PyTorch model."""

from diva_jax.common import calls

calls.make_callable(__name__, "diva_jax.api:export")
