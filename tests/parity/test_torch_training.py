"""Ten optimizer steps of the whole objective against an implementation in plain PyTorch."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from flax import nnx
from helpers import close, relative_error

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.objectives.shared import condition
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, diffusers, names

STEPS = 10


def part_tensors(p, arrays, part: str, table) -> dict[str, torch.Tensor]:
    """Returns the arrays of one part under the names of the original library."""
    state = {
        path[1:]: var.replace(arrays[name])
        for name, (path, var) in p.skeleton.variables.items()
        if name.startswith(part + "/")
    }
    return {k: torch.from_numpy(v.copy()) for k, v in names.to_torch(nnx.from_flat_state(state), table).items()}


class TorchDiva:
    """The objective in PyTorch, from open_clip's and diffusers' own modules."""

    def __init__(self, p, arrays):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from open_clip.transformer import QuickGELU, VisionTransformer

        self.config, self.spec = p.config, backbones.spec_of(p.config)
        s, d = self.spec, p.config.diffusion
        self.vision = VisionTransformer(
            s.image_size,
            s.patch_size,
            s.width,
            s.layers,
            s.heads,
            s.mlp_dim / s.width,
            output_dim=s.embed_dim,
            act_layer=QuickGELU,
            output_tokens=True,
        )
        tensors = part_tensors(p, arrays, "vision", clip.vision_table(s))
        self.vision.load_state_dict({k.removeprefix("visual."): v for k, v in tensors.items()})
        self.visual_proj = torch.nn.Linear(s.embed_dim, d.unet.cross_attention_dim)
        self.visual_proj.load_state_dict(part_tensors(p, arrays, "visual_proj", names.Table("visual_proj")))
        self.unet = UNet2DConditionModel(**d.unet.to_dict()).requires_grad_(False)
        self.unet.load_state_dict(part_tensors(p, arrays, "unet", diffusers.UNET))
        vae = d.vae.to_dict() | {"up_block_types": ("UpDecoderBlock2D",) * len(d.vae.block_out_channels)}
        self.vae = AutoencoderKL(**vae).requires_grad_(False)
        missing = self.vae.load_state_dict(part_tensors(p, arrays, "vae", diffusers.VAE), strict=False)
        assert all(k.startswith(("decoder.", "post_quant")) for k in missing.missing_keys)
        self.text = torch.from_numpy(np.asarray(arrays["text_context"]).copy())
        betas = torch.linspace(d.scheduler.beta_start**0.5, d.scheduler.beta_end**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = torch.cumprod(1 - betas, 0).float()

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

        def column(values):
            return torch.tensor(values).view(1, 3, 1, 1)

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
        latents = self.vae.config.scaling_factor * self.vae.encode(vae_view).latent_dist.mean
        out = []
        for t, eps, indices in zip(*drawn, strict=True):
            tokens = self.tokens(view)
            picked = torch.gather(tokens[:, 1:], 1, indices[:, :, None].expand(-1, -1, tokens.shape[-1]))
            features = torch.cat([tokens[:, :1], picked], 1)
            c = self.visual_proj(features) + self.text.mean(1, keepdim=True)
            a = self.abar[t].view(-1, 1, 1, 1)
            noise = eps.permute(0, 3, 1, 2)
            pred = self.unet(a.sqrt() * latents + (1 - a).sqrt() * noise, t, c).sample
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
    warm = math.ceil(o.warmup * c.steps)

    def factor(step):
        if step < warm:
            return step / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (c.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(opt, factor)
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
    p = small.program(c)
    arrays = small.random_arrays(p)
    model = TorchDiva(p, arrays)
    state = p.init_state({n: jnp.copy(arrays[n]) for n in p.trained})
    frozen = {n: arrays[n] for n in p.abstract_frozen()}
    key, batches = np.asarray(state["key"]), [small.batch(p, i) for i in range(STEPS)]
    module = p.skeleton.merge(arrays)
    side = c.data.image_size // module.vae.config.downscale
    draw = jax.jit(lambda keys: module.draw(keys, (side, side, 4)))

    def draws_of(step, part):
        rows = np.arange(c.batch_size)[part]
        drawn = draw(image_keys(key, jnp.int32(step), jnp.asarray(rows)))
        t, eps, indices = (torch.from_numpy(np.array(x)) for x in drawn)
        return np.asarray(batches[step]["image"])[rows], (t.long(), eps, indices.long())

    step_fn = p.step(0)
    for batch in batches:
        state, _ = step_fn(state, frozen, batch)
    torch_train(model, c, draws_of)
    start, ours = {}, {}
    for part, table in (("vision", clip.vision_table(model.spec)), ("visual_proj", names.Table("visual_proj"))):
        ours |= {f"{part}/{k}": v for k, v in part_tensors(p, state["params"], part, table).items()}
        start |= {f"{part}/{k}": v for k, v in part_tensors(p, arrays, part, table).items()}
    theirs = model.parameters()
    assert set(theirs) == set(ours)
    for name, want in theirs.items():
        close(ours[name], want.detach(), 1e-4, name)
        # The bound means something only where training moved the tensor by much more.
        assert relative_error(start[name], want.detach()) > 1e-3, name


def test_selected_tokens_count():
    """The torch side assumes `random`; another selection in small.SPEC would make it compare something else."""
    assert condition.parse_select(small.SPEC.select)[0] == "random"
