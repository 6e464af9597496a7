"""Writes a model for other tools, then reads it back and runs it before the export appears.

There are three formats: `open_clip`, a folder for open_clip's `local-dir:`; `hf`, a folder of a transformers model, for
LLaVA's `--vision_tower` too; `pt`, the state dict of the vision tower, in the form that DIVA's authors publish.
"""

import dataclasses
import gc
import importlib
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common import paths
from diva_jax.common.errors import RunError, UserError, explained, listing
from diva_jax.common.log import say
from diva_jax.data import tokenizers
from diva_jax.models import backbones
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.open_clip_config import OPENAI_VOCABULARY, to_open_clip
from diva_jax.weights import formats, names, origins, parts
from diva_jax.weights.formats import Tensor, Tensors
from diva_jax.weights.origins import ClipSource

FORMATS = ("open_clip", "hf", "pt")
DTYPES = ("float32", "float16", "bfloat16")
PT_FILE = "vision_tower.pth"
# Relative L2 error of an embedding against the original library.
BOUND = 1e-4
_TEXT = "a photo of a dog"
# Kind of tokenizer -> sets of files, each of which suffices for transformers.
_SUFFICIENT = {
    "clip": ({"tokenizer.json"}, {"vocab.json", "merges.txt"}),
    "siglip": ({"tokenizer.json"}, {"spiece.model"}),
    "xlm": ({"tokenizer.json"}, {"sentencepiece.bpe.model"}),
}


def _lacks(source: ClipSource, spec: Spec) -> str:
    """What transformers needs beside a source's files of a tokenizer, as a sentence's end; empty where they suffice."""
    sets, files = _SUFFICIENT[spec.text.tokenizer], {f.name for f in source.tokenizer}
    if any(wanted <= files for wanted in sets):
        return ""
    return " or ".join(" with ".join(sorted(wanted, reverse=True)) for wanted in sets)


def with_tokenizer(source: ClipSource, spec: Spec, fmt: str, folder: str) -> ClipSource:
    """A source with the tokenizer's files of a folder; a UserError where that has none that fits the text tower."""
    if not spec.has_text or fmt == "pt":
        raise UserError("--tokenizer is for exports with a text tower: leave it out, this one has none")
    where = paths.expanded(folder)
    source = dataclasses.replace(source, tokenizer=origins.tokenizer_files(where))
    if lacks := _lacks(source, spec):
        raise UserError(f"--tokenizer={folder} has no tokenizer for transformers: it needs {lacks}")
    tokenizers.open_tokenizer(spec.text, where)
    return source


def tokenizer_of(source: ClipSource, spec: Spec) -> tokenizers.Tokenizer | None:
    """The tokenizer of a source, as evaluations use it, or None; a UserError where it does not fit the text tower."""
    if not spec.has_text or _lacks(source, spec):
        return None
    return tokenizers.open_tokenizer(spec.text, source.tokenizer[0].parent)


def without_tokenizer(source: ClipSource, spec: Spec, fmt: str) -> str:
    """One sentence for the screen and the card where an export is without a tokenizer; otherwise empty."""
    built_in = fmt == "open_clip" and "hf_tokenizer_name" not in to_open_clip(spec)["model_cfg"]["text_cfg"]
    if fmt == "pt" or built_in or not spec.has_text or not (lacks := _lacks(source, spec)):
        return ""
    return (
        f"the export has no tokenizer, since {source.where} has none for transformers ({lacks}): encode texts with "
        "the tokenizer of the original model, or export again with --tokenizer=FOLDER"
    )


def write_tokenizer(folder: Path, source: ClipSource, spec: Spec, fmt: str) -> None:
    """Copies the tokenizer's files, or writes a config with which transformers refuses to make a tokenizer."""
    if without_tokenizer(source, spec, fmt):
        # transformers raises an error for this class where there is no tokenizer.json.
        formats.write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        return
    for file in source.tokenizer:
        shutil.copyfile(file, folder / file.name)
    about = folder / "tokenizer_config.json"
    if fmt == "open_clip" and source.tokenizer and spec.text.tokenizer == "clip" and not about.exists():
        # An open_clip folder has no config.json that names the class.
        formats.write_json(about, {"tokenizer_class": "CLIPTokenizer"})


