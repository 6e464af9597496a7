"""Name tables of a backbone's towers. Each requires its tower's names in an open_clip checkpoint and ignores other
known ones.
"""

from diva_jax.models.backbones import Spec, architecture
from diva_jax.models.backbones.shared.text import require_text
from diva_jax.models.names import Table


def vision_table(spec: Spec) -> Table:
    """Returns the table from `Vision` to `visual.*`; see the architecture's `VISION`."""
    return architecture(spec.arch).VISION


def text_table(spec: Spec) -> Table:
    """The table from `Text` to names at the top level for CLIP, and under `text.` for SigLIP and EVA02-CLIP; a
    UserError without a text tower.
    """
    require_text(spec)
    return architecture(spec.arch).TEXT
