"""Ten optimizer steps of ComCLIP, SALM and SmartCLIP against the same in plain PyTorch, with the libraries' towers."""

import copy
import functools

import numpy as np
import pytest
import small
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention
from torch_models import torch_features, torch_model, torch_tower
from torch_objectives import compare_steps, part_tensors, pixels, random_batch, random_program, resized, to_torch
from torch_objectives import tower as tower_of

from diva_jax.models import backbones
from diva_jax.training.step import image_keys
from diva_jax.weights import names

STEPS, B = 10, 8
BLOCKS = backbones.architecture("vit").CHECKPOINT.text.rename[:6]  # Of the names within blocks.


def contrast(logits):
    """Symmetric InfoNCE."""
    right = torch.arange(len(logits))
    return cross_entropy(logits, right) + cross_entropy(logits.T, right)


def terms(x, untuned, texts, taught, c):
    """(contrast, anchor, relation) of embeddings [B, D]."""
    x, texts, untuned, taught = (normalize(a, dim=-1) for a in (x, texts, untuned, taught))
    relation = 0.0
    for i in range(B):
        p, q = ((e[i] @ e.T / c.relation.temperature).softmax(0) for e in (taught, x))
        relation = relation + (p * (p / q).log()).sum() / B
    return contrast(x @ texts.T / c.contrast.temperature) / 2, ((x - untuned) ** 2).mean(), relation


def test_comclip():
    c = small.comclip_config(batch_size=B, steps=12, relation__weight=3.0)
    c.optim.update(lr=2e-3, warmup_steps=-1, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True)
    c.contrast.temperature, c.anchor.weight = 0.2, 40.0
    p, arrays = random_program(c)
    spec, teacher_spec = backbones.spec_of(c), backbones.spec_of(c, "teacher")
    vision = functools.partial(part_tensors, p, part="vision", table=names.table("vision", spec))
    model = torch_model(spec)
    texts = part_tensors(p, arrays, "contrast", names.table("text", spec))
    model.load_state_dict(vision(arrays) | texts, strict=False)
    untuned, teacher = tower_of(p, arrays, "anchor", spec), tower_of(p, arrays, "relation", teacher_spec)
    trained = {f"visual.{n}": a for n, a in model.visual.named_parameters()}

    def want_of(step, batch, key):
        view = resized(pixels(batch), spec)
        with torch.no_grad():
            fixed = untuned(view), model.encode_text(to_torch(batch["caption"]))
            fixed = *fixed, teacher(resized(pixels(batch), teacher_spec))
        found = dict(zip(("contrast", "anchor", "relation"), terms(model.encode_image(view), *fixed, c), strict=True))
        return found | {"loss": found["contrast"] + 40 * found["anchor"] + 3 * found["relation"]}

    rng = np.random.default_rng(4)
    batch_of = lambda step: random_batch(rng, B, 21, 11)  # noqa: E731
    compare_steps(p, arrays, trained.values(), STEPS, batch_of, want_of, vision, trained, 5e-5)


TOTAL, SALM_BATCH, DECAY, PRESERVE, UNIFORM = 12, 6, 0.7, 2.0, 0.3
ADAPTER = names.Table("adapter", BLOCKS)


class Adapter(torch.nn.Module):
    def __init__(self, o, n_in, n_out, patches, sees):
        super().__init__()
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        self.fc_in, self.fc_out = torch.nn.Linear(n_in, o.width), torch.nn.Linear(o.width, n_out)
        self.fc_seen = torch.nn.Linear(n_out, o.width) if sees else None
        self.mask_token = torch.nn.Parameter(torch.zeros(o.width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(patches, o.width))
        self.transformer, self.norm = torch.nn.Module(), norm(o.width)
        blocks = [ResidualAttentionBlock(o.width, o.heads, norm_layer=norm) for _ in range(o.layers)]
        self.transformer.resblocks = torch.nn.Sequential(*blocks)

    def forward(self, tokens, masked, seen=None):
        x, masked = self.fc_in(tokens), masked[..., None]
        if seen is None:
            x = torch.where(masked, self.mask_token, x)
        elif self.fc_seen is not None:
            x = x + torch.where(masked, self.mask_token, self.fc_seen(seen))
        return self.fc_out(self.norm(self.transformer.resblocks(x + self.pos_embed)))


def structure(x, taught):
    """As the paper has it: matrices of all pairs of patches."""

    def matrices(x):
        cosines = torch.stack([torch.cosine_similarity(a[:, None], a[None], dim=-1) for a in x])
        length = x.norm(dim=-1)
        apart = length[:, :, None] - length[:, None, :]
        return cosines, apart / apart.flatten(1).std(dim=1, correction=0)[:, None, None]

    return [((a - b) ** 2).mean() for a, b in zip(matrices(x), matrices(taught), strict=True)]


def uniformity(x):
    x, other = normalize(x, dim=-1), [(i, j) for i in range(SALM_BATCH) for j in range(SALM_BATCH) if i != j]
    return torch.stack([(-2 * (x[i] - x[j]).square().sum()).exp() for i, j in other]).mean().log()


@pytest.mark.parametrize("teacher, visible", [("frozen", "added"), ("self", "none")])
def test_salm(teacher, visible):
    c = small.salm_config(batch_size=SALM_BATCH, steps=TOTAL, salm__adapter__visible=visible, ema__decay=DECAY)
    c.salm.update(teacher=teacher, layer=1, preserve_weight=PRESERVE, uniformity_weight=UNIFORM, mask=0.6)
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True, clip=1e9)
    p, arrays = random_program(c)
    spec, teacher_spec, frozen_teacher = backbones.spec_of(c), backbones.spec_of(c, "teacher"), teacher == "frozen"
    tower, untuned = tower_of(p, arrays, "vision", spec), tower_of(p, arrays, "original", spec)
    sizes = (spec.embed_dim, teacher_spec.embed_dim) if frozen_teacher else (spec.width, spec.width)
    adapter, average = Adapter(c.salm.adapter, *sizes, spec.patches, visible == "added"), copy.deepcopy(tower)
    adapter.load_state_dict(part_tensors(p, arrays, "adapter", ADAPTER))
    dino = tower_of(p, arrays, "teacher", teacher_spec) if frozen_teacher else torch_tower(teacher_spec)

    def tensors_of(arrays):
        vision = part_tensors(p, arrays, "vision", names.table("vision", spec))
        return {**vision, **part_tensors(p, arrays, "adapter", ADAPTER)}

    trained = {f"visual.{n}": a for n, a in tower.named_parameters()} | dict(adapter.named_parameters())
    module = p.skeleton.merge(arrays)

    def want_of(i, batch, key):
        masked = to_torch(module.masked(image_keys(key, np.int32(i), batch["row"])))
        assert (masked.sum(1) == round(0.6 * spec.patches)).all()
        view = resized(pixels(batch), spec)
        tokens, pooled = torch_features(tower, view)
        with torch.no_grad():
            tokens0, pooled0 = torch_features(untuned, view)
            taught = torch_features(dino, resized(pixels(batch), teacher_spec))[0]
        f, f0 = (torch.cat([a[:, None], b], 1) for a, b in ((pooled, tokens), (pooled0, tokens0)))
        want = {"preserve": ((f - f0) ** 2).mean(), "uniformity": uniformity(pooled)}
        beta = min(max((i / TOTAL - 0.25) / 0.5, 0), 1)
        gamma = 1 - 0.9 * beta
        loss = PRESERVE * want["preserve"] + UNIFORM * want["uniformity"]
        if frozen_teacher:
            missed = (adapter(tokens, masked, taught) - taught)[masked]
            want["reconstruction"] = (missed**2).mean()
            loss = loss + beta * want["reconstruction"]
        else:
            first = [t.transformer.resblocks[0](t._embeds(view))[:, 1:] for t in (tower, average)]
            tokens, taught = adapter(first[0], masked), first[1].detach()
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
MASK_NET = names.Table("mask network", (*BLOCKS, (r"^transformer\.resblocks\.0\.", "block.")))


