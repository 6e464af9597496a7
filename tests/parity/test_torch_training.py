"""Ten optimizer steps of the whole objective against an implementation in plain PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from torch_objectives import (
    Generator,
    begin,
    check_trained,
    column,
    cosine_schedule,
    part_tensors,
    random_program,
    to_torch,
    vision_tower,
)

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.objectives import diva
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, names

STEPS = 10
PROJECTION = names.Table("visual_proj")


class TorchDiva:
    """The objective in PyTorch, from open_clip's and diffusers' own modules."""

    def __init__(self, p, arrays):
        self.config, self.spec, self.generator = p.config, backbones.spec_of(p.config), Generator(p, arrays)
        self.vision = vision_tower(p, arrays, self.spec)
        self.visual_proj = torch.nn.Linear(self.spec.embed_dim, p.config.diffusion.unet.cross_attention_dim)
        self.visual_proj.load_state_dict(part_tensors(p, arrays, "visual_proj", PROJECTION))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        vision = {f"vision/visual.{k}": v for k, v in self.vision.named_parameters()}
        return vision | {f"visual_proj/{k}": v for k, v in self.visual_proj.named_parameters()}

    def tokens(self, view):
        """Pooled token, then patch tokens, all after the final norm and the projection."""
        v = self.vision
        x = v.conv1(view).flatten(2).transpose(1, 2)
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        return v.ln_post(v.transformer(v.ln_pre(x))) @ v.proj

    def views(self, image):
        x = torch.from_numpy(image).float().permute(0, 3, 1, 2) / 255

        size, faithful = self.spec.image_size, self.config.diva.vae_view == "faithful"
        mean, std = column(backbones.OPENAI_MEAN), column(backbones.OPENAI_STD)
        resize = torch.nn.functional.interpolate
        if faithful:
            z = (x - mean) / std
            y = z * column(backbones.IMAGENET_STD) + column(backbones.IMAGENET_MEAN)
            return 2 * y - 1, resize(z, (size, size), mode="bilinear", align_corners=False)
        small_x = resize(x, (size, size), mode="bicubic", align_corners=False, antialias=True)
        return 2 * x - 1, (small_x - mean) / std

    def losses(self, image, drawn) -> list[torch.Tensor]:
        """One loss per draw, for one micro-batch."""
        vae_view, view = self.views(image)
        latents, text = self.generator.latents(vae_view), self.generator.text.mean(1, keepdim=True)
        out = []
        for t, noise, indices in zip(*drawn, strict=True):
            tokens = self.tokens(view)
            picked = torch.gather(tokens[:, 1:], 1, indices[:, :, None].expand(-1, -1, tokens.shape[-1]))
            features = torch.cat([tokens[:, :1], picked], 1)
            noisy = self.generator.add_noise(latents, noise, t)
            pred = self.generator.unet(noisy, t, self.visual_proj(features) + text).sample
            out.append(torch.nn.functional.mse_loss(pred, noise))
        return out


def torch_train(model: TorchDiva, c, draws_of) -> None:
    params = list(model.parameters().values())
    o = c.optim
    if o.name == "sgd":
        opt = torch.optim.SGD(params, lr=o.lr, momentum=o.momentum)
    else:
        decayed = [p for p in params if p.ndim > 1]
        rest = [p for p in params if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        opt = torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps)
    schedule = cosine_schedule(opt, c)
    clipped = 0
    for step in range(STEPS):
        opt.zero_grad()
        if c.diva.draw_weights == "faithful":
            for a in range(c.accum):
                first, last = model.losses(*draws_of(step, slice(a, None, c.accum)))
                # The authors' order: the first draw's backward pass, undivided, inside the forward pass.
                first.backward()
                (last / c.accum).backward()
        else:  # Equal weights: the mean over the whole batch, which no micro-batch may change.
            first, last = model.losses(*draws_of(step, slice(None)))
            ((first + last) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(params, o.clip)
        clipped += float(norm) > o.clip
        opt.step()
        schedule.step()
    assert clipped >= 3, "the clip never worked: the test would not see it missing"


@pytest.mark.parametrize("optimizer, mode", [("sgd", "faithful"), ("adamw", "exact")])
def test_ten_steps(optimizer, mode):
    c = small.small_config(
        batch_size=10,
        accum=5,
        steps=14,
        optim__name=optimizer,
        optim__lr=0.2 if optimizer == "sgd" else 1e-2,
        optim__weight_decay=0.1 if optimizer == "adamw" else 0.0,
        optim__warmup=0.15,
        # As AdamW divides by the gradient's own size, a tiny gradient's rounding would show through 1e-8.
        optim__eps=1e-4,
        optim__clip=0.5 if mode == "faithful" else 0.1,
    )
    if mode == "faithful":
        config.faithful(c)
    p, arrays = random_program(c)
    model = TorchDiva(p, arrays)
    state, frozen, key = begin(p, arrays)
    batches = [small.batch(p, i) for i in range(STEPS)]
    module = p.skeleton.merge(arrays)
    side = c.data.image_size // module.vae.config.downscale
    draw = jax.jit(lambda keys: module.draw(keys, (side, side, 4)))

    def draws_of(step, part):
        rows = np.arange(c.batch_size)[part]
        t, noise, indices = draw(image_keys(key, jnp.int32(step), jnp.asarray(rows)))
        noise = torch.from_numpy(np.array(noise)).permute(0, 1, 4, 2, 3)
        return np.asarray(batches[step]["image"])[rows], (to_torch(t), noise, to_torch(indices))

    step_fn = p.step(0)
    for batch in batches:
        state, _ = step_fn(state, frozen, batch)
    torch_train(model, c, draws_of)
    start, ours = {}, {}
    for part, table in (("vision", clip.vision_table(model.spec)), ("visual_proj", PROJECTION)):
        ours |= {f"{part}/{k}": v for k, v in part_tensors(p, state["params"], part, table).items()}
        start |= {f"{part}/{k}": v for k, v in part_tensors(p, arrays, part, table).items()}
    check_trained(start, ours, model.parameters())


def test_selected_tokens_count():
    """The torch side assumes `random`; another selection in small.SPEC would make it compare something else."""
    assert diva.parse_select(small.SPEC.select)[0] == "random"
