"""Ten optimizer steps of SmartCLIP against the same written in plain PyTorch, with open_clip's own towers."""

import dataclasses

import jax
import numpy as np
import small
import torch
from eval_models import torch_model
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch_objectives import begin, check_trained, column, cosine_schedule, part_tensors, random_program

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.text import BLOCKS
from diva_jax.weights import clip, names

STEPS, ALIGN, SPARSITY, SCALE, MASK_RATE = 10, 10.0, 2.0, 30.0, 3.0
TEXT = backbones.TextSpec(context_length=11, vocab_size=60, width=36, heads=3, layers=2, mlp_dim=54)
SPEC = dataclasses.replace(small.SPEC, text=TEXT)
MASK_NET = names.Table("mask network", (*BLOCKS, (r"^transformer\.resblocks\.0\.", "block.")))
TABLES = {"vision": clip.vision_table(SPEC), "text": clip.text_table(SPEC), "mask_net": MASK_NET}


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


def tensors_of(p, arrays) -> dict[str, torch.Tensor]:
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


def test_ten_steps():
    c = config.default(SPEC, objective="smartclip")
    c.update(dtype="float32", batch_size=8, steps=12)
    c.backbone.text.context_length = TEXT.context_length
    c.smartclip.logit_scale = SCALE
    c.trainable = (("mask_net/.*", MASK_RATE), (".*", 1.0))
    # AdamW divides by the gradient's own size, so that the rounding of a gradient that is zero, such as that of the
    # bias of keys, is an update of any size where eps is not much larger.
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2)
    p, arrays = random_program(c)
    rng = np.random.default_rng(4)
    model, mask_net, start = torch_model(SPEC), MaskNet(), tensors_of(p, arrays)
    missing = model.load_state_dict({k: v for k, v in start.items() if k in model.state_dict()}, strict=False)
    assert missing.missing_keys == ["logit_scale"]
    mask_net.load_state_dict({k: v for k, v in start.items() if k not in model.state_dict()})
    trained = {k: v for k, v in model.named_parameters() if k != "logit_scale"}

    o = c.optim
    groups = [
        {"params": list(trained.values()), "lr": o.lr, "weight_decay": o.weight_decay},
        {"params": list(mask_net.parameters()), "lr": o.lr * MASK_RATE, "weight_decay": 0.0},
    ]
    opt = torch.optim.AdamW(groups, betas=(o.b1, o.b2), eps=o.eps)
    schedule = cosine_schedule(opt, c)
    state, frozen, _ = begin(p, arrays)
    step, rows, masks = p.step(0), np.arange(8, dtype=np.int32), []
    for _ in range(STEPS):
        image = rng.integers(0, 256, (8, 21, 21, 3)).astype(np.uint8)
        ids = rng.integers(1, 58, (8, 11)).astype(np.int32)
        ends = rng.integers(2, 11, 8)
        ids[rows, ends] = 59
        ids[np.arange(11) > ends[:, None]] = 0
        opt.zero_grad()
        value, mask = torch_loss(model, mask_net, image, ids)
        value.backward()
        opt.step()
        schedule.step()
        masks.append(mask.detach().numpy())
        batch = jax.device_put({"image": image, "caption": ids, "row": rows}, p.batch_sharding)
        state, metrics = step(state, frozen, batch)
        np.testing.assert_allclose(metrics["loss"], value.item(), rtol=2e-5)
        np.testing.assert_allclose(metrics["selected"], mask.detach().mean(), rtol=1e-6)
    assert 0.1 < np.mean(masks) < 0.9 and (masks[0][0] != masks[0][1]).any()
    check_trained(start, tensors_of(p, state["params"]), trained | dict(mask_net.named_parameters()))
