"""What the objectives in plain PyTorch share: the original libraries' modules with our arrays, and optimizers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import small
import torch
from flax import nnx
from helpers import relative_error, within

from diva_jax.training.step import image_keys
from diva_jax.weights import clip, names

UPDATE_BOUND = 1e-3


def begin(p, arrays) -> tuple[dict, dict, np.ndarray]:
    """Returns a program's state, its frozen arrays, and the key of its draws; `arrays` stay as they are."""
    state = p.init_state({n: jnp.copy(arrays[n]) for n in p.trained})
    return state, {n: arrays[n] for n in p.abstract_frozen()}, np.asarray(state["key"])


def part_tensors(p, arrays, part: str, table) -> dict[str, torch.Tensor]:
    """Returns the arrays of one part, without adapters, under the names of its original library."""
    state = {
        path[1:]: var.replace(np.asarray(arrays[name]))
        for name, (path, var) in p.skeleton.variables.items()
        if name.startswith(f"{part}/") and "/lora/" not in name
    }
    return {k: torch.from_numpy(v.copy()) for k, v in names.to_torch(nnx.from_flat_state(state), table).items()}


def vision_tower(p, arrays, spec) -> torch.nn.Module:
    """Returns open_clip's tower of the part `vision`."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    sizes = (spec.image_size, spec.patch_size, spec.width, spec.layers, spec.heads, spec.mlp_dim / spec.width)
    tower = VisionTransformer(*sizes, output_dim=spec.embed_dim, act_layer=QuickGELU)
    tensors = part_tensors(p, arrays, "vision", clip.table("vision", spec))
    tower.load_state_dict({k.removeprefix("visual."): v for k, v in tensors.items()})
    return tower


class Generator:
    """diffusers' frozen U-Net and VAE encoder, the text condition, and the cumulative products of the schedule."""

    def __init__(self, p, arrays):
        from diffusers import AutoencoderKL, UNet2DConditionModel

        d = p.config.diffusion
        self.unet = UNet2DConditionModel(**d.unet.to_dict()).requires_grad_(False)
        self.unet.load_state_dict(part_tensors(p, arrays, "unet", names.UNET))
        vae = d.vae.to_dict() | {"up_block_types": ("UpDecoderBlock2D",) * len(d.vae.block_out_channels)}
        self.vae = AutoencoderKL(**vae).requires_grad_(False)
        missing = self.vae.load_state_dict(part_tensors(p, arrays, "vae", names.VAE), strict=False)
        assert all(k.startswith(("decoder.", "post_quant")) for k in missing.missing_keys)
        if "text_context" in arrays:
            self.text = torch.from_numpy(np.array(arrays["text_context"]))
        betas = torch.linspace(d.scheduler.beta_start**0.5, d.scheduler.beta_end**0.5, 1000, dtype=torch.float64) ** 2
        self.abar = torch.cumprod(1 - betas, 0).float()

    def latents(self, view: torch.Tensor, noise: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Returns scaled latents: the posterior's mean, and `noise` times its deviation."""
        posterior = self.vae.encode(view).latent_dist
        return self.vae.config.scaling_factor * (posterior.mean + posterior.std * noise)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = self.abar[t].view(-1, 1, 1, 1)
        return a.sqrt() * latents + (1 - a).sqrt() * noise


def to_torch(tree):
    """Returns arrays as tensors: images channels first, whole numbers as int64."""

    def tensor(x):
        x = torch.from_numpy(np.array(x))
        x = x.permute(0, 3, 1, 2) if x.ndim == 4 else x
        return x if x.is_floating_point() or x.dtype == torch.bool else x.long()

    return jax.tree.map(tensor, tree)


def column(values) -> torch.Tensor:
    """Returns values of the channels in a shape to compute with images [B, C, H, W]."""
    return torch.tensor(values).view(1, -1, 1, 1)


def cosine_schedule(optimizer, c):
    """Returns the schedule of a config: linear warm-up from 0, then half a cosine."""
    warm = math.ceil(c.optim.warmup * c.steps)

    def factor(step):
        if step < warm:
            return step / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (c.steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def torch_train(params, c, steps: int, backward) -> int:
    """Trains parameters as a config says; `backward(step)` adds to their gradients. Returns how often it clipped."""
    params, o, clipped = list(params), c.optim, 0
    if o.name == "sgd":
        opt = torch.optim.SGD(params, lr=o.lr, momentum=o.momentum)
    else:
        groups = [
            {"params": [p for p in params if (p.ndim > 1) == decays], "weight_decay": decays * o.weight_decay}
            for decays in (True, False)
        ]
        opt = torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps)
    schedule = cosine_schedule(opt, c)
    for step in range(steps):
        opt.zero_grad()
        backward(step)
        clipped += float(torch.nn.utils.clip_grad_norm_(params, o.clip)) > o.clip
        opt.step()
        schedule.step()
    return clipped


def compare_steps(
    p, arrays, groups, count, batch_of, want_of, tensors_of, trained, rtol, after=lambda: None, bound=UPDATE_BOUND
) -> None:
    """Asserts that both train alike: the metrics of each step, then every trained tensor.

    `want_of(step, batch, key)` are the metrics in PyTorch, of which "loss" is minimised with AdamW over `groups` of
    parameters; those that are floats have a twentieth of the bound. `after` is called after each step.
    """
    o, (state, frozen, key), step = p.config.optim, begin(p, arrays), p.step(0)
    opt = torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
    schedule = cosine_schedule(opt, p.config)
    for i in range(count):
        batch = batch_of(i)
        want = want_of(i, batch, key)
        opt.zero_grad()
        want["loss"].backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), o.clip or math.inf)
        opt.step()
        schedule.step()
        after()
        state, metrics = step(state, frozen, jax.device_put(batch, p.batch_sharding))
        for name, value in want.items():
            allowed = rtol * (0.05 if isinstance(value, float) else 1)
            np.testing.assert_allclose(metrics[name], float(value), rtol=allowed, err_msg=f"{name}, step {i}")
        np.testing.assert_allclose(metrics["grad_norm"], float(norm), rtol=2 * rtol, err_msg=f"step {i}")
    check_trained(tensors_of(arrays), tensors_of(state["params"]), trained, bound)


