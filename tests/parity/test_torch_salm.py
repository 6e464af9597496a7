"""Ten optimizer steps of SALM against the same written in plain PyTorch, with open_clip's and timm's towers."""

import copy
import functools

import jax
import numpy as np
import pytest
import small
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch_objectives import (
    begin,
    check_trained,
    column,
    cosine_schedule,
    part_tensors,
    random_program,
    vision_tower,
)
from torch_towers import torch_features, torch_tower

from diva_jax.models import backbones
from diva_jax.models.backbones import dinov2
from diva_jax.models.backbones.shared.text import BLOCKS
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, names

STEPS, TOTAL, B, DECAY, PRESERVE, UNIFORM = 10, 12, 6, 0.7, 2.0, 0.3
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
        torch.stack([(-2 * (x[i] - x[j]).square().sum()).exp() for i in range(B) for j in range(B) if i != j])
        .mean()
        .log()
    )


@pytest.mark.parametrize("teacher, visible", [("frozen", "added"), ("self", "none")])
def test_ten_steps(teacher, visible):
    c = small.salm_config(batch_size=B, steps=TOTAL, salm__adapter__visible=visible)
    c.salm.update(teacher=teacher, layer=1, preserve_weight=PRESERVE, uniformity_weight=UNIFORM, mask=0.6)
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True, clip=1e9)
    c.ema.decay = DECAY
    p, arrays = random_program(c)
    spec, teacher_spec, frozen_teacher = backbones.spec_of(c), backbones.spec_of(c, "teacher"), teacher == "frozen"
    tower = vision_tower(p, arrays, spec)
    untuned = torch.nn.Module.requires_grad_(copy.deepcopy(tower), False)
    tensors = part_tensors(p, arrays, "original", clip.vision_table(spec))
    untuned.load_state_dict({n.removeprefix("visual."): a for n, a in tensors.items()})
    sizes = (spec.embed_dim, teacher_spec.embed_dim) if frozen_teacher else (spec.width, spec.width)
    adapter, average = Adapter(c.salm.adapter, *sizes, spec.patches, visible == "added"), copy.deepcopy(tower)
    adapter.load_state_dict(part_tensors(p, arrays, "adapter", ADAPTER))
    dino = torch_tower(teacher_spec)
    if frozen_teacher:
        tensors = part_tensors(p, arrays, "teacher", dinov2.VISION)
        dino.load_state_dict({n.removeprefix("visual."): a for n, a in tensors.items()})

    def tensors_of(arrays):
        return {
            **part_tensors(p, arrays, "vision", clip.vision_table(spec)),
            **part_tensors(p, arrays, "adapter", ADAPTER),
        }

    start, trained = tensors_of(arrays), {f"visual.{n}": a for n, a in tower.named_parameters()}
    trained |= dict(adapter.named_parameters())
    o, rng = c.optim, np.random.default_rng(4)
    opt = torch.optim.AdamW(trained.values(), lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
    schedule, (state, frozen, key), step = cosine_schedule(opt, c), begin(p, arrays), p.step(0)
    rows, module = np.arange(B, dtype=np.int32), p.skeleton.merge(arrays)
    for i in range(STEPS):
        image = rng.integers(0, 256, (B, 21, 21, 3)).astype(np.uint8)
        masked = torch.from_numpy(np.array(module.masked(image_keys(key, np.int32(i), rows))))
        assert (masked.sum(1) == round(0.6 * spec.patches)).all()
        pixels = torch.from_numpy(image).float().permute(0, 3, 1, 2) / 255
        view = (pixels - column(spec.mean)) / column(spec.std)
        tokens, pooled = torch_features(tower, view)
        with torch.no_grad():
            tokens0, pooled0 = torch_features(untuned, view)
            side = (teacher_spec.image_size,) * 2
            seen = torch.nn.functional.interpolate(pixels, side, mode="bicubic", antialias=True)
            taught = torch_features(dino, (seen - column(teacher_spec.mean)) / column(teacher_spec.std))[0]
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
        loss = loss + gamma * (want["cosines"] + want["norms"])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        with torch.no_grad():
            for a, b in zip(average.parameters(), tower.parameters(), strict=True):
                a.lerp_(b, 1 - DECAY)
        batch = jax.device_put({"image": image, "row": rows}, p.batch_sharding)
        state, metrics = step(state, frozen, batch)
        for name, value in (want | {"loss": loss}).items():
            np.testing.assert_allclose(metrics[name], value.item(), rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(metrics["gamma"], gamma, rtol=1e-5)
    check_trained(start, tensors_of(state["params"]), trained)
