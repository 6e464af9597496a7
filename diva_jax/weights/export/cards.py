"""The README of an export, as the hub's model cards are: properties, use, scores, caveats, origin and config."""

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from typing import Any

from diva_jax.common import paths
from diva_jax.models.backbones import Spec, architecture
from diva_jax.weights import readers
from diva_jax.weights.origins import ClipSource

_USE = {
    "open_clip": """import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("SCHEME:PATH")
tokenizer = open_clip.get_tokenizer("SCHEME:PATH")""",
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


def card(
    source: ClipSource,
    spec: Spec,
    fmt: str,
    dtype: str,
    provenance: dict | None,
    notes: Sequence[str] = (),
    *,
    path: str = "PATH",
    hub: str = "",
    license: str = "",
    base_model: str = "",
    scores: Mapping[str, Any] | None = None,
) -> str:
    """Returns the content of README.md.

    Args:
      source: the exported weights.
      spec: the backbone.
      fmt: the format, "open_clip", "hf" or "pt".
      dtype: the dtype of the exported weights.
      provenance: the `run` of a source, or None for a conversion.
      notes: sentences about the export itself, such as what it lacks.
      path: the folder of the export, for the lines that load it.
      hub: the hub repository that it is pushed to, which then takes the place of `path`.
      license: an identifier as the hub has them, such as "mit"; empty: the card says that of the base model applies.
      base_model: the hub id of the model that it comes from; empty: not known.
      scores: what `publish.scores_of` found; None: no results were given.
    """
    name = spec.open_clip_name or f"{spec.arch} {spec.image_size}"
    library = "transformers" if fmt == "hf" else architecture(spec.arch).LIBRARY
    method = provenance["config"]["objective"] if provenance else ""
    squash = "squashed to a square" if spec.resize_mode == "squash" else "shortest side resized, centre cropped"
    use = _USE[fmt] if library in ("open_clip", "transformers") else _USE_STATE_DICT
    use = use.replace("SCHEME", "hf-hub" if hub else "local-dir").replace("PATH", hub or path)
    lines = [
        *_metadata(spec, fmt, library, method, license, base_model),
        f"# {name}{f', tuned with {method}' if method else ''}",
        "",
        f"{spec.image_size} px, patch {spec.patch_size}, width {spec.width}, {spec.layers} layers, {spec.activation}, "
        f"weights in {dtype}. Images: {squash}, {spec.interpolation}, mean {list(spec.mean)}, std {list(spec.std)}.",
        "",
        "```python",
        use,
        "```",
        "",
        *(line for note in notes for line in (f"**Note:** {note}.", "")),
        *(_scores(scores) if scores else ()),
        *_caveats(provenance, license, scores),
        "## Origin",
        "",
        *_origin(source, provenance),
    ]
    versions = ", ".join(f"{p} {_version(p)}" for p in ("diva_jax", "jax", "flax", "numpy"))
    lines += [f"- written by {versions}", ""]
    if provenance is not None:
        config = json.dumps(provenance["config"], indent=1)
        lines += ["<details><summary>Config of the run</summary>", "", "```json", config, "```", "", "</details>", ""]
    return paths.without_secrets("\n".join(lines))


def _metadata(spec: Spec, fmt: str, library: str, method: str, license: str, base_model: str) -> list[str]:
    """Returns the lines that the hub reads."""
    both = spec.has_text and fmt != "pt"
    tags = ["clip", *([method] if method else [])] if spec.has_text else [method] if method else []
    lines = ["---", f"license: {license or 'other'}"]
    if not license:
        lines.append("license_name: that-of-the-base-model")
    if base_model:
        lines += [f"base_model: {base_model}", *(["base_model_relation: finetune"] if method else [])]
    lines.append(f"pipeline_tag: {'zero-shot-image-classification' if both else 'image-feature-extraction'}")
    return [*lines, f"library_name: {library}", f"tags: [{', '.join(tags)}]", "---"]


def _figure(score: Mapping[str, Any] | None, key: str, unit: str) -> str:
    if not score or key not in score:
        return ""
    form = ".2f" if unit == "%" else ".4g"
    text = f"{score[key]:{'+' * (key == 'difference')}{form}}"
    return text + (" ({:{f}} to {:{f}})".format(*score["interval"], f=form) if score.get("interval") else "")


def _scores(scores: Mapping[str, Any]) -> list[str]:
    """Returns the table of scores, with those of the weights that they are compared with."""
    head = ["| task | score | " + (f"{scores['reference']} | " if scores["reference"] else "") + "this model | "]
    head[0] += "difference |" if scores["reference"] else ""
    columns = head[0].count("|") - 1
    rows = []
    for row in scores["rows"]:
        unit = row["unit"]
        cells = [row["task"], row["title"] + (f" [{unit}]" if unit else "")]
        if scores["reference"]:
            cells.append(_figure(row["before"], "score", unit))
        cells.append(_figure(row["score"], "score", unit))
        if scores["reference"]:
            cells.append(_figure(row["difference"], "difference", unit) or _figure(row["difference"], "score", unit))
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    about = f"With 95% intervals, from `{scores['file']}` of {scores['created'][:10]}."
    return ["## Scores", "", about, "", head[0].strip(), "|" + "---|" * columns, *rows, ""]


def _caveats(provenance: dict | None, license: str, scores: Mapping[str, Any] | None) -> list[str]:
    lines = []
    if scores and scores["reference"]:
        lines.append("A difference whose interval includes zero shows no difference.")
    elif not scores:
        lines.append("No scores were given with this export: measure it before it takes the place of another model.")
    if provenance is not None:
        lines.append(
            "Its embeddings are not those of the model that it was tuned from: indexes, probes and adapters made with "
            "that model must be made again."
        )
        if "text" not in provenance["tuned"]:
            lines.append("The text tower was not tuned, so zero-shot classification and retrieval can be worse.")
    if not license:
        lines.append("No license was given: that of the base model, and of the data, applies.")
    return ["## Caveats", "", *(f"- {line}" for line in lines), ""]


def _origin(source: ClipSource, provenance: dict | None) -> list[str]:
    if provenance is None:
        return [f"- converted from `{source.where}` ({source.kind}), sha256 `{readers.fingerprint(source.files)}`"]
    config = provenance["config"]
    return [
        f"- run `{provenance['workdir']}`, step {provenance['step']}, objective {config['objective']}",
        f"- data `{config['data']['path']}`, {config['batch_size']} images per step, seed {config['seed']}",
        *(["- the moving average of the trained weights"] if config.get("ema", {}).get("decay") else []),
        f"- tuned from `{provenance['base']}`: {', '.join(provenance['tuned'])}; the rest is unchanged",
        *(f"- {part}: {', '.join(s['source'])}, sha256 `{s['sha256']}`" for part, s in provenance["sources"].items()),
    ]
