"""Fills an objective's pretrained parts from their sources, each array straight to its sharding."""

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.models.backbones import spec_of
from diva_jax.models.diffusion.unet import UNetConfig
from diva_jax.models.diffusion.vae import VAEConfig
from diva_jax.training import partition
from diva_jax.weights import loading, readers, sources
from diva_jax.weights.prompt import encode_prompt


def put_on(sharding: Callable[[tuple], jax.sharding.Sharding]) -> Callable:
    """A `put` for `names.assign`: each process gives only the pieces that its devices hold."""

    def put(path, array: np.ndarray, want: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(want.shape, sharding(path), lambda index: array[index])

    return put


def _vision(config, state, put):
    source = sources.open_clip_source(config.backbone.source, "config.backbone.source")
    return loading.fill_vision(source, spec_of(config), state, put), source.files


def _diffusers_part(config, state, put, part: str, config_class):
    folder = sources.diffusers_folder(config.diffusion.source)
    here = config_class.from_dict(config.diffusion[part].to_dict())
    return loading.fill_diffusers(folder, here, state, put, f"config.diffusion.{part}")


def _unet(config, state, put):
    return _diffusers_part(config, state, put, "unet", UNetConfig)


def _vae(config, state, put):
    return _diffusers_part(config, state, put, "vae", VAEConfig)


def _text_context(config, state, put):
    """The frozen text condition, computed here, once, and not in the step."""
    folder = sources.diffusers_folder(config.diffusion.source)
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
    arrays, origins, hashes = {}, {}, ThreadPoolExecutor(1)
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
        origins[attribute] = {"source": [f.name for f in files], "sha256": hashes.submit(readers.fingerprint, files)}
    fresh = [n for n in program.arrays if n.split("/")[0] not in pretrained and n in wanted]
    arrays.update(_initialise(program, fresh))
    # Hashed meanwhile: reading the next part waits for memory, hashing for the processor.
    origins = {a: o | {"sha256": o["sha256"].result()} for a, o in origins.items()}
    hashes.shutdown()
    return {n: a for n, a in arrays.items() if n in wanted}, origins


def _initialise(program, fresh: list[str]) -> dict:
    """The objective's own initial values of these parameters; the compiler drops the work for all others."""
    if not fresh:
        return {}

    def init():
        _, arrays = partition.disassemble(program.init_module())
        return {n: arrays[n] for n in fresh}

    return jax.jit(init, out_shardings={n: program.shardings[n] for n in fresh})()
