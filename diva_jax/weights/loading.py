"""Loads weights from any source into one model; `training.load` does so for a whole training program."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.common.log import say
from diva_jax.models import layers
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.text import require_text
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.weights import clip, diffusers, names, origins, places, readers, resample

# Config class -> (folder in a diffusers pipeline, model, names, stems of the weights' file).
_SD = {
    UNetConfig: ("unet", UNet, diffusers.UNET, ("diffusion_pytorch_model",)),
    VAEConfig: ("vae", VAE, diffusers.VAE, ("diffusion_pytorch_model",)),
    TextEncoderConfig: ("text_encoder", TextEncoder, diffusers.TEXT_ENCODER, ("model", "pytorch_model")),
}


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source that has been found and checked: its files, and (abstract state, put=None) -> the state, filled; `put`
    as for `names.assign`.
    """

    files: list[Path]
    fill: Callable[..., nnx.State]


def _part(config):
    """The row of `_SD`; any other class is a `presets.LatentCode` in place of the VAE."""
    if (row := _SD.get(type(config))) is not None:
        return row
    return "vae", type(config).build, names.Table("latent code"), ("diffusion_pytorch_model",)


def check_text(source: origins.ClipSource, spec: Spec) -> None:
    """A UserError where the source has no text tower, or not the one of `spec.text`."""
    require_text(spec)
    if not source.has_text:
        raise UserError(f"{source.where} contains only a vision tower: give the checkpoint of the whole model")
    if source.spec is not None:
        free = {"kept_positions"} | ({"context_length"} if spec.text.kept_positions >= 0 else set())
        stated = vars(source.spec.text)
        origins.check_same(stated, spec.text, stated.keys() - free, source.where, "config.backbone.text")
    tensors = resample.to_context(source.tensors, spec.text)
    names.check_names(clip.abstract("text", spec), tensors, clip.text_table(spec), source=source.where)


def open_tower(tower: str, source: origins.ClipSource, spec: Spec, field: str = "config.backbone") -> Opened:
    """A tower of `spec`, "vision" or "text", of a checkpoint; a UserError where that has another one, or none.

    Positions are interpolated to the resolution of `spec`, or stretched to its context where it asks for that.
    """
    if tower == "vision":
        origins.check_architecture(source, spec, field)
        tensors = resample.to_resolution(source.tensors, spec)
        old, new = resample.grids(source.tensors, spec)
        note = f"position embeddings interpolated from {old} x {old} to {new} x {new} patches"
    else:
        check_text(source, spec)
        tensors = resample.to_context(source.tensors, spec.text)
        note = f"position embeddings of texts stretched to {spec.text.context_length} tokens"

    def fill(state, put=None):
        if tensors is not source.tensors:
            say(f"{source.where}: {note}")
        return names.assign(state, tensors, clip.table(tower, spec), source=source.where, put=put)

    return Opened(source.files, fill)


def open_diffusers(folder: Path, config, field: str = "") -> Opened:
    """A U-Net, VAE encoder or text encoder, in the folder of a pipeline or of the part; a UserError where its
    config.json differs from `config`, the section `field` of the config.
    """
    part, _, table, stems = _part(config)
    folder = folder / part if (folder / part).is_dir() else folder
    there = vars(type(config).from_dict(readers.read_json(folder / "config.json")))
    origins.check_same(there, config, there, str(folder), field or part)
    tensors = readers.weights_in(folder, *stems)
    return Opened(
        tensors.files, lambda state, put=None: names.assign(state, tensors, table, source=str(folder), put=put)
    )


def check_schedule(folder: Path, config: ScheduleConfig) -> None:
    """A UserError where a pipeline's folder has another noise schedule; one without a scheduler is not checked."""
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file():
        there = vars(ScheduleConfig.from_dict(readers.read_json(path)))
        origins.check_same(there, config, there, str(path), "config.diffusion.scheduler")


def load(
    source: str,
    spec,
    *,
    tower: str = "vision",
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    remat: bool = False,
    put=None,
) -> nnx.Module:
    """Returns a model with the weights of a source, written by any of the supported libraries.

    Args:
      source: for a Spec an open_clip file or folder, a transformers CLIPModel or SiglipModel folder, a vision tower's
        state dict, a hub id, or WORKDIR[:STEP] of a run; for the others a diffusers folder or hub id.
      spec: a `backbones.Spec`, or a UNetConfig, VAEConfig or TextEncoderConfig.
      tower: "vision" or "text", for a Spec.
      dtype, param_dtype: the dtypes of computations and of the weights.
      remat: as for the model.
      put: (path, array, ShapeDtypeStruct) -> device array; default the first device.

    Raises:
      UserError: the source is missing, invalid, or of another architecture than `spec`.
    """
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    if isinstance(spec, Spec):
        opened = open_tower(tower, origins.open_source(source), spec)
        module = clip.abstract(tower, spec, remat=remat, **kw)
    else:
        _, model, _, _ = _part(spec)
        kw |= dict(remat=remat) if model is UNet else {}
        opened = open_diffusers(places.diffusers_folder(source), spec)
        module = layers.abstract(lambda rngs: model(spec, rngs=rngs, **kw))
    graph, state = nnx.split(module)
    return nnx.merge(graph, opened.fill(state, put))
