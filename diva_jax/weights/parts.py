"""Fills an objective's pretrained parts from their sources, each array straight to its sharding."""

from collections.abc import Callable, Collection

import jax
import numpy as np
from flax import nnx

from diva_jax.backbones.open_clip_config import from_open_clip
from diva_jax.config import spec_of
from diva_jax.diffusion.prompt import encode_prompt
from diva_jax.diffusion.unet import UNetConfig
from diva_jax.diffusion.vae import VAEConfig
from diva_jax.errors import UserError
from diva_jax.weights import clip, diffusers, names, readers

# What must agree between the config's backbone and the weights' own description of themselves.
ARCHITECTURE = ("arch", "image_size", "patch_size", "width", "layers", "heads", "mlp_dim", "embed_dim", "activation")


def put_on(sharding: Callable[[tuple], jax.sharding.Sharding]) -> Callable:
    """A `put` for `names.assign`: each process gives only the pieces that its devices hold."""

    def put(path, array: np.ndarray, want: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(want.shape, sharding(path), lambda index: array[index])

    return put


def _refuse(what: str, field: str, differences: list[str]) -> None:
    if differences:
        raise UserError(f"{what} is of another architecture than config.{field}: {'; '.join(differences)}")


def vision_source(config) -> tuple[readers.Tensors, dict]:
    """(tensors of both towers, open_clip_config) of the backbone's source, checked against the config."""
    folder = readers.folder(config.backbone.source, "backbone.source")
    described = readers.read_json(folder / "open_clip_config.json")
    found, spec = from_open_clip(described), spec_of(config)
    _refuse(
        str(folder),
        "backbone",
        [
            f"{f} is {getattr(found, f)!r} there and {getattr(spec, f)!r} in the config"
            for f in ARCHITECTURE
            if getattr(found, f) != getattr(spec, f)
        ],
    )
    return readers.safetensors_in(folder, "open_clip_model.safetensors", "model.safetensors"), described


def _vision(config, state, put):
    tensors, _ = vision_source(config)
    table = clip.vision_table(spec_of(config))
    return names.assign(state, tensors, table, source=config.backbone.source, put=put), tensors.files


def _diffusers_part(config, state, put, part: str, config_class, table: names.Table):
    folder = readers.folder(config.diffusion.source, "diffusion.source") / part
    there = config_class.from_dict(readers.read_json(folder / "config.json"))
    here = config_class.from_dict(config.diffusion[part].to_dict())
    _refuse(
        str(folder),
        f"diffusion.{part}",
        [
            f"{k} is {v!r} there and {vars(here)[k]!r} in the config"
            for k, v in vars(there).items()
            if vars(here)[k] != v
        ],
    )
    tensors = readers.safetensors_in(folder, "diffusion_pytorch_model.safetensors")
    return names.assign(state, tensors, table, source=str(folder), put=put), tensors.files


def _unet(config, state, put):
    return _diffusers_part(config, state, put, "unet", UNetConfig, diffusers.UNET)


def _vae(config, state, put):
    return _diffusers_part(config, state, put, "vae", VAEConfig, diffusers.VAE)


def _text_context(config, state, put):
    """The frozen text condition, computed here, once, and not in the step."""
    folder = readers.folder(config.diffusion.source, "diffusion.source")
    context, files = encode_prompt(folder, config.diffusion)
    ((path, var),) = nnx.to_flat_state(state)
    array = np.asarray(context, var.dtype)
    if array.shape != var.shape:
        raise UserError(
            f"{folder}: the text encoder gives a prompt of shape {array.shape}, the config expects {var.shape}: "
            "set config.diffusion.text_encoder and text_tokens to what the folder holds"
        )
    return nnx.from_flat_state({path: var.replace(put(path, array, jax.ShapeDtypeStruct(var.shape, var.dtype)))}), files


KINDS = {"vision": _vision, "unet": _unet, "vae": _vae, "text_context": _text_context}


def load(program, pretrained: dict[str, str], only: Collection[str] | None = None) -> tuple[dict, dict]:
    """The arrays of a program: pretrained parts from their sources, the rest as the objective initialises it.

    Args:
      program: a `step.Program`.
      pretrained: attribute -> kind, the objective's `PRETRAINED`.
      only: names to keep; others are checked against their source and dropped. All where None.

    Returns:
      ({name: array on its sharding}, {attribute: {source files' names, sha256}}).

    Raises:
      UserError: a source is missing, broken, or of another architecture.
    """
    wanted = set(program.arrays if only is None else only)
    arrays, origins = {}, {}
    for attribute, kind in pretrained.items():
        mine = {n: v for n, v in program.skeleton.variables.items() if n.split("/")[0] == attribute}
        by_path = {path[1:] or path: n for n, (path, _) in mine.items()}
        abstract = nnx.from_flat_state(
            {path[1:] or path: var.replace(program.arrays[n]) for n, (path, var) in mine.items()}
        )
        keep = put_on(lambda path, by_path=by_path: program.shardings[by_path[path]])

        def put(path, array, want, keep=keep, by_path=by_path):
            return keep(path, array, want) if by_path[path] in wanted else None

        state, files = KINDS[kind](program.config, abstract, put)
        arrays.update({by_path[path]: var.get_value() for path, var in nnx.to_flat_state(state)})
        origins[attribute] = {"source": [f.name for f in files], "sha256": readers.fingerprint(files)}
    fresh = [n for n in program.arrays if n.split("/")[0] not in pretrained and n in wanted]
    arrays.update(_initialise(program, fresh))
    return {n: a for n, a in arrays.items() if n in wanted}, origins


def _initialise(program, fresh: list[str]) -> dict:
    """The objective's own initial values of these parameters; the compiler drops the work for all others."""
    if not fresh:
        return {}

    def init():
        flat = {"/".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(program.init_module()))}
        return {n: flat[n] for n in fresh}

    return jax.jit(init, out_shardings={n: program.shardings[n] for n in fresh})()