def _cast(name: str, t, dtype: np.dtype, where: str) -> Tensor:
    def read() -> np.ndarray:
        array = np.asarray(t)
        names.check_type(name, array.dtype, where)
        names.check_values(name, array, where)
        with np.errstate(over="ignore"):
            narrow = array.astype(dtype, copy=False)
        if not np.isfinite(narrow).all():
            raise UserError(f"a weight does not fit {dtype.name}: use --dtype=float32, or bfloat16 in place of float16")
        return narrow

    return Tensor(tuple(t.shape), dtype, read)


def whole_model(source: ClipSource, spec: Spec, dtype: str, text: bool) -> Tensors:
    """The tensors of an export of `spec` under open_clip's names, positions interpolated to it, each lazily cast to
    `dtype`. With `text`, the text tower, if there is one, and the other parameters of the whole model are included. A
    UserError where the source is another model or lacks a part; when values are read, where one is no finite float."""
    others, wanted = backbones.architecture(spec.arch).CHECKPOINT.others, {}
    lacking = ["text tower"] * (spec.has_text and not source.has_text)
    if text and (lacking := [*lacking, *(n for n in others if n not in source.tensors)]):
        raise UserError(f"{source.where} has no {listing(lacking)}: only --format=pt can be written")
    for tower in ("vision", "text") if text and spec.has_text else ("vision",):
        opened = parts.open_tower(tower, source, spec)
        wanted |= {n: opened.tensors[n] for n in opened.table.names(names.abstract(tower, spec))}
    wanted |= {n: source.tensors[n] for n in others if n in source.tensors and (text or n.startswith("visual."))}
    cast = {n: _cast(n, t, np.dtype(getattr(jnp, dtype)), source.where) for n, t in wanted.items()}
    return Tensors(cast, source.tensors.files)


def _config(fmt: str, spec: Spec, dtype: str, hub: str, source: ClipSource) -> dict:
    """The model's config file; a UserError where the format cannot hold this model."""
    own = tokenizer_of(source, spec) if fmt != "pt" else None
    other = own is not None and spec.text.tokenizer == "clip" and own.size != OPENAI_VOCABULARY
    if fmt == "hf":
        config, _ = names.transformers_configs(spec, dtype)
        if other and spec.text.pool == "argmax":
            config["text_config"]["eos_token_id"] = 2  # transformers' code for "pool at the highest id".
        return config
    if fmt == "pt":
        return {}
    config = to_open_clip(spec)
    text = config["model_cfg"]["text_cfg"]
    if other:
        text |= {"hf_tokenizer_name": "clip", "tokenizer_kwargs": {"clean": "lower"}}  # The tokenizer of the folder.
    if hub and spec.text.tokenizer == "clip" and "hf_tokenizer_name" in text:
        text["hf_tokenizer_name"] = hub  # From the hub, open_clip loads the tokenizer of this name.
    return config


def available(name: str) -> bool:
    """Returns whether `torch` and the library `name` can be imported."""
    try:
        import torch

        # torchvision's compiled operators do not load with a CPU build of torch. These two must exist to import
        # open_clip, but are not used here.
        for op in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, op):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{op}", schema)
        importlib.import_module(name)
    except Exception:  # An incomplete installation of an optional library is treated as a missing one.
        return False
    return True


def test_image(spec: Spec) -> np.ndarray:
    """Returns a smooth, normalised test image, float32 [1, H, W, 3]."""
    s = spec.image_size
    y, x = np.meshgrid(np.linspace(-1, 1, s), np.linspace(-1, 1, s), indexing="ij")
    return np.stack([np.sin(3 * x + y), np.cos(5 * y * x), np.sin(9 * x * x + 2 * y) * y], -1)[None].astype(np.float32)


