"""Pretrained parts: the sources of the parameters of a model, and how each is opened."""

import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common import log
from diva_jax.common.errors import UserError
from diva_jax.data import tokenizers
from diva_jax.models import layers
from diva_jax.models.backbones import Spec, TextSpec, architecture
from diva_jax.models.diffusion.schedule import ScheduleConfig
from diva_jax.models.diffusion.text_encoder import TextEncoder, TextEncoderConfig
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.diffusion.vae import VAE, FluxVAEConfig, VAEConfig
from diva_jax.models.names import Table
from diva_jax.weights import formats, names, origins
from diva_jax.weights.formats import Tensor, Tensors

# Config class -> (folder in a diffusers pipeline, model, names, stems of the weights' file).
STABLE_DIFFUSION = {
    UNetConfig: ("unet", UNet, names.UNET, ("diffusion_pytorch_model",)),
    VAEConfig: ("vae", VAE, names.VAE, ("diffusion_pytorch_model",)),
    TextEncoderConfig: ("text_encoder", TextEncoder, names.TEXT_ENCODER, ("model", "pytorch_model")),
}
# Texts that are encoded at once, a quarter of a gigabyte of activations in Stable Diffusion 2.1's text encoder.
_PROMPTS_AT_ONCE = 64
_PROMPTS = "states of prompts (set config.diffusion.text_encoder and text_tokens to the values of that folder)"
_STATISTICS = Table("statistics of image embeddings (not needed with config.unclip.stats=off)")


class Opened(NamedTuple):
    """A source, found and checked: the tensors of a part under names of `table`, and the file or folder that they are
    in; `note` is said where they are read."""

    tensors: Tensors
    table: Table
    where: str
    note: str = ""

    def fill(self, state, only: Collection[tuple] | None = None) -> nnx.State:
        """An abstract state with the values of the tensors, see `names.assign`."""
        if self.note:
            log.say(f"{self.where}: {self.note}")
        return names.assign(state, self.tensors, self.table, source=self.where, only=only)


def _alone(name: str) -> Table:
    """The table of a part that is a single tensor of this name."""
    return Table(name, rename=(("^.*", name),))


def _part(config):
    """The row of `STABLE_DIFFUSION`, for FLUX's VAE too; any other class is a `presets.LatentCode` in place of it."""
    kind = VAEConfig if isinstance(config, FluxVAEConfig) else type(config)
    return STABLE_DIFFUSION.get(kind) or ("vae", kind.build, Table("latent code"), ("diffusion_pytorch_model",))


def open_tower(tower: str, source: origins.ClipSource, spec: Spec, field: str = "config.backbone") -> Opened:
    """A tower of `spec`, "vision" or "text", of a checkpoint; a UserError where that has another one, or none.
    Positions are interpolated to the resolution of `spec`, or stretched to its context where it asks for that."""
    table = names.table(tower, spec)
    if tower == "vision":
        origins.check_architecture(source, spec, field)
        tensors = names.to_resolution(source.tensors, spec)
        old, new = architecture(spec.arch).CHECKPOINT.positions.grid(source.tensors), spec.grid
        note = f"position embeddings interpolated from {old} x {old} to {new} x {new} patches"
    else:
        if not source.has_text:
            raise UserError(f"{source.where} contains only a vision tower: give the checkpoint of the whole model")
        if source.spec is not None:
            free = {"kept_positions"} | ({"context_length"} if spec.text.kept_positions >= 0 else set())
            stated = vars(source.spec.text)
            origins.check_same(stated, spec.text, stated.keys() - free, source.where, "config.backbone.text")
        tensors = names.to_context(source.tensors, spec.text)
        note = f"position embeddings of texts stretched to {spec.text.context_length} tokens"
    names.check_names(names.abstract(tower, spec), tensors, table, source=source.where)
    return Opened(tensors, table, source.where, note * (tensors is not source.tensors))


def open_diffusers(folder: Path, config, field: str = "") -> Opened:
    """A U-Net, VAE encoder or text encoder, in the folder of a pipeline or of the part; a UserError where its
    config.json differs from `config`, the section `field` of the config."""
    part, _, table, stems = _part(config)
    folder = folder / part if (folder / part).is_dir() else folder
    there = vars(type(config).from_dict(formats.read_json(folder / "config.json")))
    origins.check_same(there, config, there, str(folder), field or part)
    return Opened(formats.weights_in(folder, *stems), table, str(folder))


