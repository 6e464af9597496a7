"""The towers of a backbone, by name: their modules, and their name tables in open_clip's checkpoints.

Each table requires its tower's names and ignores the other known ones.
"""

from collections.abc import Mapping

from flax import nnx

from diva_jax.models import backbones, layers
from diva_jax.models.backbones import Spec, architecture
from diva_jax.models.backbones.shared.text import Text, require_text
from diva_jax.models.names import Table, flat

SCALARS = ("logit_scale", "logit_bias")
_MODULES = {"vision": backbones.build, "text": Text}
TOWERS = tuple(_MODULES)


def vision_table(spec: Spec) -> Table:
    """The table from `Vision` to `visual.*`; see the architecture's `VISION`."""
    return architecture(spec.arch).VISION


def text_table(spec: Spec) -> Table:
    """The table from `Text` to names at the top level for CLIP, else under `text.`; a UserError without a text."""
    require_text(spec)
    return architecture(spec.arch).TEXT


def table(tower: str, spec: Spec) -> Table:
    """The table of the tower "vision" or "text"."""
    return vision_table(spec) if tower == "vision" else text_table(spec)


def abstract(tower: str, spec: Spec, **kw) -> nnx.Module:
    """The tower "vision" or "text" with shapes in place of arrays; other arguments as `backbones.build`'s."""
    return layers.abstract(lambda rngs: _MODULES[tower](spec, rngs=rngs, **kw))


def misfits(tower: str, shapes: Mapping[str, tuple[int, ...]], spec: Spec) -> list[str]:
    """The names at which parameters (name -> shape) are not those of a tower of `spec`, or not the scalar `tower`."""
    want = {tower: ()} if tower in SCALARS else {}
    if tower in TOWERS:
        want = {"/".join(map(str, path)): var.shape for path, var in flat(abstract(tower, spec)).items()}
    return sorted(n for n in want.keys() | shapes.keys() if n not in shapes or shapes[n] != want.get(n))
