"""The values that the fields of a backbone may have, wherever they come from: a config, or the files of weights."""

import dataclasses

from diva_jax.common import fields
from diva_jax.common.fields import between, whole
from diva_jax.models.backbones import Spec

_HUGE = 2**20  # Of a width; beyond it, one matrix alone has a terabyte.
_channels = lambda v: len(v) == 3 and all(fields.finite(x) and abs(x) <= 1000 for x in v)  # noqa: E731

RULES = (
    *(whole(field, 1, _HUGE) for field in ("width", "mlp_dim", "embed_dim")),
    *(whole(field, 1, 1024) for field in ("layers", "heads")),
    *(whole(field, 1, 2**14) for field in ("image_size", "patch_size")),
    between("norm_eps", 0, 1),
    *((field, _channels, "must be three numbers, none above 1000") for field in ("mean", "std")),
    ("std", lambda v: all(x > 0 for x in v), "must be above 0"),
    whole("registers", 0, 1024),
)
_TEXT_RULES = (
    *(whole(field, 1, _HUGE) for field in ("width", "mlp_dim")),
    *(whole(field, 1, 1024) for field in ("layers", "heads")),
    whole("context_length", 1, 2**16),
    whole("vocab_size", 1, 2**24),
    whole("eos_id", 0, 2**24),
    between("norm_eps", 0, 1),
)


def check(spec: Spec, where: str) -> Spec:
    """Returns the Spec of a description that was read from files, if its values are possible.

    Args:
      spec: as read.
      where: the file or folder, for the message.

    Raises:
      UserError: a value is not; names it.
    """
    fields.require(dataclasses.asdict(spec), RULES, f"{where}: backbone")
    if spec.has_text:
        fields.require(dataclasses.asdict(spec.text), _TEXT_RULES, f"{where}: backbone.text")
    for name, tower in (("backbone", spec), *([("backbone.text", spec.text)] if spec.has_text else [])):
        rule = ("heads", lambda heads, width=tower.width: width % heads == 0, f"must divide the width, {tower.width}")
        fields.require({"heads": tower.heads}, [rule], f"{where}: {name}")
    return spec
