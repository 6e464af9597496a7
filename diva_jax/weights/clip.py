"""Name tables of a backbone's towers, between our modules and open_clip's checkpoints.

An open_clip checkpoint holds both towers and the logits' scale and bias. The table of one tower is strict about that
tower's names, knows and ignores the rest, and so refuses a name that neither has.
"""

from diva_jax.models.backbones import Spec, architecture
from diva_jax.models.backbones.shared.text import require_text
from diva_jax.models.names import Table


def vision_table(spec: Spec) -> Table:
    """Our `Vision` <-> `visual.*`; see the architecture's `VISION`."""
    return architecture(spec.arch).VISION


def text_table(spec: Spec) -> Table:
    """Our `Text` <-> names at the top level for CLIP, under `text.` for SigLIP and EVA02-CLIP.

    Raises:
      UserError: there is no text tower.
    """
    require_text(spec)
    return architecture(spec.arch).TEXT
