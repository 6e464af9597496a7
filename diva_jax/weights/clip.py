"""Name tables of the towers of a backbone, between our modules and open_clip's checkpoints.

An open_clip checkpoint has both towers and the scale and bias of the logits. The table of one tower requires the names
of that tower, ignores the other known names, and rejects unknown names.
"""

from diva_jax.models.backbones import Spec, architecture
from diva_jax.models.backbones.shared.text import require_text
from diva_jax.models.names import Table


def vision_table(spec: Spec) -> Table:
    """Returns the table from `Vision` to `visual.*`; see the architecture's `VISION`."""
    return architecture(spec.arch).VISION


def text_table(spec: Spec) -> Table:
    """Returns the table from `Text` to names at the top level for CLIP, and under `text.` for SigLIP and EVA02-CLIP.

    Raises:
      UserError: there is no text tower.
    """
    require_text(spec)
    return architecture(spec.arch).TEXT