def pixels(images: np.ndarray):
    """Returns channels-last images as a channels-first tensor of PyTorch."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def open_clip_embeddings(folder: Path, images: np.ndarray, text: str | np.ndarray | None) -> tuple[np.ndarray, ...]:
    """open_clip's embeddings of images, float32 [B, H, W, 3], and a text with an open_clip folder, in float32. `text`
    is read by the folder's tokenizer, or is token ids, int [N, L]; None: a model without texts. Returns (image
    embeddings [B, D], and with a text its token ids [N, L] and embeddings [N, D])."""
    import open_clip
    import torch

    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model = model.float().eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")([text]) if isinstance(text, str) else text
    with torch.no_grad():
        pooled = model.encode_image(pixels(images)).numpy()
        if ids is None:
            return (pooled,)
        ids = torch.as_tensor(ids)
        return pooled, ids.numpy(), model.encode_text(ids).numpy()


def tower_pooled(library: str, file: Path, spec: Spec, images: np.ndarray) -> np.ndarray:
    """The image embeddings [B, D], float32, of a vision tower's state dict, by the tower of "open_clip" or "timm"."""
    import torch

    state = torch.load(file, map_location="cpu", weights_only=True)
    if library == "timm":
        from timm.layers import SwiGLUPacked
        from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

        swiglu = spec.activation == "swiglu"
        options = dict(mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU) if swiglu else {}
        if spec.registers:
            options |= dict(reg_tokens=spec.registers, no_embed_class=True)
        options |= dict(img_size=spec.image_size, patch_size=spec.patch_size, embed_dim=spec.width)
        options |= dict(depth=spec.layers, num_heads=spec.heads, init_values=1.0, num_classes=0)
        tower = VisionTransformer(mlp_ratio=(spec.mlp_dim * (1 + swiglu) + 0.5) / spec.width, **options)
        state = checkpoint_filter_fn(state, tower)
    else:
        import open_clip

        cfg = dict(to_open_clip(spec)["model_cfg"])
        tower = (open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP)(**cfg).visual
    tower.load_state_dict(state, strict=True)
    with torch.no_grad():
        return tower.float().eval()(pixels(images)).numpy()


def transformers_embeddings(
    folder: Path, images: np.ndarray, text: str | np.ndarray | None, length: int
) -> tuple[tuple[np.ndarray, ...], list[str]]:
    """As `open_clip_embeddings`, of a transformers folder, for texts of `length` ids; missing and unexpected keys."""
    import torch
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        options = dict(output_loading_info=True, dtype=torch.float32, trust_remote_code=False)
        model, info = AutoModel.from_pretrained(folder, **options)
        run = getattr(model.eval(), "get_image_features", model)  # A model with only a vision encoder is called itself.
        with torch.no_grad():
            out = (run(pixel_values=pixels(images)).pooler_output.numpy(),)
            if isinstance(text, str):
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                text = tokenizer([text], padding="max_length", max_length=length, truncation=True)["input_ids"]
            if text is not None:
                ids = torch.as_tensor(text)
                out += (ids.numpy(), model.get_text_features(input_ids=ids).pooler_output.numpy())
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    return out, [*info["missing_keys"], *info["unexpected_keys"]]


