"""Optimizer steps of the judge, and its first gradient, against the same written in plain PyTorch, text by text."""

import jax
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from eval_models import torch_model
from helpers import within
from torch_objectives import (
    Generator,
    begin,
    check_trained,
    column,
    cosine_schedule,
    part_tensors,
    random_program,
    to_torch,
)

from diva_jax.models import backbones
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, diffusers

STEPS = 10


class TorchJudge:
    """The loss from open_clip's, diffusers' and transformers' own modules, one image, text and draw at a time."""

    def __init__(self, p, arrays):
        from transformers import CLIPTextConfig, CLIPTextModel

        self.c, self.spec, self.generator = p.config, backbones.spec_of(p.config), Generator(p, arrays)
        self.start = part_tensors(p, arrays, "vision", clip.vision_table(self.spec))
        self.model = torch_model(self.spec)
        texts = part_tensors(p, arrays, "text", clip.text_table(self.spec))
        self.model.load_state_dict({**self.start, **texts}, strict=False)
        self.trained = {f"visual.{n}": a for n, a in self.model.visual.named_parameters()}
        self.encoder = CLIPTextModel(CLIPTextConfig(**p.config.diffusion.text_encoder.to_dict())).eval()
        tensors = part_tensors(p, arrays, "text_encoder", diffusers.TEXT_ENCODER)
        missing = self.encoder.load_state_dict(tensors, strict=False)
        assert not missing.unexpected_keys and all("position_ids" in k for k in missing.missing_keys)
        abar, o = self.generator.abar.double(), p.config.judge
        slope = np.abs(np.gradient(np.log((abar / (1 - abar)).numpy()))) * 0.5 * 12 * 12 * 4 * 700 / o.draws
        v = p.config.diffusion.scheduler.prediction_type == "v_prediction"
        self.v, self.slope = v, (slope * abar.numpy() if v else slope)

    def error(self, z, ids, timesteps, noise):
        """Of one image, z [1, c, h, w], under one text; timesteps [N], noise [N, c, h, w]."""
        context, total = self.encoder(ids[None])[0], 0.0
        for t, eps in zip(timesteps, noise, strict=True):
            a = self.generator.abar[t]
            goal = a.sqrt() * eps - (1 - a).sqrt() * z[0] if self.v else eps
            noisy = a.sqrt() * z + (1 - a).sqrt() * eps
            wrong = F.mse_loss(self.generator.unet(noisy, t, context).sample[0], goal)
            total += wrong * (self.slope[t] if self.c.judge.timestep_weight == "nats" else 1.0)
        return total

    def judged(self, pixels, conditions, texts, drawn):
        """(numbers of the texts, their posterior, the weight) of one image."""
        there = [k for k in range(len(texts) - 1) if texts[k, 0] >= 0 and conditions[k, 0] >= 0]
        if len(there) < 2:
            return [], None, 0.0
        z = self.generator.latents(2 * pixels[None] - 1)
        errors = torch.stack([self.error(z, conditions[k], *drawn) for k in [*there, -1]])
        errors, neutral = self.c.judge.beta * errors[:-1], self.c.judge.beta * errors[-1]
        weight = 1.0 if self.c.judge.neutral == "none" else float(1 / (1 + torch.exp(errors.min() - neutral)))
        shares = torch.exp(errors.min() - errors)
        return there, shares / shares.sum(), weight

    def loss(self, batch, timesteps, noise):
        x, o, s = to_torch(batch["image"]).float() / 255, self.c.judge, self.spec
        view = F.interpolate(x, (s.image_size,) * 2, mode="bicubic", align_corners=False, antialias=True)
        images = F.normalize(self.model.visual((view - column(s.mean)) / column(s.std)), dim=-1)
        texts, conditions = (torch.from_numpy(np.array(batch[k])).long() for k in ("texts", "conditions"))
        total, weights = 0.0, []
        for b in range(len(x)):
            with torch.no_grad():
                drawn = timesteps[:, b], noise[:, b]
                there, q, weight = self.judged(x[b], conditions[b], texts[b], drawn)
                weights.append(weight)
                if not there:
                    continue
                shown = [k for k in range(texts.shape[1] - 1) if texts[b, k, 0] >= 0]
                u = F.normalize(self.model.encode_text(texts[b, shown]), dim=-1)
            p = (o.logit_scale * u @ images[b]).log_softmax(0)
            for k, share in zip(there, q, strict=True):
                row = shown.index(k)
                own = (o.logit_scale * images @ u[row]).log_softmax(0)[b] if o.image_weight else 0.0
                total = total - weight * share * (p[row] + o.image_weight * own) / len(x)
        return total, np.mean(weights)


OPTIONS = {
    "equal": dict(judge__beta=20.0, judge__neutral="auto"),
    "nats": dict(
        judge__timestep_weight="nats",
        judge__beta=0.01,
        judge__image_weight=0.4,
        judge__neutral="none",
        judge__draws=1,
        diffusion__scheduler__prediction_type="v_prediction",
    ),
}


@pytest.mark.parametrize("kind, steps", [("equal", STEPS), ("nats", 3)])
def test_steps(kind, steps):
    options = OPTIONS[kind]
    c = small.judge_config(
        batch_size=6, steps=12, optim__warmup=0.15, optim__eps=1e-2, judge__logit_scale=9.0, **options
    )
    p, arrays = random_program(c)
    model, (state, frozen, key), step = TorchJudge(p, arrays), begin(p, arrays), p.step(0)
    trained = {n: arrays[n] for n in p.trained}
    grad = jax.jit(jax.grad(lambda a, b, k: p.skeleton.merge(a, frozen).loss(b, k)[0]))
    draw = jax.jit(lambda keys: p.skeleton.merge(arrays).draw(keys, (12, 12, 4)))
    opt = torch.optim.AdamW(
        model.trained.values(), lr=c.optim.lr, betas=(c.optim.b1, c.optim.b2), eps=1e-2, weight_decay=0
    )
    schedule = cosine_schedule(opt, c)
    for i in range(steps):
        batch = small.batch(p, i)
        keys = image_keys(key, np.int32(i), batch["row"])
        drawn = draw(keys)
        noise = torch.from_numpy(np.array(drawn.noise)).permute(0, 1, 4, 2, 3)
        loss, weight = model.loss(batch, torch.from_numpy(np.array(drawn.timesteps)).long(), noise)
        opt.zero_grad()
        loss.backward()
        if i == 0 and kind == "equal":
            ours = part_tensors(p, grad(trained, batch, keys), "vision", clip.vision_table(model.spec))
            for name, a in model.trained.items():
                scale = max(float(a.grad.norm()), 1e-3 * loss.item())
                within(float((ours[name] - a.grad).norm()) / scale, 3e-4, name)
        norm = float(torch.nn.utils.clip_grad_norm_(model.trained.values(), c.optim.clip))
        opt.step()
        schedule.step()
        state, metrics = step(state, frozen, batch)
        for name, value in {"loss": loss.item(), "weight": weight, "grad_norm": norm}.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, err_msg=f"{name}, step {i}")
        assert ("loss_image" in metrics) == bool(c.judge.image_weight)
    ours = part_tensors(p, state["params"], "vision", clip.vision_table(model.spec))
    check_trained(model.start, ours, model.trained, 3e-3)
