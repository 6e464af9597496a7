"""Ten optimizer steps of ComCLIP, SALM and SmartCLIP against the same in plain PyTorch, with the libraries' towers."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import small
import torch
from eval_models import torch_model
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch.nn.functional import cross_entropy, interpolate, normalize
from torch_objectives import column, compare_steps, part_tensors, random_batch, random_program, vision_tower
from torch_towers import torch_features, torch_tower

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.models.backbones import dinov2
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, names

STEPS, B = 10, 8


def terms(x, untuned, texts, taught, c):
    """(contrast, anchor, relation) of embeddings [B, D]."""
    x, texts, untuned, taught = (normalize(a, dim=-1) for a in (x, texts, untuned, taught))
    logits, right = x @ texts.T / c.contrast.temperature, torch.arange(B)
    contrast = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
    anchor = ((x - untuned) ** 2).mean()
    relation = 0.0
    for i in range(B):
        p, q = ((e[i] @ e.T / c.relation.temperature).softmax(0) for e in (taught, x))
        relation = relation + (p * (p / q).log()).sum() / B
    return contrast, anchor, relation


def resized(pixels, spec):
    """Pixels for the tower of a Spec, at its resolution."""
    side = (spec.image_size,) * 2
    return (interpolate(pixels, side, mode="bicubic", antialias=True) - column(spec.mean)) / column(spec.std)


def float_pixels(batch) -> torch.Tensor:
    return torch.from_numpy(batch["image"]).float().permute(0, 3, 1, 2) / 255


def load_teacher(p, arrays, part, spec) -> torch.nn.Module:
    """The DINOv2 of a part of an objective."""
    teacher = torch_tower(spec)
    tensors = part_tensors(p, arrays, part, dinov2.CHECKPOINT.vision)
    teacher.load_state_dict({n.removeprefix("visual."): a for n, a in tensors.items()})
    return teacher


def test_comclip():
    c = small.comclip_config(batch_size=B, steps=12, relation__weight=3.0)
    c.optim.update(lr=2e-3, warmup_steps=-1, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True)
    c.contrast.temperature, c.anchor.weight = 0.2, 40.0
    p, arrays = random_program(c)
    spec, teacher_spec = backbones.spec_of(c), backbones.spec_of(c, "teacher")
    vision = functools.partial(part_tensors, p, part="vision", table=clip.table("vision", spec))
    model, untuned = (torch_model(spec, clip_seed) for clip_seed in (1, 2))
    texts = part_tensors(p, arrays, "contrast", clip.table("text", spec))
    model.load_state_dict(vision(arrays) | texts, strict=False)
    untuned.load_state_dict(part_tensors(p, arrays, "anchor", clip.table("vision", spec)), strict=False)
    teacher = load_teacher(p, arrays, "relation", teacher_spec)
    trained = {f"visual.{n}": a for n, a in model.visual.named_parameters()}

    def want_of(step, batch, key):
        pixels, ids = float_pixels(batch), torch.from_numpy(batch["caption"]).long()
        view = (pixels - column(spec.mean)) / column(spec.std)
        with torch.no_grad():
            fixed = untuned.encode_image(view), model.encode_text(ids), teacher(resized(pixels, teacher_spec))
        found = terms(model.encode_image(view), *fixed, c)
        loss = sum(w * term for w, term in zip((1.0, 40.0, 3.0), found, strict=True))
        return dict(zip(("contrast", "anchor", "relation"), found, strict=True)) | {"loss": loss}

    rng = np.random.default_rng(4)
    batch_of = lambda step: random_batch(rng, B, 21, 11)  # noqa: E731
    compare_steps(p, arrays, trained.values(), STEPS, batch_of, want_of, vision, trained, 5e-5)


TOTAL, SALM_BATCH, DECAY, PRESERVE, UNIFORM = 12, 6, 0.7, 2.0, 0.3
BLOCKS = backbones.architecture("vit").CHECKPOINT.text.rename[:6]  # Of the names within blocks.
ADAPTER = names.Table("adapter", BLOCKS)


class Adapter(torch.nn.Module):
    def __init__(self, o, n_in, n_out, patches, sees):
        super().__init__()
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        self.fc_in, self.fc_out = torch.nn.Linear(n_in, o.width), torch.nn.Linear(o.width, n_out)
        self.fc_seen = torch.nn.Linear(n_out, o.width) if sees else None
        self.mask_token = torch.nn.Parameter(torch.zeros(o.width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(patches, o.width))
        blocks = [ResidualAttentionBlock(o.width, o.heads, norm_layer=norm) for _ in range(o.layers)]
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(blocks)
        self.norm = norm(o.width)

    def forward(self, tokens, masked, seen=None):
        x, masked = self.fc_in(tokens), masked[..., None]
        if seen is None:
            x = torch.where(masked, self.mask_token, x)
        elif self.fc_seen is not None:
            x = x + torch.where(masked, self.mask_token, self.fc_seen(seen))
        x = x + self.pos_embed
        for block in self.transformer.resblocks:
            x = block(x)
        return self.fc_out(self.norm(x))


def early(tower, view, layers):
    x = tower._embeds(view)
    for block in tower.transformer.resblocks[:layers]:
        x = block(x)
    return x[:, 1:]


def structure(x, taught):
    """As the paper has it: matrices of all pairs of patches."""

    def matrices(x):
        cosines = torch.stack([torch.cosine_similarity(a[:, None], a[None], dim=-1) for a in x])
        length = x.norm(dim=-1)
        apart = length[:, :, None] - length[:, None, :]
        return cosines, apart / apart.flatten(1).std(dim=1, correction=0)[:, None, None]

    return [((a - b) ** 2).mean() for a, b in zip(matrices(x), matrices(taught), strict=True)]


def uniformity(x):
    x = torch.nn.functional.normalize(x, dim=-1)
    return (
        torch.stack(
            [(-2 * (x[i] - x[j]).square().sum()).exp() for i in range(SALM_BATCH) for j in range(SALM_BATCH) if i != j]
        )
        .mean()
        .log()
    )


@pytest.mark.parametrize("teacher, visible", [("frozen", "added"), ("self", "none")])
def test_salm(teacher, visible):
    c = small.salm_config(batch_size=SALM_BATCH, steps=TOTAL, salm__adapter__visible=visible)
    c.salm.update(teacher=teacher, layer=1, preserve_weight=PRESERVE, uniformity_weight=UNIFORM, mask=0.6)
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True, clip=1e9)
    c.ema.decay = DECAY
    p, arrays = random_program(c)
    spec, teacher_spec, frozen_teacher = backbones.spec_of(c), backbones.spec_of(c, "teacher"), teacher == "frozen"
    tower = vision_tower(p, arrays, spec)
    untuned = torch.nn.Module.requires_grad_(copy.deepcopy(tower), False)
    tensors = part_tensors(p, arrays, "original", clip.table("vision", spec))
    untuned.load_state_dict({n.removeprefix("visual."): a for n, a in tensors.items()})
    sizes = (spec.embed_dim, teacher_spec.embed_dim) if frozen_teacher else (spec.width, spec.width)
    adapter, average = Adapter(c.salm.adapter, *sizes, spec.patches, visible == "added"), copy.deepcopy(tower)
    adapter.load_state_dict(part_tensors(p, arrays, "adapter", ADAPTER))
    dino = load_teacher(p, arrays, "teacher", teacher_spec) if frozen_teacher else torch_tower(teacher_spec)

    def tensors_of(arrays):
        vision = part_tensors(p, arrays, "vision", clip.table("vision", spec))
        return {**vision, **part_tensors(p, arrays, "adapter", ADAPTER)}

    trained = {f"visual.{n}": a for n, a in tower.named_parameters()} | dict(adapter.named_parameters())
    module = p.skeleton.merge(arrays)

    def want_of(i, batch, key):
        masked = torch.from_numpy(np.array(module.masked(image_keys(key, np.int32(i), batch["row"]))))
        assert (masked.sum(1) == round(0.6 * spec.patches)).all()
        pixels = float_pixels(batch)
        view = (pixels - column(spec.mean)) / column(spec.std)
        tokens, pooled = torch_features(tower, view)
        with torch.no_grad():
            tokens0, pooled0 = torch_features(untuned, view)
            taught = torch_features(dino, resized(pixels, teacher_spec))[0]
        f, f0 = (torch.cat([a[:, None], b], 1) for a, b in ((pooled, tokens), (pooled0, tokens0)))
        want = {"preserve": ((f - f0) ** 2).mean(), "uniformity": uniformity(pooled)}
        ramp = min(max((i / TOTAL - 0.25) / 0.5, 0), 1)
        beta, gamma = ramp, 1 - 0.9 * ramp
        loss = PRESERVE * want["preserve"] + UNIFORM * want["uniformity"]
        if frozen_teacher:
            missed = (adapter(tokens, masked, taught) - taught)[masked]
            want["reconstruction"] = (missed**2).mean()
            loss = loss + beta * want["reconstruction"]
        else:
            tokens = adapter(early(tower, view, 1), masked)
            taught = early(average, view, 1).detach()
        want["cosines"], want["norms"] = structure(tokens, taught)
        return want | {"loss": loss + gamma * (want["cosines"] + want["norms"]), "gamma": gamma}

    @torch.no_grad()
    def move_average():
        for a, b in zip(average.parameters(), tower.parameters(), strict=True):
            a.lerp_(b, 1 - DECAY)

    rng = np.random.default_rng(4)
    batch_of = lambda step: random_batch(rng, SALM_BATCH, 21)  # noqa: E731
    compare_steps(p, arrays, trained.values(), STEPS, batch_of, want_of, tensors_of, trained, 1e-4, move_average)


ALIGN, SPARSITY, SCALE, MASK_RATE = 10.0, 2.0, 30.0, 3.0
TEXT = backbones.TextSpec(context_length=11, vocab_size=60, width=36, heads=3, layers=2, mlp_dim=54)
SPEC = dataclasses.replace(small.SPEC, text=TEXT)
MASK_NET = names.Table("mask network", (*BLOCKS, (r"^transformer\.resblocks\.0\.", "block.")))
TABLES = {"vision": clip.table("vision", SPEC), "text": clip.table("text", SPEC), "mask_net": MASK_NET}


class MaskNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        width, linear = TEXT.width, torch.nn.Linear
        self.norm_in, self.norm = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.block = ResidualAttentionBlock(width, TEXT.heads, TEXT.mlp_dim / width, act_layer=QuickGELU)
        self.query = torch.nn.Parameter(torch.zeros(width))
        self.keys, self.values = linear(width, width, bias=False), linear(width, width)
        self.proj = linear(width, SPEC.embed_dim)

    def forward(self, states):
        x = self.norm(self.block(self.norm_in(states)))
        q, k, v = (
            a.view(len(x), -1, TEXT.heads, TEXT.width // TEXT.heads).transpose(1, 2)
            for a in (self.query.expand(len(x), 1, -1), self.keys(x), self.values(x))
        )
        return self.proj(((q @ k.mT) / q.shape[-1] ** 0.5).softmax(-1).matmul(v).transpose(1, 2).flatten(1))


def every_tensor(p, arrays) -> dict[str, torch.Tensor]:
    """Every trained array under the names of open_clip, and of `MaskNet`."""
    return {k: v for part, table in TABLES.items() for k, v in part_tensors(p, arrays, part, table).items()}


def torch_loss(model, mask_net, image, ids):
    pixels = torch.from_numpy(image).float().permute(0, 3, 1, 2) / 255
    x = model.encode_image((pixels - column(SPEC.mean)) / column(SPEC.std))
    ids = torch.from_numpy(ids).long()
    states = model.transformer(model.token_embedding(ids) + model.positional_embedding, attn_mask=model.attn_mask)
    ends = model.ln_final(states)[torch.arange(len(ids)), ids.argmax(-1)]
    y = ends @ model.text_projection
    soft = mask_net(states.detach()).sigmoid()
    mask = soft + ((soft > 0.5).float() - soft).detach()
    # Every image under every caption's mask, written out: [B, B, D].
    logits = SCALE * torch.cosine_similarity(mask[None] * x[:, None], y[None], dim=-1)
    right = torch.arange(len(x))
    cross = torch.nn.functional.cross_entropy
    return ALIGN * (cross(logits, right) + cross(logits.T, right)) + SPARSITY * mask.mean(), mask


def test_smartclip():
    c = config.default(SPEC, objective="smartclip")
    c.update(dtype="float32", batch_size=8, steps=12)
    c.backbone.text.context_length = TEXT.context_length
    c.smartclip.logit_scale = SCALE
    c.trainable = (("mask_net/.*", MASK_RATE), (".*", 1.0))
    # AdamW divides by the gradient's own size, so that the rounding of a gradient that is zero, such as that of the
    # bias of keys, is an update of any size where eps is not much larger.
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2)
    p, arrays = random_program(c)
    model, mask_net, start = torch_model(SPEC), MaskNet(), every_tensor(p, arrays)
    missing = model.load_state_dict({k: v for k, v in start.items() if k in model.state_dict()}, strict=False)
    assert missing.missing_keys == ["logit_scale"]
    mask_net.load_state_dict({k: v for k, v in start.items() if k not in model.state_dict()})
    towers = {k: v for k, v in model.named_parameters() if k != "logit_scale"}
    mask = {"params": list(mask_net.parameters()), "lr": c.optim.lr * MASK_RATE, "weight_decay": 0.0}
    groups, masks = [{"params": list(towers.values())}, mask], []

    def want_of(step, batch, key):
        loss, mask = torch_loss(model, mask_net, batch["image"], batch["caption"])
        masks.append(mask.detach().numpy())
        return {"loss": loss, "selected": float(mask.mean())}

    rng = np.random.default_rng(4)
    batch_of = lambda step: random_batch(rng, 8, 21, 11)  # noqa: E731
    every, trained = functools.partial(every_tensor, p), towers | dict(mask_net.named_parameters())
    compare_steps(p, arrays, groups, STEPS, batch_of, want_of, every, trained, 2e-5)
    assert 0.1 < np.mean(masks) < 0.9 and (masks[0][0] != masks[0][1]).any()