def _run_original(path: Path, fmt: str, spec: Spec, source: ClipSource) -> str:
    """Encodes an image and a text with the export's library and with ours; returns the message to print."""
    library = {"hf": "transformers", "pt": backbones.architecture(spec.arch).CHECKPOINT.library}.get(fmt, "open_clip")
    if not available(library):
        return f"not run through {library}, which cannot be imported"
    images, keys, text = test_image(spec), [], None
    if spec.has_text and fmt != "pt":
        text = _TEXT
        if without_tokenizer(source, spec, fmt):  # Then the text is one of ids, int64 [1, context_length].
            text = np.arange(1, spec.text.context_length + 1)[None] % spec.text.vocab_size
            last = spec.text.eos_id if spec.text.pool == "eos" else spec.text.vocab_size - 1
            text[0, spec.text.context_length // 2] = last
    if fmt == "hf":
        theirs, keys = transformers_embeddings(path, images, text, spec.text.context_length)
    elif fmt == "open_clip":
        theirs = open_clip_embeddings(path, images, text)
    else:
        try:
            theirs = (tower_pooled(library, path, spec, images),)
        except UserError as e:  # What the library cannot say in a config, a state dict need not.
            return f"not run through {library}: {e}"
    gc.collect()  # PyTorch's modules hold reference cycles; their memory is needed for our model.
    if keys:
        raise RunError(f"{library} finds keys missing or unexpected: {listing(keys, 5)}; nothing was exported")
    with jax.default_matmul_precision("highest"):
        encode = nnx.jit(lambda tower, x: tower.encode(x))
        said = [_differ(library, "an image", encode(parts.load(str(path), spec), images).pooled, theirs[0])]
        if text is not None:
            tokenizer = tokenizer_of(source, spec) if text is _TEXT else None
            ids = tokenizer([_TEXT]) if tokenizer else np.asarray(theirs[1], np.int32)
            said.append(_differ(library, "a text", encode(parts.load(str(path), spec, tower="text"), ids), theirs[2]))
    return f"{library}: largest difference {', '.join(said)}"


def _differ(library: str, what: str, ours: jax.Array, theirs: np.ndarray) -> str:
    """How much two embeddings differ, as a part of a sentence; a RunError where it is more than `BOUND`."""
    ours = np.asarray(ours)
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    if not error <= BOUND:
        problem = f"{library} computes another embedding of {what} (relative error {error:.1e})"
        raise RunError(f"{problem}: nothing was exported")
    return f"of {what} {np.abs(ours - theirs).max():.1e}, relative error {error:.1e}"


def export(
    source: ClipSource, spec: Spec, out: str | Path, fmt: str, *, dtype: str = "float32", card: str = "", hub: str = ""
) -> None:
    """Writes `source` in one of `FORMATS` and `DTYPES` to `out`, which appears when it is complete and verified. `card`
    is the content of README.md; `hub` the repository that it is pushed to, or "". One image and one text go through the
    library that the export is for, if it is installed. A UserError as of `whole_model`, where `out` is not empty, or
    the format does not support this model; a RunError where the files or the library's embeddings are other ones."""
    tensors = whole_model(source, spec, dtype, text=fmt != "pt")
    torch = formats.import_torch("--format=pt") if fmt == "pt" else None

    def tensor(t: Tensor):
        bits = np.array(np.asarray(t), order="C").view(f"i{t.dtype.itemsize}")  # A copy, which PyTorch may write to.
        return torch.from_numpy(bits).view(getattr(torch, dtype))

    config = _config(fmt, spec, dtype, hub, source)
    with formats.new_folder(out) as folder:
        if fmt == "pt":
            state = {n.removeprefix("visual."): tensor(t) for n, t in tensors.items()}
            with explained(f"{folder / PT_FILE} is not written", "make room", RuntimeError, kind=OSError):
                torch.save(state, folder / PT_FILE)
            del state  # Its memory is needed where the export is read back.
        elif fmt == "open_clip":
            formats.write_open_clip(folder, tensors, config)
        else:
            formats.write_safetensors(folder / "model.safetensors", names.to_transformers_names(tensors, spec))
            formats.write_json(folder / "config.json", config)
            formats.write_json(folder / "preprocessor_config.json", names.transformers_configs(spec)[1])
        if spec.has_text and fmt != "pt":
            write_tokenizer(folder, source, spec, fmt)
        (folder / "README.md").write_text(card, "utf-8", "backslashreplace")
        path = folder / PT_FILE if fmt == "pt" else folder
        there = origins.open_source(str(path)).tensors
        wrong = tensors.keys() ^ there.keys()
        for name in tensors.keys() & there.keys():
            ours, theirs = np.asarray(tensors[name]), np.asarray(there[name])
            wrong |= set() if ours.dtype == theirs.dtype and np.array_equal(ours, theirs) else {name}
        if wrong:
            raise RunError(f"{out} read back differs in {listing(sorted(wrong), 5)}: nothing was exported")
        narrowed = any(np.dtype(t.dtype).itemsize > jnp.dtype(dtype).itemsize for t in source.tensors.values())
        rounded = f" rounded to {dtype}" if narrowed else ""
        say(f"{len(tensors)} tensors read back, bit-identical to {source.where}{rounded}")
        say(_run_original(path, fmt, spec, source))
    if missing := without_tokenizer(source, spec, fmt):
        say(f"note: {missing}")
    say(f"done: {out} ({fmt}, {dtype})")
