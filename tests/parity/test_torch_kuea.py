"""Ten optimizer steps of KUEA against the same in plain PyTorch, with open_clip's tower and timm's teacher."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from specs import DINOV2_REG
from torch_objectives import begin, check_trained, column, part_tensors, random_program
from torch_towers import torch_tower

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.weights import clip

STEPS, BATCH, CROP = 10, 7, 24
CLEAN, KERNEL = 0.8, 40.0  # The published 1 and 0.5 would leave the tower to the first term alone, at this size.
TEACHER = dataclasses.replace(DINOV2_REG, image_size=18)


def settings_of(mode: str):
    c = config.default(small.SPEC, objective="kuea")
    c.update(batch_size=BATCH, steps=STEPS + 3)
    # As AdamW divides by the gradient's own size, a tiny gradient's rounding would show through 1e-8.
    c.optim.update(lr=2e-3, warmup=0.3, weight_decay=0.1, eps=1e-3)
    c.kuea.teacher.update(dataclasses.asdict(TEACHER))
    c.kuea.update(teacher_crop_from=CROP, gamma=0.03, c=0.19, clean_weight=CLEAN, kernel_weight=KERNEL)
    return config.faithful(c) if mode == "faithful" else c


def tower_tensors(p, arrays, part: str, spec) -> dict[str, torch.Tensor]:
    """The arrays of one part under the names of its original library."""
    tensors = part_tensors(p, arrays, part, clip.vision_table(spec))
    return {k.removeprefix("visual."): v for k, v in tensors.items()}


def torch_polynomial(x, gamma, c):
    k = (gamma * (x @ x.T) + c) ** 3
    return k / torch.sqrt(torch.outer(k.diagonal(), k.diagonal()))


class TorchKuea:
    """The objective, the schedule and the optimizer in PyTorch."""

    def __init__(self, p, arrays, mode: str):
        self.config, self.faithful, spec = p.config, mode == "faithful", p.objective.spec
        self.vision, self.original, self.teacher = torch_tower(spec), torch_tower(spec), torch_tower(TEACHER)
        for part, tower, of in (("vision", self.vision, spec), ("original", self.original, spec),
                                ("teacher", self.teacher, TEACHER)):  # fmt: skip
            tower.load_state_dict(tower_tensors(p, arrays, part, of))
            tower.requires_grad_(part == "vision")
        self.kernel = torch.tensor([0.03, 0.19], requires_grad=not self.faithful)
        o = self.config.optim
        groups = [{"params": list(self.vision.parameters()), "weight_decay": o.weight_decay}]
        if not self.faithful:
            groups.append({"params": [self.kernel], "weight_decay": 0.0})
        self.opt = torch.optim.AdamW(groups, lr=o.lr, betas=(o.b1, o.b2), eps=o.eps)

    def loss(self, batch):
        def scaled(image):
            return torch.from_numpy(np.array(image)).float().permute(0, 3, 1, 2) / 255

        def normalised(x, spec):
            return (x - column(spec.mean)) / column(spec.std)

        x, spec = scaled(batch["image"]), small.SPEC
        view = normalised(x, spec)
        if self.faithful:  # The teacher sees the tower's pixels, resized, with the tower's own mean and std.
            size = (TEACHER.image_size,) * 2
            seen = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
            seen = normalised(seen, spec)
        else:
            seen = normalised(scaled(batch["teacher"]), TEACHER)
        with torch.no_grad():
            f0, g = self.original(view), self.teacher(seen)
        f = self.vision(view)
        ours = torch_polynomial(f, *self.kernel)
        theirs = torch_polynomial(g, 1 / g.shape[1], 1.0)
        clean, kernel = (f - f0).square().sum(1).mean(), (ours - theirs).square().mean()
        return CLEAN * clean + KERNEL * kernel, clean, kernel

    def rate(self, step: int) -> float:
        o, steps = self.config.optim, self.config.steps
        warm = math.ceil(o.warmup * steps)
        if self.faithful and step == 0:
            return o.lr
        if step < warm:
            return o.lr * (step + 1) / warm
        return o.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))

    def step(self, number: int, batch) -> list[float]:
        for group in self.opt.param_groups:
            group["lr"] = self.rate(number)
        self.opt.zero_grad()
        values = self.loss(batch)
        values[0].backward()
        self.opt.step()
        return [v.item() for v in values]


@pytest.mark.parametrize("mode", ["exact", "faithful"])
def test_ten_steps(mode):
    p, arrays = random_program(settings_of(mode))
    arrays |= {n: jnp.asarray([0.03, 0.19]) for n in arrays if n == "kernel_params"}
    assert ("kernel_params" in p.trained) == (mode == "exact") and backbones.spec_of(p.config) == small.SPEC
    # The tower begins beside the original, where the gradient of the first term is not zero.
    beside = {n: arrays[n.replace("original/", "vision/")] for n in arrays if n.startswith("original/")}
    arrays |= {n: 0.9 * a + 0.1 * arrays[n] for n, a in beside.items()}
    model = TorchKuea(p, arrays, mode)
    state, frozen, _ = begin(p, arrays)
    step, rng = p.step(0), np.random.default_rng(6)
    for i in range(STEPS):
        made = {n: rng.integers(0, 256, a.shape).astype(a.dtype) for n, a in p.abstract_batch().items()}
        batch = made | {"row": np.arange(BATCH, dtype=np.int32)}
        want = model.step(i, batch)
        state, metrics = step(state, frozen, jax.device_put(batch, p.batch_sharding))
        got = [float(metrics[k]) for k in ("loss", "loss_clean", "loss_kernel")]
        # Both terms, relative to their sum; the kernel's has a weight of 40.
        scale = np.array([1, CLEAN, KERNEL])
        np.testing.assert_allclose(scale * got, scale * want, rtol=0, atol=6e-5 * want[0], err_msg=f"step {i}")
        np.testing.assert_allclose(metrics["lr"], model.rate(i), rtol=1e-5)
        assert min(CLEAN * want[1], KERNEL * want[2]) > 0.05 * want[0], "one term alone would be tested"
    ours, start = (tower_tensors(p, a, "vision", small.SPEC) for a in (state["params"], arrays))
    theirs = dict(model.vision.named_parameters())
    if mode == "exact":
        start, ours = (x | {"kernel": a["kernel_params"]} for x, a in ((start, arrays), (ours, state["params"])))
        theirs["kernel"] = model.kernel
    check_trained(start, ours, theirs)