def check_schedule(folder: Path, config: ScheduleConfig) -> None:
    """A UserError where a pipeline's folder has another noise schedule; one without a scheduler is not checked."""
    path = folder / "scheduler" / "scheduler_config.json"
    if path.is_file():
        there = vars(ScheduleConfig.from_dict(formats.read_json(path)))
        origins.check_same(there, config, there, str(path), "config.diffusion.scheduler")


def load(source: str, spec, *, tower: str = "vision", dtype=jnp.float32, param_dtype=jnp.float32) -> nnx.Module:
    """Returns a model with the weights of a source, written by any of the supported libraries.

    Args:
      source: for a Spec an open_clip file or folder, a transformers CLIPModel or SiglipModel folder, a vision tower's
        state dict, a hub id, or WORKDIR[:STEP] of a run; for the others a diffusers folder or hub id.
      spec: a `backbones.Spec`, or a UNetConfig, VAEConfig or TextEncoderConfig.
      tower: "vision" or "text", for a Spec.
      dtype, param_dtype: the dtypes of computations and of the weights.

    Raises:
      UserError: the source is missing, invalid, or of another architecture than `spec`.
    """
    kw = dict(dtype=dtype, param_dtype=param_dtype)
    if isinstance(spec, Spec):
        opened = open_tower(tower, origins.open_source(source), spec)
        module = names.abstract(tower, spec, **kw)
    else:
        opened = open_diffusers(origins.diffusers_folder(source), spec)
        module = layers.abstract(lambda rngs: _part(spec)[1](spec, rngs=rngs, **kw))
    graph, state = nnx.split(module)
    return nnx.merge(graph, opened.fill(state))


class Part(NamedTuple):
    """The source of the parameters below one prefix; `open` raises a UserError if it is missing or of another
    architecture. Parameters whose names below the prefix match a regular expression of `fresh` (adapters) keep the
    objective's initial values."""

    source: str
    open: Callable[[], Opened]
    fresh: tuple[str, ...] = ()


def vision(source: str, spec: Spec, field: str = "config.backbone", fresh: tuple[str, ...] = ()) -> Part:
    """The part for the vision tower of the backbone `spec`, the config section `field`; `fresh`: see `Part`."""

    def opened():
        weights = origins.open_source(source, f"{field}.source")
        part = open_tower("vision", weights, spec, field)
        if spec.has_text and weights.has_text:
            open_tower("text", weights, spec)  # What is tuned with it is exported with its text tower.
        return part

    return Part(source, opened, fresh)


def text(source: str, spec: Spec, field: str = "config.backbone", fresh: tuple[str, ...] = ()) -> Part:
    """The part for the text tower of a backbone; arguments as for `vision`."""
    return Part(source, lambda: open_tower("text", origins.open_source(source, f"{field}.source"), spec), fresh)


def scalar(source: str, name: str, field: str = "config.backbone") -> Part:
    """The part for `logit_scale` or `logit_bias`: one parameter of shape [], with the stored value."""

    def opened():
        weights = origins.open_source(source, f"{field}.source")
        if name not in weights.tensors:
            raise UserError(f"{weights.where} has no {name}: give the checkpoint of the whole model as {field}.source")
        return Opened(Tensors({name: weights.tensors[name]}, weights.tensors.files), _alone(name), weights.where)

    return Part(source, opened)


def diffusers(source: str, config, field: str, scheduler: ScheduleConfig | None = None) -> Part:
    """The part for a U-Net, a VAE's encoder or a text encoder of a diffusers folder or hub id, the config section
    `field`; `scheduler`, of a U-Net, must be that of the source, where that states one. The encoder of FLUX's
    autoencoder may also be in `ae.safetensors`, or a folder or hub id with it."""

    def opened():
        if isinstance(config, FluxVAEConfig):
            at, file = origins.locate(source, f"{field}.source"), "ae.safetensors"
            at = at if isinstance(at, Path) else origins.download(at, f"{field}.source", [file])
            at = at / file if (at / file).is_file() else at
            if at.is_dir():
                return open_diffusers(at, config, field)
            return Opened(with_matrices(formats.open_file(at)), names.FLUX_VAE, str(at))
        folder = origins.diffusers_folder(source)
        part = open_diffusers(folder, config, field)
        if scheduler is not None:
            check_schedule(folder, scheduler)
        return part

    return Part(source, opened)


