"""Small models and folders of open_clip and transformers, and tokenizers, for the tests that compare with them."""

import argparse
import shutil
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import sentencepiece
import torch
from helpers import randomise, tensors
from open_clip.push_to_hf_hub import save_config_for_hf
from PIL import Image
from safetensors.torch import save_file
from specs import CLIP_FOLDER
from torch_towers import torch_tower
from transformers import SiglipTokenizer, T5Tokenizer

from diva_jax.data.tokenizers import siglip_clean
from diva_jax.models.backbones import Spec
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.weights import clip
from diva_jax.weights.writers import write_safetensors


class _Trunk(torch.nn.Module):
    """A timm tower under `visual.trunk`, as in open_clip."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.trunk = torch_tower(spec)

    def forward(self, x):
        return self.trunk(x)


def torch_model(spec: Spec, seed: int = 5, custom_text: bool = False) -> torch.nn.Module:
    """Returns open_clip's model with random weights; `custom_text`: the text tower is under `text.` for CLIP too."""
    text, timm_tower = spec.text, spec.arch != "vit"
    kind = open_clip.CustomTextCLIP if timm_tower or custom_text else open_clip.CLIP
    vision = dict(image_size=spec.image_size, patch_size=spec.patch_size, width=spec.width, layers=spec.layers)
    activation = text.activation or spec.activation
    model = kind(
        embed_dim=spec.embed_dim,
        quick_gelu=activation == "quick_gelu",
        init_logit_bias=-10 if spec.arch == "siglip" else None,
        vision_cfg=vision | dict(head_width=spec.width // spec.heads, mlp_ratio=(spec.mlp_dim + 0.5) / spec.width),
        text_cfg=dict(
            context_length=text.context_length,
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            mlp_ratio=(text.mlp_dim + 0.5) / text.width,
            no_causal_mask=not text.causal,
            pool_type=text.pool,
            eos_id=text.eos_id,
            proj_bias=text.proj_bias,
            norm_kwargs=dict(eps=text.norm_eps),
            act_kwargs=dict(approximate="tanh") if activation == "gelu_tanh" else None,
        ),
    )
    if timm_tower:
        model.visual = _Trunk(spec)
    with torch.no_grad():
        scale = model.logit_scale.clone()
        randomise(model, seed)
        model.logit_scale.copy_(scale)
    return model


def centred(model: torch.nn.Module, spec: Spec, pictures: list[Image.Image], texts: list[str]) -> torch.nn.Module:
    """Removes the direction of the mean embedding from the projections of a CLIP model.

    The embeddings of a random model are otherwise too similar.
    """
    prepare = open_clip.image_transform(spec.image_size, is_train=False, mean=spec.mean, std=spec.std)
    with torch.no_grad():
        images = model.encode_image(torch.stack([prepare(p) for p in pictures]))
        words = model.encode_text(open_clip.SimpleTokenizer()(texts))
        for projection, embeddings in ((model.visual.proj, images), (model.text_projection, words)):
            u = torch.nn.functional.normalize(embeddings.mean(0), dim=0)
            projection -= torch.outer(projection @ u, u)
    return model


def write_model(folder: Path, model: torch.nn.Module) -> Path:
    """Writes weights and CLIP's tokenizer to a folder, as a source."""
    folder.mkdir(exist_ok=True)
    write_safetensors(folder / "open_clip_model.safetensors", tensors(model))
    shutil.copy(open_clip.tokenizer.default_bpe(), folder / "bpe_simple_vocab_16e6.txt.gz")
    return folder


def write_siglip_tokenizer(out: Path, layout: str = "timm") -> Path:
    """Writes a small SentencePiece tokenizer in the form of hub folders.

    Args:
      out: the parent folder.
      layout: "timm" or "transformers" for SigLIP's, "gemma" for SigLIP 2's, "xlm" for MetaCLIP 2's.
    """
    lines = Path(tarfile.__file__).read_text().splitlines() + Path(argparse.__file__).read_text().splitlines()
    lines = [s for line in lines for s in (line.strip(), siglip_clean(line)) if s]
    train = out / "train"
    train.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(train / "spiece"),
        vocab_size=900,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder = out / layout
    if layout == "timm":
        T5Tokenizer.from_pretrained(train, pad_token="</s>", extra_ids=0, legacy=False).save_pretrained(folder)
        assert (folder / "tokenizer.json").exists()
    elif layout in ("gemma", "xlm"):
        pieces = sentencepiece.SentencePieceProcessor(str(train / "spiece.model"))
        vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
        _write_fast_tokenizer(folder, vocab, layout)
    else:
        SiglipTokenizer(str(train / "spiece.model"), pad_token="</s>").save_pretrained(folder)
        assert (folder / "spiece.model").exists()
    return folder


def _write_fast_tokenizer(folder: Path, vocab: list[tuple[str, float]], layout: str) -> None:
    """Writes SigLIP 2's tokenizer (end token, padded with id 0) or XLM-R's (start and end tokens, padded with id 1)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [pair for pair in vocab if pair[0] not in ("<pad>", "</s>", "<unk>")]
    first = {"gemma": ["<pad>", "<eos>", "<unk>"], "xlm": ["<s>", "<pad>", "</s>", "<unk>"]}[layout]
    tokenizer = Tokenizer(models.Unigram([*((t, 0.0) for t in first), *words], unk_id=first.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    end = "<eos>" if layout == "gemma" else "</s>"
    single = f"$A {end}" if layout == "gemma" else f"<s> $A {end}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, i) for i, t in enumerate(first)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token=end, unk_token="<unk>", padding_side="right"
    )
    fast.save_pretrained(folder)


def transformers_folder(folder, spec=CLIP_FOLDER, **save):
    """Writes and returns the model of transformers that a spec describes; `save` as for `save_pretrained`."""
    import transformers

    config = clip.transformers_configs(spec)[0]
    (kind,) = config.pop("architectures")
    if spec.has_text:
        config = {k: v for k, v in config.items() if k in ("vision_config", "text_config", "projection_dim")}
    model = getattr(transformers, kind)(getattr(transformers, kind.replace("Model", "Config"))(**config))
    randomise(model).save_pretrained(folder, **save)
    return model


def equal(ours, theirs):
    """Asserts that two mappings contain the same tensors, bit-identical."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]), err_msg=name)


def written_by_open_clip(spec, folder):
    """Writes a random CLIP of `spec` as open_clip does; returns its tensors."""
    folder.mkdir()
    model = randomise(open_clip.CLIP(**to_open_clip(spec)["model_cfg"]))
    save_open_clip(model, spec, folder)
    return tensors(model)


def save_open_clip(model, spec, folder):
    """Writes a model of `spec` as open_clip does, but for the file of weights, which is safetensors'."""
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    open_clip.model.set_model_preprocess_cfg(model, to_open_clip(spec)["preprocess_cfg"])
    save_config_for_hf(model, folder / "open_clip_config.json", to_open_clip(spec)["model_cfg"])
