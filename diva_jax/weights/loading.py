"""Loads weights from any source into one model; `training.load` does so for a whole training program."""

import functools
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.common.log import say
from diva_jax.models import backbones, layers
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.text import Text, require_text
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.weights import clip, diffusers, names, origins, places, readers, resample
from diva_jax.weights.tensors import Tensors

# Config class -> (folder in a diffusers pipeline, model, names, stems of the weights' file).
_SD = {
    UNetConfig: ("unet", UNet, diffusers.UNET, ("diffusion_pytorch_model",)),
    VAEConfig: ("vae", VAE, diffusers.VAE, ("diffusion_pytorch_model",)),
    TextEncoderConfig: ("text_encoder", TextEncoder, diffusers.TEXT_ENCODER, ("model", "pytorch_model")),
}


def _part(config):
    """The row of `_SD`; any other class is a `latent_code.LatentCode` in place of the VAE."""
    if (row := _SD.get(type(config))) is not None:
        return row
    return "vae", type(config).build, names.Table("latent code"), ("diffusion_pytorch_model",)


def fill_vision(source: origins.ClipSource, spec: Spec, state, put=None):
    """The filled state of `spec`'s vision tower, of a source that `origins.check_architecture` has checked; positions
    are interpolated if needed.
    """
    tensors = resample.to_resolution(source.tensors, spec)
    if tensors is not source.tensors:
        old, new = resample.grids(source.tensors, spec)
        say(f"{source.where}: position embeddings interpolated from {old} x {old} to {new} x {new} patches")
    return names.assign(state, tensors, clip.vision_table(spec), source=source.where, put=put)


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
    module = layers.abstract(lambda rngs: Text(spec, rngs=rngs))
    names.check_names(module, tensors, clip.text_table(spec), source=source.where)


def fill_text(source: origins.ClipSource, spec: Spec, state, put=None):
    """The filled state of `spec`'s text tower, of a source that `check_text` has checked; positions are stretched where
    it asks for that.
    """
    tensors = resample.to_context(source.tensors, spec.text)
    if tensors is not source.tensors:
        say(f"{source.where}: position embeddings of texts stretched to {spec.text.context_length} tokens")
    return names.assign(state, tensors, clip.text_table(spec), source=source.where, put=put)


# Tower of a backbone -> its module, the check of a source, and how it is filled.
TOWERS = {
    "vision": (backbones.build, origins.check_architecture, fill_vision),
    "text": (Text, check_text, fill_text),
}


def open_diffusers(folder: Path, config, field: str = "") -> Tensors:
    """Opens the tensors of a U-Net, VAE encoder or text encoder, in the folder of a pipeline or of the part.

    A UserError where the folder's config.json differs from `config`, which is the section `field` of the config.
    """
    part, _, _, stems = _part(config)
    folder = folder / part if (folder / part).is_dir() else folder
    there = vars(type(config).from_dict(readers.read_json(folder / "config.json")))
    origins.check_same(there, config, there, str(folder), field or part)
    return readers.weights_in(folder, *stems)


def check_schedule(folder: Path, config: ScheduleConfig) -> None:
    """A UserError where a pipeline's folder has another noise schedule than this; one without a scheduler is not
    checked.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return
    there = vars(ScheduleConfig.from_dict(readers.read_json(path)))
    origins.check_same(there, config, there, str(path), "config.diffusion.scheduler")


def fill_diffusers(tensors: Tensors, config, state, put=None):
    """The state of a U-Net, VAE encoder or text encoder, filled with the tensors of `open_diffusers`; a UserError where
    they do not fit.
    """
    return names.assign(state, tensors, _part(config)[2], source=str(tensors.files[0].parent), put=put)


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

    def abstract(make):
        return nnx.split(layers.abstract(lambda rngs: make(rngs=rngs, **kw)))

    if isinstance(spec, Spec):
        make, check, fill = TOWERS[tower]
        opened = origins.open_source(source)
        check(opened, spec)
        graph, state = abstract(functools.partial(make, spec, remat=remat))
        return nnx.merge(graph, fill(opened, spec, state, put))
    _, model, _, _ = _part(spec)
    if model is UNet:
        kw["remat"] = remat
    folder = places.diffusers_folder(source)
    graph, state = abstract(functools.partial(model, spec))
    return nnx.merge(graph, fill_diffusers(open_diffusers(folder, spec), spec, state, put))