def with_matrices(tensors: Tensors) -> Tensors:
    """The attention's 1x1 convolutions [n, n, 1, 1] of FLUX's autoencoder as matrices [n, n]."""

    attn = ".mid.attn_1."
    matrices = {n: t.reshape(t.shape[:2]) if attn in n and t.shape[2:] == (1, 1) else t for n, t in tensors.items()}
    return Tensors(matrices, tensors.files)


def text_context(
    source: str, prompts: Sequence[str], tokens: int, config: TextEncoderConfig, mask_padding: bool = False
) -> Part:
    """The part for the last hidden states of P prompts, padded to `tokens`, after the final norm, [P, tokens, width].
    The diffusers folder or hub id has `tokenizer` and `text_encoder`. With `mask_padding`, padding is not attended to;
    Stable Diffusion's own pipeline attends to it."""

    def opened():
        folder = origins.diffusers_folder(source)
        part = open_diffusers(folder, config, "config.diffusion.text_encoder")

        def read() -> np.ndarray:
            tokenizer = prompt_tokenizer(source, tokens, config)
            graph, empty = nnx.split(layers.abstract(lambda rngs: TextEncoder(config, rngs=rngs)))
            encoder, found = nnx.merge(graph, part.fill(empty)), []
            run = nnx.jit(jax.default_matmul_precision("highest")(lambda m, *args: m(*args)))
            with log.progress("encoding prompts", len(prompts), "texts") as progress:
                for first in range(0, len(prompts), _PROMPTS_AT_ONCE):
                    inputs = map(jnp.asarray, tokenizer.encode(prompts[first : first + _PROMPTS_AT_ONCE]))
                    found.append(np.asarray(run(encoder, *itertools.islice(inputs, 2 if mask_padding else 1))))
                    progress.update(len(found[-1]))
            return np.concatenate(found)

        states = Tensor((len(prompts), tokens, config.width), np.dtype(np.float32), read)
        return Opened(Tensors({_PROMPTS: states}, part.tensors.files), _alone(_PROMPTS), str(folder))

    return Part(source, opened)


def embedding_statistics(source: str) -> Part:
    """The statistics `mean` and `std`, [1, d], of Stable unCLIP's embeddings, in `image_normalizer` of `source`."""

    def opened():
        folder = origins.diffusers_folder(source) / "image_normalizer"
        return Opened(formats.weights_in(folder, "diffusion_pytorch_model"), _STATISTICS, str(folder))

    return Part(source, opened)


def tokenizer_folder(source: str, field: str = "config.backbone.source") -> Path:
    """The folder with the tokenizer's files of a source of weights."""
    checkpoint = origins.open_source(source, field)
    if checkpoint.tokenizer:
        return checkpoint.tokenizer[0].parent
    where = Path(checkpoint.where)
    return where if where.is_dir() else where.parent


def tokenizer(source: str, text: TextSpec, folder: str, field: str) -> Callable[[], tokenizers.Tokenizer]:
    """A function that opens the tokenizer of a text tower, of a folder, the value of the config's `field`, or where
    this is empty that of the source of weights."""
    return lambda: tokenizers.open_tokenizer(text, folder or tokenizer_folder(source), field)


def prompt_tokenizer(source: str, tokens: int, config: TextEncoderConfig) -> tokenizers.FolderTokenizer:
    """The tokenizer of the diffusers folder or hub id `source`, of `tokens` ids per text, padded as its files say; a
    UserError without its files, or where the text encoder has fewer ids."""
    folder = origins.diffusers_folder(source) / "tokenizer"
    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{folder} has no vocab.json: the diffusers folder needs its tokenizer, download it again")
    found = tokenizers.FolderTokenizer(folder, tokens, kind="clip")
    if found.size > config.vocab_size:
        known = f"{found.size} tokens, but the text encoder only {config.vocab_size}"
        raise UserError(f"the tokenizer in {folder} has {known}: fetch the folder again")
    return found
