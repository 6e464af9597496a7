"""Ten optimizer steps of the whole objective against an implementation in plain PyTorch."""

import numpy as np
import pytest
import small
import torch
from torch_objectives import (
    Generator,
    check_trained,
    column,
    drawn_by,
    part_tensors,
    random_program,
    to_torch,
    torch_train,
    vision_tower,
)

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.weights import clip, names

STEPS = 10
PROJECTION = names.Table("visual_proj")


class TorchDiva:
    """The objective in PyTorch, from open_clip's and diffusers' own modules."""

    def __init__(self, p, arrays):
        self.config, self.spec, self.generator = p.config, backbones.spec_of(p.config), Generator(p, arrays)
        assert self.spec.select.startswith("random:")
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
    model, run = TorchDiva(p, arrays), small.train(c, STEPS, arrays=lambda _: arrays)
    drawn = drawn_by(run, arrays)

    def losses(step, rows):
        image, (t, noise, indices) = drawn(step, rows)
        noise = torch.from_numpy(np.array(noise)).permute(0, 1, 4, 2, 3)
        return model.losses(image, (to_torch(t), noise, to_torch(indices)))

    def backward(step):
        if mode == "faithful":
            for a in range(c.accum):
                first, last = losses(step, slice(a, None, c.accum))
                # The authors' order: the first draw's backward pass, undivided, inside the forward pass.
                first.backward()
                (last / c.accum).backward()
        else:  # Equal weights: the mean over the whole batch, which no micro-batch may change.
            (sum(losses(step, slice(None))) / 2).backward()

    clipped = torch_train(model.parameters().values(), c, STEPS, backward)
    assert clipped >= 3, "the clip never worked: the test would not see it missing"
    start, ours = {}, {}
    for part, table in (("vision", clip.vision_table(model.spec)), ("visual_proj", PROJECTION)):
        ours |= {f"{part}/{k}": v for k, v in part_tensors(p, run.states[-1]["params"], part, table).items()}
        start |= {f"{part}/{k}": v for k, v in part_tensors(p, arrays, part, table).items()}
    check_trained(start, ours, model.parameters())
