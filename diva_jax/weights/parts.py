"""Pretrained parts: the sources of the parameters of a model, and how each is opened."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models.backbones import Spec, TextSpec
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.layers import abstract
from diva_jax.weights import loading, names, origins, places, readers
from diva_jax.weights.loading import Opened

_STATISTICS = names.Table("statistics of image embeddings (not needed with config.unclip.stats=off)")


@dataclasses.dataclass(frozen=True)
class Part:
    """The source of the parameters below one prefix; `open` raises a UserError if it is missing or of another
    architecture. Parameters whose names below the prefix match a regular expression of `fresh` (adapters) keep the
    objective's initial values.
    """

    source: str
    open: Callable[[], Opened]
    fresh: tuple[str, ...] = ()


def vision(source: str, spec: Spec, field: str = "config.backbone", fresh: tuple[str, ...] = ()) -> Part:
    """The part for the vision tower of the backbone `spec`, the config section `field`; `fresh`: see `Part`."""

    def opened():
        weights = origins.open_source(source, f"{field}.source")
        part = loading.open_tower("vision", weights, spec, field)
        if spec.has_text and weights.has_text:
            loading.check_text(weights, spec)  # What is tuned with it is exported with its text tower.
        return part

    return Part(source, opened, fresh)


def text(source: str, spec: Spec, field: str = "config.backbone", fresh: tuple[str, ...] = ()) -> Part:
    """The part for the text tower of a backbone; arguments as for `vision`."""
    return Part(source, lambda: loading.open_tower("text", origins.open_source(source, f"{field}.source"), spec), fresh)


def scalar(source: str, name: str, field: str = "config.backbone") -> Part:
    """The part for `logit_scale` or `logit_bias`: one parameter of shape [], with the stored value."""

    def opened():
        weights = origins.open_source(source, f"{field}.source")
        if name not in weights.tensors:
            raise UserError(f"{weights.where} has no {name}: give the checkpoint of the whole model as {field}.source")
        return Opened(weights.files, lambda state, put: _one(state, np.asarray(weights.tensors[name]), put))

    return Part(source, opened)


def diffusers(source: str, config, field: str, scheduler: ScheduleConfig | None = None) -> Part:
    """The part for a U-Net, a VAE's encoder or a text encoder of a diffusers folder or hub id, the config section
    `field`; `scheduler`, of a U-Net, must be that of the source, where that states one.
    """

    def opened():
        folder = places.diffusers_folder(source)
        part = loading.open_diffusers(folder, config, field)
        if scheduler is not None:
            loading.check_schedule(folder, scheduler)
        return part

    return Part(source, opened)


def diffusers_tokenizer(folder: Path, length: int) -> tokenizers.FolderTokenizer:
    """The tokenizer of a diffusers folder, which pads as its files say; a UserError without its files."""
    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no vocab.json: the diffusers folder needs its tokenizer, download it again")
    return tokenizers.FolderTokenizer(folder, length, kind="clip")


def text_context(source: str, prompt: str, tokens: int, config: TextEncoderConfig, mask_padding: bool = False) -> Part:
    """The part for the last hidden state of a prompt, padded to `tokens`, after the final norm, [1, tokens, width].

    The diffusers folder or hub id has `tokenizer` and `text_encoder`. With `mask_padding`, padding is not attended to;
    Stable Diffusion's own pipeline attends to it.
    """

    def opened():
        folder = places.diffusers_folder(source)
        part = loading.open_diffusers(folder, config, "config.diffusion.text_encoder")

        def fill(state, put):
            ids, mask = diffusers_tokenizer(folder / "tokenizer", tokens).encode([prompt])
            if not 0 <= ids.min() <= ids.max() < config.vocab_size:
                raise UserError(
                    f"the tokenizer in {folder} has the id {ids.max()}, but the text encoder only {config.vocab_size} "
                    "tokens: fetch the folder again"
                )
            graph, empty = nnx.split(abstract(lambda rngs: TextEncoder(config, rngs=rngs)))
            encoder, masks = nnx.merge(graph, part.fill(empty)), (jnp.asarray(mask),) if mask_padding else ()
            context = np.asarray(nnx.jit(lambda m, *args: m(*args))(encoder, jnp.asarray(ids), *masks))
            ((_, var),) = nnx.to_flat_state(state)
            if context.shape != var.shape:
                raise UserError(
                    f"{folder}: the text encoder gives a prompt of shape {context.shape}, the config expects "
                    f"{var.shape}: set config.diffusion.text_encoder and text_tokens to the values of that folder"
                )
            return _one(state, context, put)

        return Opened(part.files, fill)

    return Part(source, opened)


def embedding_statistics(source: str) -> Part:
    """The statistics `mean` and `std`, [1, d], of Stable unCLIP's embeddings, in `image_normalizer` of `source`."""

    def opened():
        folder = places.diffusers_folder(source) / "image_normalizer"
        tensors = readers.weights_in(folder, "diffusion_pytorch_model")
        return Opened(
            tensors.files, lambda state, put: names.assign(state, tensors, _STATISTICS, source=str(folder), put=put)
        )

    return Part(source, opened)


def tokenizer_folder(source: str, field: str = "config.backbone.source") -> Path:
    """The folder with the tokenizer's files of a source of weights."""
    checkpoint = origins.open_source(source, field)
    if checkpoint.tokenizer:
        return checkpoint.tokenizer[0].parent
    where = Path(checkpoint.where)
    return where if where.is_dir() else where.parent


def tokenizer(source: str, text: TextSpec, folder: str = "") -> Callable[[], tokenizers.Tokenizer]:
    """A function that opens the tokenizer of a text tower, of a folder, by default that of the source of weights."""
    return lambda: tokenizers.open_tokenizer(text, folder or tokenizer_folder(source))


def prompt_tokenizer(source: str, tokens: int, config: TextEncoderConfig) -> Callable[[], tokenizers.Tokenizer]:
    """What opens the tokenizer of the diffusers folder or hub id `source`, of `tokens` ids per text, for the input
    `data.inputs.Texts`; a UserError where the text encoder has fewer ids.
    """

    def opened():
        folder = places.diffusers_folder(source)
        found = diffusers_tokenizer(folder / "tokenizer", tokens)
        if found.size > config.vocab_size:
            raise UserError(
                f"the tokenizer in {folder} has {found.size} tokens, but the text encoder only "
                f"{config.vocab_size}: fetch the folder again"
            )
        return found

    return opened


def _one(state: nnx.State, array: np.ndarray, put: Callable) -> nnx.State:
    """Fills a state of one variable."""
    ((path, var),) = nnx.to_flat_state(state)
    array = array.astype(var.dtype).reshape(var.shape)
    return nnx.from_flat_state({path: var.replace(put(path, array, jax.ShapeDtypeStruct(var.shape, var.dtype)))})