class MaskNet(torch.nn.Module):
    def __init__(self, text, embed_dim):
        super().__init__()
        width, linear, self.heads = text.width, torch.nn.Linear, text.heads
        self.norm_in, self.norm = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.block = ResidualAttentionBlock(width, text.heads, text.mlp_dim / width, act_layer=QuickGELU)
        self.query = torch.nn.Parameter(torch.zeros(width))
        self.keys, self.values = linear(width, width, bias=False), linear(width, width)
        self.proj = linear(width, embed_dim)

    def forward(self, states):
        x = self.norm(self.block(self.norm_in(states)))
        parts = self.query.expand(len(x), 1, -1), self.keys(x), self.values(x)
        heads = [a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in parts]
        return self.proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1))


def test_smartclip():
    c = small.smartclip_config(batch_size=B, steps=12, smartclip__logit_scale=SCALE)
    c.trainable = (("mask_net/.*", MASK_RATE), (".*", 1.0))
    # AdamW divides by the gradient's own size, so that the rounding of a gradient that is zero, such as that of the
    # bias of keys, is an update of any size where eps is not much larger.
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2)
    p, arrays = random_program(c)
    spec = backbones.spec_of(c)
    tables = {"vision": names.table("vision", spec), "text": names.table("text", spec), "mask_net": MASK_NET}

    def every_tensor(arrays):
        return {k: v for part, table in tables.items() for k, v in part_tensors(p, arrays, part, table).items()}

    model, mask_net, start = torch_model(spec), MaskNet(spec.text, spec.embed_dim), every_tensor(arrays)
    missing = model.load_state_dict({k: v for k, v in start.items() if k in model.state_dict()}, strict=False)
    assert missing.missing_keys == ["logit_scale"]
    mask_net.load_state_dict({k: v for k, v in start.items() if k not in model.state_dict()})
    towers = {k: v for k, v in model.named_parameters() if k != "logit_scale"}
    masks, trained = [], towers | dict(mask_net.named_parameters())
    mask_group = {"params": list(mask_net.parameters()), "lr": c.optim.lr * MASK_RATE, "weight_decay": 0.0}

    def want_of(step, batch, key):
        x, ids = model.encode_image(resized(pixels(batch), spec)), to_torch(batch["caption"])
        states = model.transformer(model.token_embedding(ids) + model.positional_embedding, attn_mask=model.attn_mask)
        y = model.ln_final(states)[torch.arange(len(ids)), ids.argmax(-1)] @ model.text_projection
        soft = mask_net(states.detach()).sigmoid()
        mask = soft + ((soft > 0.5).float() - soft).detach()
        masks.append(mask.detach().numpy())
        # Every image under every caption's mask, written out: [B, B, D].
        logits = SCALE * torch.cosine_similarity(mask[None] * x[:, None], y[None], dim=-1)
        return {"loss": ALIGN * contrast(logits) + SPARSITY * mask.mean(), "selected": float(mask.mean())}

    rng = np.random.default_rng(4)
    batch_of = lambda step: random_batch(rng, B, 21, 11)  # noqa: E731
    groups = [{"params": list(towers.values())}, mask_group]
    compare_steps(p, arrays, groups, STEPS, batch_of, want_of, every_tensor, trained, 2e-5)
    assert 0.1 < np.mean(masks) < 0.9 and (masks[0][0] != masks[0][1]).any()
