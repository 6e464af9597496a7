"""Optimizer steps of DIVA and the judge against implementations in plain PyTorch."""

import functools

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
    check_trained,
    column,
    compare_steps,
    drawn_by,
    part_tensors,
    random_program,
    to_torch,
    torch_train,
    vision_tower,
)

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.training.step import image_keys
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
    for part, table in (("vision", clip.table("vision", model.spec)), ("visual_proj", PROJECTION)):
        ours |= {f"{part}/{k}": v for k, v in part_tensors(p, run.states[-1]["params"], part, table).items()}
        start |= {f"{part}/{k}": v for k, v in part_tensors(p, arrays, part, table).items()}
    check_trained(start, ours, model.parameters())


class TorchJudge:
    """The loss from open_clip's, diffusers' and transformers' own modules, one image, text and draw at a time."""

    def __init__(self, p, arrays):
        from transformers import CLIPTextConfig, CLIPTextModel

        self.c, self.spec, self.generator = p.config, backbones.spec_of(p.config), Generator(p, arrays)
        self.start = part_tensors(p, arrays, "vision", clip.table("vision", self.spec))
        self.model = torch_model(self.spec)
        texts = part_tensors(p, arrays, "text", clip.table("text", self.spec))
        self.model.load_state_dict({**self.start, **texts}, strict=False)
        self.trained = {f"visual.{n}": a for n, a in self.model.visual.named_parameters()}
        self.encoder = CLIPTextModel(CLIPTextConfig(**p.config.diffusion.text_encoder.to_dict())).eval()
        tensors = part_tensors(p, arrays, "text_encoder", names.TEXT_ENCODER)
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


@pytest.mark.parametrize("kind, steps", [("equal", 6), ("nats", 3)])
def test_steps(kind, steps):
    options = OPTIONS[kind]
    c = small.judge_config(
        batch_size=6, steps=12, optim__warmup=0.15, optim__eps=1e-2, judge__logit_scale=9.0, **options
    )
    p, arrays = random_program(c)
    model, frozen = TorchJudge(p, arrays), {n: arrays[n] for n in p.abstract_frozen()}
    first = jax.jit(jax.grad(lambda a, b, k: p.skeleton.merge(a, frozen).loss(b, k)[0]))
    draw = jax.jit(lambda keys: p.skeleton.merge(arrays).draw(keys, (12, 12, 4)))
    vision = functools.partial(part_tensors, p, part="vision", table=clip.table("vision", model.spec))

    def want_of(i, batch, key):
        keys = image_keys(key, np.int32(i), batch["row"])
        drawn = draw(keys)
        noise = torch.from_numpy(np.array(drawn.noise)).permute(0, 1, 4, 2, 3)
        loss, weight = model.loss(batch, torch.from_numpy(np.array(drawn.timesteps)).long(), noise)
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
