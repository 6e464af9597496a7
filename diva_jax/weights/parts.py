"""Pretrained parts: the sources of the parameters of a model, and how each is opened."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import Spec, TextSpec
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoderConfig
from diva_jax.weights import loading, origins, places, prompt, readers

# (path, array in our layout and dtype, required shape and dtype) -> array on a device, or on the host.
Put = Callable[[tuple, np.ndarray, jax.ShapeDtypeStruct], object]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A source that has been found and checked: its files, and (abstract state of the parameters, put) -> the state,
    filled.
    """

    files: list[Path]
    fill: Callable[[nnx.State, Put], nnx.State]


@dataclasses.dataclass(frozen=True)
class Part:
    """The source of the parameters below one prefix. `open` raises a UserError if it is missing or of another
    architecture.

    `fresh` are regular expressions for names, below the prefix, of parameters that the source does not have (adapters);
    they keep the initial values of the objective.
    """

    source: str
    open: Callable[[], Opened]
    fresh: tuple[str, ...] = ()


def vision(source: str, spec: Spec, field: str = "config.backbone", fresh: tuple[str, ...] = ()) -> Part:
    """The part for the vision tower of the backbone `spec`, the config section `field`; `fresh`: see `Part`."""

    def opened():
        weights = origins.open_source(source, f"{field}.source")
        origins.check_architecture(weights, spec, field)
        if spec.has_text and weights.has_text:
            loading.check_text(weights, spec)  # What is tuned with it is exported with its text tower.
        return Opened(weights.files, lambda state, put: loading.fill_vision(weights, spec, state, put))

    return Part(source, opened, fresh)


def text(source: str, spec: Spec, field: str = "config.backbone", fresh: tuple[str, ...] = ()) -> Part:
    """The part for the text tower of a backbone; arguments as for `vision`."""

    def opened():
        weights = origins.open_source(source, f"{field}.source")
        loading.check_text(weights, spec)
        return Opened(weights.files, lambda state, put: loading.fill_text(weights, spec, state, put))

    return Part(source, opened, fresh)


def scalar(source: str, name: str, field: str = "config.backbone") -> Part:
    """The part for `logit_scale` or `logit_bias`: one parameter of shape [], with the stored value."""

    def opened():
        weights = origins.open_source(source, f"{field}.source")
        if name not in weights.tensors:
            raise UserError(f"{weights.where} has no {name}: give the checkpoint of the whole model as {field}.source")
        return Opened(weights.files, lambda state, put: _one(state, np.asarray(weights.tensors[name]), put))

    return Part(source, opened)


def diffusers(source: str, config, field: str, scheduler: ScheduleConfig | None = None) -> Part:
    """The part for a U-Net, the encoder of a VAE, or a text encoder, of a diffusers folder or hub id; `field`: the
    section of `config`.

    The noise schedule `scheduler`, of a U-Net, must be that of the source, where that states one.
    """

    def opened():
        folder = places.diffusers_folder(source)
        tensors = loading.open_diffusers(folder, config, field)
        if scheduler is not None:
            loading.check_schedule(folder, scheduler)
        return Opened(tensors.files, lambda state, put: loading.fill_diffusers(tensors, config, state, put))

    return Part(source, opened)


def text_context(source: str, text: str, tokens: int, config: TextEncoderConfig, mask_padding: bool = False) -> Part:
    """The part for the last hidden state of a prompt, padded to `tokens`, [1, tokens, width], which is computed when it
    is loaded.

    The diffusers folder or hub id has `tokenizer` and `text_encoder`; `mask_padding`: see `prompt.encode_prompt`.
    """

    def opened():
        folder = places.diffusers_folder(source)
        tensors = loading.open_diffusers(folder, config, "config.diffusion.text_encoder")

        def fill(state, put):
            context = prompt.encode_prompt(folder, text, tokens, config, tensors, mask_padding)
            ((_, var),) = nnx.to_flat_state(state)
            if context.shape != var.shape:
                raise UserError(
                    f"{folder}: the text encoder gives a prompt of shape {context.shape}, the config expects "
                    f"{var.shape}: set config.diffusion.text_encoder and text_tokens to the values of that folder"
                )
            return _one(state, context, put)

        return Opened(tensors.files, fill)

    return Part(source, opened)


def embedding_statistics(source: str) -> Part:
    """The statistics `mean` and `std`, [1, d] each, of Stable unCLIP's image embeddings, in `image_normalizer` of a
    diffusers folder.
    """

    def opened():
        folder = places.diffusers_folder(source) / "image_normalizer"
        tensors = readers.weights_in(folder, "diffusion_pytorch_model")

        def fill(state, put):
            filled = {}
            for path, var in nnx.to_flat_state(state):
                name = str(path[-1])
                if name not in tensors or tensors[name].shape != var.shape:
                    raise UserError(
                        f"{folder} has no {name} of shape {var.shape}: give the generator that belongs to "
                        "config.backbone, or set config.unclip.stats=off"
                    )
                array = np.asarray(tensors[name]).astype(var.dtype)
                filled[path] = var.replace(put(path, array, jax.ShapeDtypeStruct(var.shape, var.dtype)))
            return nnx.from_flat_state(filled)

        return Opened(tensors.files, fill)

    return Part(source, opened)


def tokenizer_folder(source: str, field: str = "config.backbone.source") -> Path:
    """Returns the folder with the tokenizer's files of a source of weights."""
    checkpoint = origins.open_source(source, field)
    if checkpoint.tokenizer:
        return checkpoint.tokenizer[0].parent
    where = Path(checkpoint.where)
    return where if where.is_dir() else where.parent


def tokenizer(source: str, text: TextSpec, folder: str = "") -> Callable[[], tokenizers.Tokenizer]:
    """A function that opens the tokenizer of a text tower, for `data.inputs.Tokens`, of a folder, by default that of
    the source of weights.
    """
    return lambda: tokenizers.open_tokenizer(text, folder or tokenizer_folder(source))


def prompt_tokenizer(source: str, tokens: int, config: TextEncoderConfig) -> Callable[[], tokenizers.Tokenizer]:
    """What opens the tokenizer of the diffusers folder or hub id `source`, of `tokens` ids per text, for the input
    `data.inputs.Texts`; a UserError where the text encoder has fewer ids."""

    def opened():
        folder = places.diffusers_folder(source)
        tokenizer = prompt.tokenizer(folder / "tokenizer", tokens)
        if tokenizer.size > config.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has {tokenizer.size} tokens, but the text encoder only "
                f"{config.vocab_size}: fetch the folder again"
            )
        return tokenizer

    return opened


def _one(state: nnx.State, array: np.ndarray, put: Put) -> nnx.State:
    """Fills a state of one variable."""
    ((path, var),) = nnx.to_flat_state(state)
    array = array.astype(var.dtype).reshape(var.shape)
    return nnx.from_flat_state({path: var.replace(put(path, array, jax.ShapeDtypeStruct(var.shape, var.dtype)))})
