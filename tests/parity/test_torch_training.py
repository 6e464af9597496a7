"""Optimizer steps of DIVA and the judge against implementations in plain PyTorch."""

import functools

import jax
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from helpers import within
from torch_models import torch_features, torch_model
from torch_objectives import Generator, column, compare_steps, part_tensors, pixels, random_program, resized, to_torch
from torch_objectives import tower as tower_of

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.training.step import image_keys
from diva_jax.weights import names

STEPS = 10
PROJECTION = names.Table("visual_proj")


class TorchDiva:
    """The objective in PyTorch, from open_clip's and diffusers' own modules."""

    def __init__(self, p, arrays):
        self.config, self.spec, self.generator = p.config, backbones.spec_of(p.config), Generator(p, arrays)
        assert self.spec.select.startswith("random:")
        self.vision = tower_of(p, arrays, "vision", self.spec)
        self.visual_proj = torch.nn.Linear(self.spec.embed_dim, p.config.diffusion.unet.cross_attention_dim)
        self.visual_proj.load_state_dict(part_tensors(p, arrays, "visual_proj", PROJECTION))

    def views(self, x):
        if self.config.diva.vae_view == "exact":
            return 2 * x - 1, resized(x, self.spec)
        z = (x - column(backbones.OPENAI_MEAN)) / column(backbones.OPENAI_STD)
        y = z * column(backbones.IMAGENET_STD) + column(backbones.IMAGENET_MEAN)
        return 2 * y - 1, F.interpolate(z, (self.spec.image_size,) * 2, mode="bilinear", align_corners=False)

    def losses(self, x, drawn) -> list[torch.Tensor]:
        """One loss per draw, for one micro-batch."""
        vae_view, view = self.views(x)
        latents, text = self.generator.latents(vae_view), self.generator.text.mean(1, keepdim=True)
        out = []
        for t, noise, indices in zip(*drawn, strict=True):
            tokens, pooled = torch_features(self.vision, view)
            picked = torch.gather(tokens, 1, indices[:, :, None].expand(-1, -1, tokens.shape[-1]))
            features = torch.cat([pooled[:, None], picked], 1)
            a = self.generator.abar[t].view(-1, 1, 1, 1)
            noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
            pred = self.generator.unet(noisy, t, self.visual_proj(features) + text).sample
            out.append(F.mse_loss(pred, noise))
        return out