def random_batch(rng, count: int, size: int, length: int = 0) -> dict[str, np.ndarray]:
    """A batch of random images, and with a `length` of captions that end with the highest id, 59, before it."""
    batch = {"image": rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8)}
    if length:
        ids, ends = rng.integers(1, 58, (count, length)).astype(np.int32), rng.integers(2, length, count)
        ids[np.arange(count), ends] = 59
        ids[np.arange(length) > ends[:, None]] = 0
        batch["caption"] = ids
    return batch | {"row": np.arange(count, dtype=np.int32)}


def drawn_by(run: small.Trained, arrays):
    """Returns (step, rows) -> the image of the batch and the draws of a run's step, as arrays."""
    p = run.program
    module, key = p.skeleton.merge(arrays), run.states[0]["key"]
    side = p.config.data.image_size // module.vae.config.downscale
    draw = jax.jit(lambda keys: module.draw(keys, (side, side, 4)))

    def of(step: int, rows=slice(None)):
        rows = jnp.arange(p.config.batch_size)[rows]
        return np.asarray(small.batch(p, step)["image"][rows]), draw(image_keys(key, jnp.int32(step), rows))

    return of


def random_program(c):
    """Returns (program, random arrays)."""
    p = small.program(c)
    return p, small.random_arrays(p)


def check_trained(start: dict, ours: dict, theirs: dict, bound: float = UPDATE_BOUND) -> None:
    """Asserts that both trained each tensor, by the same update.

    The error is relative to the update, and not to the tensor, most of which training leaves as it was.
    """
    assert set(ours) == set(theirs)
    for name, want in theirs.items():
        before, got, want = (np.asarray(x, np.float64) for x in (start[name], ours[name], want.detach()))
        assert relative_error(before, want) > 5e-4, f"{name} was not trained"
        within(relative_error(got - before, want - before), bound, name)
