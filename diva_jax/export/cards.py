"""The README of an export, with the model's properties and its origin: run, step, data and config."""

import importlib.metadata
import json

from diva_jax.common import paths
from diva_jax.models.backbones import Spec, architecture
from diva_jax.weights import readers
from diva_jax.weights.origins import ClipSource

_USE = {
    "open_clip": """import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:PATH")
tokenizer = open_clip.get_tokenizer("local-dir:PATH")""",
    "hf": """from transformers import AutoImageProcessor, AutoModel
model, processor = AutoModel.from_pretrained("PATH"), AutoImageProcessor.from_pretrained("PATH")
# LLaVA: --vision_tower PATH""",
    "pt": """import torch
clip.visual.load_state_dict(torch.load("PATH/vision_tower.pth", weights_only=True))""",
}
# For a state dict of an architecture that open_clip does not have.
_USE_STATE_DICT = """import torch
model.load_state_dict(torch.load("PATH/vision_tower.pth", weights_only=True))"""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def card(source: ClipSource, spec: Spec, fmt: str, dtype: str, provenance: dict | None) -> str:
    """Returns the content of README.md.

    Args:
      source: the exported weights.
      spec: the backbone.
      fmt: the format, "open_clip", "hf" or "pt".
      dtype: the dtype of the exported weights.
      provenance: the provenance from `runs.run_source`, or None for a conversion.
    """
    name = spec.open_clip_name or f"{spec.arch} {spec.image_size}"
    library = "transformers" if fmt == "hf" else architecture(spec.arch).LIBRARY
    method = provenance["config"]["objective"] if provenance else ""
    tags = [*(["clip"] if spec.has_text else ["image-feature-extraction"]), *([method] if method else [])]
    squash = "squashed to a square" if spec.resize_mode == "squash" else "shortest side resized, centre cropped"
    lines = [
        "---",
        f"library_name: {library}",
        f"tags: [{', '.join(tags)}]",
        "---",
        f"# {name}{f', tuned with {method}' if method else ''}",
        "",
        f"{spec.image_size} px, patch {spec.patch_size}, width {spec.width}, {spec.layers} layers, {spec.activation}, "
        f"weights in {dtype}. Images: {squash}, {spec.interpolation}, mean {list(spec.mean)}, std {list(spec.std)}.",
        "",
        "```python",
        _USE[fmt] if library in ("open_clip", "transformers") else _USE_STATE_DICT,
        "```",
        "",
        "## Origin",
        "",
    ]
    if provenance is None:
        lines += [f"- converted from `{source.where}` ({source.kind}), sha256 `{readers.fingerprint(source.files)}`"]
    else:
        config = provenance["config"]
        lines += [
            f"- run `{provenance['workdir']}`, step {provenance['step']}, objective {config['objective']}",
            f"- data `{config['data']['path']}`, {config['batch_size']} images per step, seed {config['seed']}",
            *(["- the moving average of the trained weights"] if config.get("ema", {}).get("decay") else []),
            f"- tuned from `{provenance['base']}`: {', '.join(provenance['tuned'])}; the rest is unchanged",
        ]
        lines += [
            f"- {part}: {', '.join(s['source'])}, sha256 `{s['sha256']}`" for part, s in provenance["sources"].items()
        ]
    versions = ", ".join(f"{p} {_version(p)}" for p in ("diva_jax", "jax", "flax", "numpy"))
    lines += [f"- written by {versions}", ""]
    if provenance is not None:
        lines += ["## Config", "", "```json", json.dumps(provenance["config"], indent=1), "```", ""]
    return paths.without_secrets("\n".join(lines))