@pytest.mark.parametrize("optimizer, mode", [("sgd", "faithful"), ("adamw", "exact")])
def test_ten_steps_of_diva(optimizer, mode):
    c = small.small_config(batch_size=10, accum=5, steps=14, optim__name=optimizer, optim__warmup=0.15)
    # As AdamW divides by the gradient's own size, a tiny gradient's rounding would show through an eps of 1e-8.
    c.optim.update(eps=1e-4, clip=0.1, lr=1e-2, weight_decay=0.1)
    if mode == "faithful":
        c.optim.update(clip=0.5, lr=0.2, weight_decay=0.0)
        config.faithful(c)
    p, arrays = random_program(c)
    model, module = TorchDiva(p, arrays), p.skeleton.merge(arrays)
    draw = jax.jit(lambda keys: module.draw(keys, (24 // module.vae.config.downscale,) * 2 + (4,)))

    def want_of(i, batch, key):
        def losses(rows):
            drawn = draw(image_keys(key, np.int32(i), np.arange(10, dtype=np.int32)[rows]))
            return model.losses(pixels(batch)[rows], map(to_torch, drawn))

        if mode == "exact":  # Equal weights: the mean over the whole batch, which no micro-batch may change.
            return {"loss": sum(losses(slice(None))) / 2}
        parts = [losses(slice(a, None, c.accum)) for a in range(c.accum)]
        # The authors' order: the first draw's backward pass, undivided, inside the forward pass.
        minimised = sum(first + last / c.accum for first, last in parts)
        return {"minimised": minimised, "loss": sum(map(sum, parts)).detach() / 2 / c.accum}

    def tensors_of(arrays):
        tables = {"vision": names.table("vision", model.spec), "visual_proj": PROJECTION}
        parts = {part: part_tensors(p, arrays, part, table) for part, table in tables.items()}
        return {f"{part}/{k}": v for part, tensors in parts.items() for k, v in tensors.items()}

    trained = {f"vision/visual.{k}": v for k, v in model.vision.named_parameters()}
    trained |= {f"visual_proj/{k}": v for k, v in model.visual_proj.named_parameters()}
    flat = {"params": [a for a in trained.values() if a.ndim == 1], "weight_decay": 0.0}
    groups = [{"params": [a for a in trained.values() if a.ndim > 1]}, flat]
    batch_of = functools.partial(small.batch, p)
    norms = compare_steps(p, arrays, groups, STEPS, batch_of, want_of, tensors_of, trained, 1e-4)
    assert sum(norm > c.optim.clip for norm in norms) >= 3, "the clip never worked: the test would not see it missing"


class TorchJudge:
    """The loss from open_clip's, diffusers' and transformers' own modules, one image, text and draw at a time."""

    def __init__(self, p, arrays):
        from transformers import CLIPTextConfig, CLIPTextModel

        self.c, self.spec, self.generator = p.config, backbones.spec_of(p.config), Generator(p, arrays)
        self.model = torch_model(self.spec)
        start = part_tensors(p, arrays, "vision", names.table("vision", self.spec))
        texts = part_tensors(p, arrays, "text", names.table("text", self.spec))
        self.model.load_state_dict({**start, **texts}, strict=False)
        self.trained = {f"visual.{n}": a for n, a in self.model.visual.named_parameters()}
        self.encoder = CLIPTextModel(CLIPTextConfig(**p.config.diffusion.text_encoder.to_dict())).eval()
        tensors = part_tensors(p, arrays, "text_encoder", names.TEXT_ENCODER)
        missing = self.encoder.load_state_dict(tensors, strict=False)
        assert not missing.unexpected_keys and all("position_ids" in k for k in missing.missing_keys)
        abar, o = self.generator.abar.double(), p.config.judge
        slope = np.abs(np.gradient(np.log((abar / (1 - abar)).numpy()))) * 0.5 * 12 * 12 * 4 * 700 / o.draws
        self.v = p.config.diffusion.scheduler.prediction_type == "v_prediction"
        self.slope = slope * abar.numpy() if self.v else slope

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

    def judged(self, x, conditions, texts, drawn):
        """(numbers of the texts, their posterior, the weight) of one image."""
        there = [k for k in range(len(texts) - 1) if texts[k, 0] >= 0 and conditions[k, 0] >= 0]
        if len(there) < 2:
            return [], None, 0.0
        z = self.generator.latents(2 * x[None] - 1)
        errors = torch.stack([self.error(z, conditions[k], *drawn) for k in [*there, -1]])
        errors, neutral = self.c.judge.beta * errors[:-1], self.c.judge.beta * errors[-1]
        weight = 1.0 if self.c.judge.neutral == "none" else float(1 / (1 + torch.exp(errors.min() - neutral)))
        shares = torch.exp(errors.min() - errors)
        return there, shares / shares.sum(), weight

    def loss(self, batch, timesteps, noise):
        x, o = pixels(batch), self.c.judge
        images = F.normalize(self.model.visual(resized(x, self.spec)), dim=-1)
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


NATS = dict(timestep_weight="nats", beta=0.01, image_weight=0.4, neutral="none", draws=1)
OPTIONS = {"equal": (6, dict(beta=20.0, neutral="auto"), "epsilon"), "nats": (3, NATS, "v_prediction")}


@pytest.mark.parametrize("kind", OPTIONS)
def test_steps_of_the_judge(kind):
    steps, options, prediction = OPTIONS[kind]
    c = small.judge_config(batch_size=6, steps=12, optim__warmup=0.15, optim__eps=1e-2, judge__logit_scale=9.0)
    c.judge.update(options)
    c.diffusion.scheduler.prediction_type = prediction
    p, arrays = random_program(c)
    model, frozen = TorchJudge(p, arrays), {n: arrays[n] for n in p.abstract_frozen()}
    first = jax.jit(jax.grad(lambda a, b, k: p.skeleton.merge(a, frozen).loss(b, k)[0]))
    draw = jax.jit(lambda keys: p.skeleton.merge(arrays).draw(keys, (12, 12, 4)))
    vision = functools.partial(part_tensors, p, part="vision", table=names.table("vision", model.spec))

    def want_of(i, batch, key):
        keys = image_keys(key, np.int32(i), batch["row"])
        drawn = draw(keys)
        loss, weight = model.loss(batch, to_torch(drawn.timesteps), to_torch(drawn.noise))
        if i == 0 and kind == "equal":
            ours = vision(arrays=first({n: arrays[n] for n in p.trained}, batch, keys))
            theirs = torch.autograd.grad(loss, model.trained.values(), retain_graph=True)
            for name, want in zip(model.trained, theirs, strict=True):
                scale = max(float(want.norm()), 1e-3 * loss.item())
                within(float((ours[name] - want).norm()) / scale, 3e-4, name)
        return {"loss": loss, "weight": torch.tensor(weight)}

    groups = [{"params": list(model.trained.values()), "weight_decay": 0}]
    batch_of = functools.partial(small.batch, p)
    compare_steps(p, arrays, groups, steps, batch_of, want_of, vision, model.trained, 1e-4, bound=3e-3)
