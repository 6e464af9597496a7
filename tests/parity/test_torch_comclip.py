"""Ten optimizer steps of ComCLIP against the same written in plain PyTorch, with open_clip's and timm's towers."""

import jax
import numpy as np
import small
import torch
from eval_models import torch_model
from torch.nn.functional import cross_entropy, interpolate, normalize
from torch_objectives import begin, check_trained, column, cosine_schedule, part_tensors, random_program
from torch_towers import torch_tower

from diva_jax.models import backbones
from diva_jax.models.backbones import dinov2
from diva_jax.weights import clip

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


def test_ten_steps():
    c = small.comclip_config(batch_size=B, steps=12, relation__weight=3.0)
    c.optim.update(lr=2e-3, warmup_steps=-1, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True)
    c.contrast.temperature, c.anchor.weight = 0.2, 40.0
    p, arrays = random_program(c)
    spec, teacher_spec, text_table = backbones.spec_of(c), backbones.spec_of(c, "teacher"), clip.text_table
    start = part_tensors(p, arrays, "vision", clip.vision_table(spec))
    model, untuned = (torch_model(spec, clip_seed) for clip_seed in (1, 2))
    model.load_state_dict({**start, **part_tensors(p, arrays, "contrast", text_table(spec))}, strict=False)
    untuned.load_state_dict(part_tensors(p, arrays, "anchor", clip.vision_table(spec)), strict=False)
    teacher = torch_tower(teacher_spec)
    tensors = part_tensors(p, arrays, "relation", dinov2.VISION)
    teacher.load_state_dict({n.removeprefix("visual."): a for n, a in tensors.items()})
    trained = {f"visual.{n}": a for n, a in model.visual.named_parameters()}
    assert trained.keys() == start.keys()

    o, rng = c.optim, np.random.default_rng(4)
    opt = torch.optim.AdamW(trained.values(), lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
    schedule, (state, frozen, _), step = cosine_schedule(opt, c), begin(p, arrays), p.step(0)
    for _ in range(STEPS):
        image = rng.integers(0, 256, (B, 21, 21, 3)).astype(np.uint8)
        ids = rng.integers(1, 58, (B, 11)).astype(np.int32)
        ids[np.arange(B), rng.integers(2, 11, B)] = 59
        pixels = torch.from_numpy(image).float().permute(0, 3, 1, 2) / 255
        view = (pixels - column(spec.mean)) / column(spec.std)
        side = teacher_spec.image_size
        small_pixels = interpolate(pixels, (side, side), mode="bicubic", antialias=True)
        with torch.no_grad():
            texts = model.encode_text(torch.from_numpy(ids).long())
            fixed = untuned.encode_image(view)
            taught = teacher((small_pixels - column(teacher_spec.mean)) / column(teacher_spec.std))
        found = terms(model.encode_image(view), fixed, texts, taught, c)
        loss = sum(w * term for w, term in zip((1.0, 40.0, 3.0), found, strict=True))
        opt.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(trained.values(), o.clip))
        opt.step()
        schedule.step()
        batch = {"image": image, "caption": ids, "row": np.arange(B, dtype=np.int32)}
        state, metrics = step(state, frozen, jax.device_put(batch, p.batch_sharding))
        want = dict(zip(("contrast", "anchor", "relation"), found, strict=True)) | {"loss": loss}
        for name, value in want.items():
            np.testing.assert_allclose(metrics[name], value.item(), rtol=5e-5, err_msg=name)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)
    check_trained(start, part_tensors(p, state["params"], "vision", clip.vision_table(spec)), trained)
