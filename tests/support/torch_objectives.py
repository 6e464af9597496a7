"""What the objectives in plain PyTorch share: the original libraries' modules with our arrays, and their training."""

import math

import jax.numpy as jnp
import numpy as np
import small
import torch
from flax import nnx
from helpers import relative_error, within
from torch.nn.functional import interpolate
from torch_models import PREFIX, torch_tower
from transformers import get_cosine_schedule_with_warmup

from diva_jax.weights import names


def part_tensors(p, arrays, part: str, table) -> dict[str, torch.Tensor]:
    """Returns the arrays of one part, without adapters, under the names of its original library."""
    variables = {n: v for n, v in p.skeleton.variables.items() if n.startswith(f"{part}/") and "/lora/" not in n}
    state = {path[1:]: var.replace(np.asarray(arrays[name])) for name, (path, var) in variables.items()}
    return {k: torch.from_numpy(v.copy()) for k, v in names.to_torch(nnx.from_flat_state(state), table).items()}


def tower(p, arrays, part: str, spec) -> torch.nn.Module:
    model, tensors = torch_tower(spec), part_tensors(p, arrays, part, names.table("vision", spec))
    model.load_state_dict({k.removeprefix(PREFIX[spec.arch]): v for k, v in tensors.items()})
    return model


class Generator:
    """diffusers' frozen U-Net, VAE encoder and schedule, and the text condition."""

    def __init__(self, p, arrays):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        d = p.config.diffusion
        self.unet = UNet2DConditionModel(**d.unet.to_dict()).requires_grad_(False)
        self.unet.load_state_dict(part_tensors(p, arrays, "unet", names.UNET))
        vae = d.vae.to_dict() | {"up_block_types": ("UpDecoderBlock2D",) * len(d.vae.block_out_channels)}
        self.vae = AutoencoderKL(**vae).requires_grad_(False)
        missing = self.vae.load_state_dict(part_tensors(p, arrays, "vae", names.VAE), strict=False)
        assert all(k.startswith(("decoder.", "post_quant")) for k in missing.missing_keys)
        if "text_context" in arrays:
            self.text = torch.from_numpy(np.array(arrays["text_context"]))
        self.schedule = DDPMScheduler.from_config(d.scheduler.to_dict())

    def latents(self, view: torch.Tensor) -> torch.Tensor:
        return self.vae.config.scaling_factor * self.vae.encode(view).latent_dist.mean


def to_torch(x) -> torch.Tensor:
    """Returns an array as a tensor: images [..., H, W, C] channels first, whole numbers as int64."""
    x = torch.from_numpy(np.array(x))
    x = x.movedim(-1, -3) if x.ndim >= 4 else x
    return x if x.is_floating_point() or x.dtype == torch.bool else x.long()


def pixels(batch) -> torch.Tensor:
    return to_torch(batch["image"]).float() / 255


def column(values) -> torch.Tensor:
    return torch.tensor(values).view(1, -1, 1, 1)


def resized(x: torch.Tensor, spec) -> torch.Tensor:
    """Pixels for the tower of a Spec, at its resolution."""
    if x.shape[-1] != spec.image_size:
        x = interpolate(x, (spec.image_size,) * 2, mode="bicubic", antialias=True)
    return (x - column(spec.mean)) / column(spec.std)


def random_program(c):
    p = small.program(c)
    return p, small.random_arrays(p)


def compare_steps(p, arrays, parts, count, want_of, rtol, groups=None, after=lambda: None, bound=1e-3) -> list[float]:
    """Asserts that both train alike: the metrics of each step, then every trained tensor; returns the gradients' norms.

    `parts` are the trained ones, name -> (module, its table of names). `want_of(step, batch, key)` are the metrics in
    PyTorch, of which "minimised", else "loss", is minimised with the config's optimizer over `groups` of parameters,
    default all as one; those that are floats have a twentieth of the bound. `after` is called after each step.
    """

    def tensors_of(arrays):
        found = {part: part_tensors(p, arrays, part, table) for part, (_, table) in parts.items()}
        return {f"{part}/{k.removeprefix('visual.')}": v for part, of in found.items() for k, v in of.items()}

    trained = {f"{part}/{k}": a for part, (module, _) in parts.items() for k, a in module.named_parameters()}
    o, c = p.config.optim, p.config
    state = p.init_state({n: jnp.copy(arrays[n]) for n in p.trained})
    frozen, key, step, norms = {n: arrays[n] for n in p.abstract_frozen()}, np.asarray(state["key"]), p.step(0), []
    if o.name == "sgd":
        opt = torch.optim.SGD(groups or trained.values(), lr=o.lr, momentum=o.momentum)
    else:
        options = dict(lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
        opt = torch.optim.AdamW(groups or trained.values(), **options)
    schedule = get_cosine_schedule_with_warmup(opt, math.ceil(c.optim.warmup * c.steps), c.steps)
    for i in range(count):
        batch = small.batch(p, i)
        want = want_of(i, batch, key)
        opt.zero_grad()
        want.pop("minimised", want["loss"]).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), o.clip or math.inf)))
        opt.step()
        schedule.step()
        after()
        state, metrics = step(state, frozen, batch)
        for name, value in want.items():
            allowed = rtol * (0.05 if isinstance(value, float) else 1)
            value = value if isinstance(value, float) else value.detach()
            np.testing.assert_allclose(metrics[name], value, rtol=allowed, err_msg=f"{name}, step {i}")
        np.testing.assert_allclose(metrics["grad_norm"], norms[-1], rtol=2 * rtol, err_msg=f"step {i}")
    start, ours = tensors_of(arrays), tensors_of(state["params"])
    assert set(ours) == set(trained)
    for name, want in trained.items():
        before, got, want = (np.asarray(x, np.float64) for x in (start[name], ours[name], want.detach()))
        assert relative_error(before, want) > 5e-4, f"{name} was not trained"
        # Relative to the update, and not to the tensor, most of which training leaves as it was.
        within(relative_error(got - before, want - before), bound, name)
    return norms
