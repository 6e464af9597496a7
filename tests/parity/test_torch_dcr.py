"""Ten optimizer steps of DCR, four of the projector and six of the adapters, against the same in plain PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import small
import torch
from flax import nnx
from helpers import close, relative_error

from diva_jax import config
from diva_jax.data import preprocess
from diva_jax.models import backbones
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, diffusers, names

FIRST, SECOND = 4, 6
GROUP, BATCH = 3, 6
SPEC = dataclasses.replace(small.SPEC, image_size=28)
# Our layer -> open_clip's weight.
LAYERS = {
    "attn/qkv": "attn.in_proj_weight",
    "attn/proj": "attn.out_proj.weight",
    "mlp/fc1": "mlp.c_fc.weight",
    "mlp/fc2": "mlp.c_proj.weight",
}


PROJECTOR = names.Table("projector", (("^norm.", "0."), ("^fc1.", "1."), ("^fc2.", "3.")))


def part_tensors(p, arrays, part: str, table) -> dict[str, torch.Tensor]:
    """One part's arrays, adapters left out, under its original library's names."""
    state = {
        path[1:]: var.replace(np.array(arrays[name]))
        for name, (path, var) in p.skeleton.variables.items()
        if name.startswith(f"{part}/") and "/lora/" not in name
    }
    return {k: torch.from_numpy(v.copy()) for k, v in names.to_torch(nnx.from_flat_state(state), table).items()}


def leaf(array) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.array(array)))


class TorchDcr:
    """The objective in PyTorch, from open_clip's and diffusers' own modules; dropout 0."""

    def __init__(self, p, arrays):
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from open_clip.transformer import QuickGELU, VisionTransformer

        s, d = SPEC, p.config.diffusion
        sizes = (s.image_size, s.patch_size, s.width, s.layers, s.heads, s.mlp_dim / s.width)
        self.vision = VisionTransformer(*sizes, output_dim=s.embed_dim, act_layer=QuickGELU)
        tensors = part_tensors(p, arrays, "vision", clip.vision_table(s))
        self.vision.load_state_dict({k.removeprefix("visual."): v for k, v in tensors.items()})
        self.scale = p.config.dcr.lora.alpha / p.config.dcr.lora.rank
        self.lora = {n: leaf(a) for n, a in arrays.items() if "/lora/" in n}
        cross = d.unet.cross_attention_dim
        norm, one, two = (
            torch.nn.LayerNorm(s.embed_dim),
            torch.nn.Linear(s.embed_dim, cross),
            torch.nn.Linear(cross, cross),
        )
        self.projector = torch.nn.Sequential(norm, one, torch.nn.GELU(), two)
        self.projector.load_state_dict(part_tensors(p, arrays, "projector", PROJECTOR))
        self.unet = UNet2DConditionModel(**d.unet.to_dict()).requires_grad_(False)
        self.unet.load_state_dict(part_tensors(p, arrays, "unet", diffusers.UNET))
        vae = d.vae.to_dict() | {"up_block_types": ("UpDecoderBlock2D",) * len(d.vae.block_out_channels)}
        self.vae = AutoencoderKL(**vae).requires_grad_(False)
        self.vae.load_state_dict(part_tensors(p, arrays, "vae", diffusers.VAE), strict=False)
        self.text = torch.from_numpy(np.array(arrays["text_context"]))
        betas = torch.linspace(d.scheduler.beta_start**0.5, d.scheduler.beta_end**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = torch.cumprod(1 - betas, 0).float()

    def biases(self) -> dict:
        """Those of adapted layers, by open_clip's name."""
        adapted = ("in_proj_bias", "out_proj.bias", "c_fc.bias", "c_proj.bias")
        return {k: v for k, v in self.vision.named_parameters() if k.endswith(adapted)}

    def weights(self) -> dict:
        """W + (alpha / rank) B A of every adapted layer, differentiable."""

        def update(path):
            a, b = self.lora[f"vision/{path}/lora/a"], self.lora[f"vision/{path}/lora/b"]
            return self.scale * torch.cat([(x @ y).T for x, y in zip(a, b, strict=True)])

        found = {f"transformer.resblocks.{i}.{theirs}": update(f"blocks/{i}/{ours}")
                 for i in range(SPEC.layers) for ours, theirs in LAYERS.items()}  # fmt: skip
        found["proj"] = update("proj").T
        own = dict(self.vision.named_parameters())
        return {k: own[k] + v for k, v in found.items()}

    def loss(self, pixels, views, drawn) -> torch.Tensor:
        t, noise, posterior = drawn
        weights = self.weights()
        p, plus = (self.projector(torch.func.functional_call(self.vision, weights, (v,))) for v in views)
        dist = self.vae.encode(2 * pixels - 1).latent_dist
        z0 = self.vae.config.scaling_factor * (dist.mean + dist.std * posterior)
        a = self.abar[t].view(-1, 1, 1, 1)
        noisy, total = a.sqrt() * z0 + (1 - a).sqrt() * noise, 0.0

        def unit(x):
            return torch.nn.functional.normalize(x.flatten(1), dim=1)

        for i in range(len(t)):
            group = range(i // GROUP * GROUP, i // GROUP * GROUP + GROUP)
            conditions = torch.stack([*(p[j] for j in group), plus[i]])[:, None] + self.text
            n = len(conditions)
            pred = unit(self.unet(noisy[i].expand(n, -1, -1, -1), t[i].expand(n), conditions).sample)
            k = i % GROUP
            s = torch.cat([pred, unit(noise[i : i + 1])]) @ pred[k] / 0.1  # Exact: the target is the noise.
            z = torch.logsumexp(torch.cat([s[:k], s[k + 1 :]]), 0)
            total = total + z - (s[GROUP] + s[GROUP + 1]) / 2
        return total / len(t)


def test_ten_steps_in_two_stages():
    c = config.default(SPEC, small.diffusion(), "dcr")
    c.update(dtype="float32", frozen_dtype="float32", steps=SECOND, batch_size=BATCH)
    c.diffusion.text_tokens = 6
    c.condition.update(warmup_steps=FIRST, warmup_lr=1e-2)
    # As AdamW divides by the gradient's own size, a tiny gradient's rounding would show through 1e-8.
    c.optim.update(lr=1e-2, eps=1e-3, clip=0.5, weight_decay=0.1)
    c.dcr.update(group=GROUP, tile=GROUP + 1)
    c.dcr.lora.update(rank=3, alpha=3.0, dropout=0.0)
    p = small.program(c)
    arrays = {n: 0.3 * a if "/lora/" in n else a for n, a in small.random_arrays(p).items()}
    model = TorchDcr(p, arrays)
    state = p.init_state({n: jnp.copy(arrays[n]) for n in p.trained})
    frozen, key = {n: arrays[n] for n in p.abstract_frozen()}, np.asarray(state["key"])
    module, batches = p.skeleton.merge(arrays), [small.batch(p, i) for i in range(FIRST + SECOND)]

    @jax.jit
    def drawn_views(image, keys):
        drawn, pixels = module.draw(keys, (14, 14, 4)), preprocess.to_float(image)
        return drawn[:3], pixels, module.views(pixels, drawn.jitter)

    def channels_first(x):
        x = torch.from_numpy(np.array(x))
        return x.permute(0, 3, 1, 2) if x.ndim == 4 else x.long()

    inputs = [drawn_views(b["image"], image_keys(key, jnp.int32(i), jnp.arange(BATCH))) for i, b in enumerate(batches)]
    norms = []
    for stage, steps in ((0, range(FIRST)), (1, range(FIRST, FIRST + SECOND))):
        state["opt"] = p.init_opt(stage, state["params"])
        step = p.step(stage)
        trained = list(model.projector.parameters()) if stage == 0 else [*model.lora.values(), *model.biases().values()]
        o = c.optim
        opt = torch.optim.AdamW(trained, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
        for i in steps:
            state, metrics = step(state, frozen, batches[i])
            drawn, pixels, views = jax.tree.map(channels_first, inputs[i])
            model.vision.zero_grad()
            opt.zero_grad()
            loss = model.loss(pixels, views, drawn)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, o.clip)))
            opt.step()
            np.testing.assert_allclose(metrics["loss"], float(loss.detach()), rtol=1e-4, err_msg=f"step {i}")
            np.testing.assert_allclose(metrics["grad_norm"], norms[-1], rtol=1e-3, err_msg=f"step {i}")
    assert max(norms) > c.optim.clip, "the clip never worked: the test would not see it missing"
    ours = jax.device_get(state["params"])
    for name, want in model.lora.items():
        close(ours[name], want.detach(), 1e-4, name)
        assert relative_error(arrays[name], want.detach()) > 1e-3, name  # Training moved it by much more.
    for name, value in part_tensors(p, ours, "projector", PROJECTOR).items():
        close(value, model.projector.state_dict()[name], 1e-4, name)
    tower = part_tensors(p, arrays | ours, "vision", clip.vision_table(SPEC))
    for name, want in model.biases().items():
        close(tower[f"visual.{name}"], want.detach(), 1e-4, name)
    assert backbones.spec_of(c) == SPEC and module.options.target == "exact"
