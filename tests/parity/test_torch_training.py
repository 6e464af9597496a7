"""Ten optimizer steps of each objective against the same in plain PyTorch, with the libraries' towers."""

import copy
import functools

import jax
import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from helpers import within
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention
from torch_models import torch_features, torch_model, torch_tower
from torch_objectives import (
    Generator,
    column,
    compare_steps,
    part_tensors,
    pixels,
    random_program,
    resized,
    to_torch,
    tower as tower_of,
)
from transformers import CLIPTextConfig, CLIPTextModel

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
            noisy = self.generator.schedule.add_noise(latents, noise, t)
            out.append(F.mse_loss(self.generator.unet(noisy, t, self.visual_proj(features) + text).sample, noise))
        return out


@pytest.mark.parametrize("optimizer, mode", [("sgd", "faithful"), ("adamw", "exact")])
def test_ten_steps_of_diva(optimizer, mode):
    c = small.diva_config(batch_size=10, accum=5, steps=14, optim__name=optimizer, optim__warmup=0.15)
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

    parts = {"vision": (model.vision, names.table("vision", model.spec))}
    parts["visual_proj"] = (model.visual_proj, PROJECTION)
    trained = [a for module, _ in parts.values() for a in module.parameters()]
    groups = [{"params": [a for a in trained if a.ndim > 1]}]
    groups.append({"params": [a for a in trained if a.ndim == 1], "weight_decay": 0.0})
    norms = compare_steps(p, arrays, parts, STEPS, want_of, 1e-4, groups)
    assert sum(norm > c.optim.clip for norm in norms) >= 3, "the clip never worked: the test would not see it missing"


class TorchJudge:
    """The loss from open_clip's, diffusers' and transformers' own modules, one image at a time."""

    def __init__(self, p, arrays):
        self.c, self.spec, self.generator = p.config, backbones.spec_of(p.config), Generator(p, arrays)
        self.model = torch_model(self.spec)
        start = part_tensors(p, arrays, "vision", names.table("vision", self.spec))
        texts = part_tensors(p, arrays, "text", names.table("text", self.spec))
        self.model.load_state_dict({**start, **texts}, strict=False)
        self.encoder = CLIPTextModel(CLIPTextConfig(**p.config.diffusion.text_encoder.to_dict())).eval()
        tensors = part_tensors(p, arrays, "text_encoder", names.TEXT_ENCODER)
        missing = self.encoder.load_state_dict(tensors, strict=False)
        assert not missing.unexpected_keys and all("position_ids" in k for k in missing.missing_keys)
        abar, o = self.generator.schedule.alphas_cumprod.double(), p.config.judge
        slope = np.abs(np.gradient(np.log((abar / (1 - abar)).numpy()))) * 0.5 * 12 * 12 * 4 * 700 / o.draws
        self.v = p.config.diffusion.scheduler.prediction_type == "v_prediction"
        self.slope = slope * abar.numpy() if self.v else slope

    def error(self, z, ids, timesteps, noise):
        """Of one image, z [1, c, h, w], under one text; timesteps [N], noise [N, c, h, w]."""
        context, total, schedule = self.encoder(ids[None])[0], 0.0, self.generator.schedule
        for t, eps in zip(timesteps[:, None], noise[:, None], strict=True):
            goal = schedule.get_velocity(z, eps, t) if self.v else eps
            wrong = F.mse_loss(self.generator.unet(schedule.add_noise(z, eps, t), t, context).sample, goal)
            total += wrong * (self.slope[t[0]] if self.c.judge.timestep_weight == "nats" else 1.0)
        return total

    def loss(self, batch, timesteps, noise):
        x, o, total, weights = pixels(batch), self.c.judge, 0.0, []
        images = normalize(self.model.visual(resized(x, self.spec)), dim=-1)
        texts, conditions = to_torch(batch["texts"]), to_torch(batch["conditions"])
        for b in range(len(x)):
            shown = [k for k in range(texts.shape[1] - 1) if texts[b, k, 0] >= 0]
            there = [k for k in shown if conditions[b, k, 0] >= 0]
            if len(there) < 2:
                weights.append(0.0)
                continue
            with torch.no_grad():
                z = self.generator.latents(2 * x[b : b + 1] - 1)
                errors = [self.error(z, conditions[b, k], timesteps[:, b], noise[:, b]) for k in [*there, -1]]
                *errors, neutral = o.beta * torch.stack(errors)
                errors = torch.stack(errors)
                weights.append(1.0 if o.neutral == "none" else float((neutral - errors.min()).sigmoid()))
                u = normalize(self.model.encode_text(texts[b, shown]), dim=-1)
            logits = o.logit_scale * u @ images.T  # [texts, images]
            right = logits[:, b].log_softmax(0) + o.image_weight * logits.log_softmax(1)[:, b]
            total = total - weights[-1] * ((-errors).softmax(0) * right[[shown.index(k) for k in there]]).sum() / len(x)
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
            trained = dict(model.model.visual.named_parameters())
            theirs = torch.autograd.grad(loss, trained.values(), retain_graph=True)
            for name, want in zip(trained, theirs, strict=True):
                scale = max(float(want.norm()), 1e-3 * loss.item())
                within(float((ours[f"visual.{name}"] - want).norm()) / scale, 3e-4, name)
        return {"loss": loss, "weight": torch.tensor(weight)}

    parts = {"vision": (model.model.visual, names.table("vision", model.spec))}
    groups = [{"params": list(model.model.visual.parameters()), "weight_decay": 0}]
    compare_steps(p, arrays, parts, steps, want_of, 1e-4, groups, bound=3e-3)


B = 8
BLOCKS = backbones.architecture("vit").CHECKPOINT.text.rename[:6]  # Of the names within blocks.


def contrast(logits):
    """Symmetric InfoNCE."""
    right = torch.arange(len(logits))
    return cross_entropy(logits, right) + cross_entropy(logits.T, right)


def terms(x, untuned, texts, taught, c):
    """(contrast, anchor, relation) of embeddings [B, D]."""
    x, texts, untuned, taught = (normalize(a, dim=-1) for a in (x, texts, untuned, taught))
    q, p = ((e @ e.T / c.relation.temperature).log_softmax(-1) for e in (x, taught))
    relation = F.kl_div(q, p, reduction="batchmean", log_target=True)
    return contrast(x @ texts.T / c.contrast.temperature) / 2, ((x - untuned) ** 2).mean(), relation


def test_comclip():
    c = small.comclip_config(batch_size=B, steps=12, relation__weight=3.0)
    c.optim.update(lr=2e-3, warmup_steps=-1, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True)
    c.contrast.temperature, c.anchor.weight = 0.2, 40.0
    p, arrays = random_program(c)
    spec, teacher_spec = backbones.spec_of(c), backbones.spec_of(c, "teacher")
    model, visual = torch_model(spec), tower_of(p, arrays, "vision", spec)
    model.load_state_dict(part_tensors(p, arrays, "contrast", names.table("text", spec)), strict=False)
    untuned, teacher = tower_of(p, arrays, "anchor", spec), tower_of(p, arrays, "relation", teacher_spec)

    def want_of(step, batch, key):
        view = resized(pixels(batch), spec)
        with torch.no_grad():
            fixed = untuned(view), model.encode_text(to_torch(batch["caption"]))
            fixed = *fixed, teacher(resized(pixels(batch), teacher_spec))
        found = dict(zip(("contrast", "anchor", "relation"), terms(visual(view), *fixed, c), strict=True))
        return found | {"loss": found["contrast"] + 40 * found["anchor"] + 3 * found["relation"]}

    compare_steps(p, arrays, {"vision": (visual, names.table("vision", spec))}, STEPS, want_of, 5e-5)


TOTAL, SALM_BATCH, DECAY, PRESERVE, UNIFORM = 12, 6, 0.7, 2.0, 0.3
ADAPTER = names.Table("adapter", BLOCKS)


class Adapter(torch.nn.Module):
    def __init__(self, o, n_in, n_out, patches, sees):
        super().__init__()
        norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
        self.fc_in, self.fc_out = torch.nn.Linear(n_in, o.width), torch.nn.Linear(o.width, n_out)
        self.fc_seen = torch.nn.Linear(n_out, o.width) if sees else None
        self.mask_token = torch.nn.Parameter(torch.zeros(o.width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(patches, o.width))
        self.transformer, self.norm = torch.nn.Module(), norm(o.width)
        blocks = [ResidualAttentionBlock(o.width, o.heads, norm_layer=norm) for _ in range(o.layers)]
        self.transformer.resblocks = torch.nn.Sequential(*blocks)

    def forward(self, tokens, masked, seen=None):
        x, masked = self.fc_in(tokens), masked[..., None]
        if seen is None:
            x = torch.where(masked, self.mask_token, x)
        elif self.fc_seen is not None:
            x = x + torch.where(masked, self.mask_token, self.fc_seen(seen))
        return self.fc_out(self.norm(self.transformer.resblocks(x + self.pos_embed)))


def structure(x, taught):
    """As the paper has it: matrices of all pairs of patches."""

    def matrices(x):
        length = x.norm(dim=-1)
        apart = length[:, :, None] - length[:, None, :]
        spread = apart.flatten(1).std(dim=1, correction=0)
        return torch.cosine_similarity(x[:, :, None], x[:, None], dim=-1), apart / spread[:, None, None]

    return [((a - b) ** 2).mean() for a, b in zip(matrices(x), matrices(taught), strict=True)]


@pytest.mark.parametrize("teacher, visible", [("frozen", "added"), ("self", "none")])
def test_salm(teacher, visible):
    c = small.salm_config(batch_size=SALM_BATCH, steps=TOTAL, salm__adapter__visible=visible, ema__decay=DECAY)
    c.salm.update(teacher=teacher, layer=1, preserve_weight=PRESERVE, uniformity_weight=UNIFORM, mask=0.6)
    c.salm.curriculum = teacher == "frozen"
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2, decay_all=True, clip=1e9)
    p, arrays = random_program(c)
    spec, teacher_spec, frozen_teacher = backbones.spec_of(c), backbones.spec_of(c, "teacher"), teacher == "frozen"
    tower, untuned = tower_of(p, arrays, "vision", spec), tower_of(p, arrays, "original", spec)
    sizes = (spec.embed_dim, teacher_spec.embed_dim) if frozen_teacher else (spec.width, spec.width)
    adapter, average = Adapter(c.salm.adapter, *sizes, spec.patches, visible == "added"), copy.deepcopy(tower)
    adapter.load_state_dict(part_tensors(p, arrays, "adapter", ADAPTER))
    dino = tower_of(p, arrays, "teacher", teacher_spec) if frozen_teacher else torch_tower(teacher_spec)
    module = p.skeleton.merge(arrays)

    def want_of(i, batch, key):
        masked = to_torch(module.masked(image_keys(key, np.int32(i), batch["row"])))
        assert (masked.sum(1) == round(0.6 * spec.patches)).all()
        view = resized(pixels(batch), spec)
        tokens, pooled = torch_features(tower, view)
        with torch.no_grad():
            tokens0, pooled0 = torch_features(untuned, view)
            taught = torch_features(dino, resized(pixels(batch), teacher_spec))[0]
        uniformity = (-2 * torch.pdist(normalize(pooled, dim=-1)).square()).exp()
        f, f0 = (torch.cat([a[:, None], b], 1) for a, b in ((pooled, tokens), (pooled0, tokens0)))
        want = {"preserve": ((f - f0) ** 2).mean(), "uniformity": uniformity.mean().log()}
        beta = min(max((i / TOTAL - 0.25) / 0.5, 0), 1) if frozen_teacher else 1  # There it has no curriculum.
        gamma = 1 - 0.9 * beta
        loss = PRESERVE * want["preserve"] + UNIFORM * want["uniformity"]
        if frozen_teacher:
            want["reconstruction"] = ((adapter(tokens, masked, taught) - taught)[masked] ** 2).mean()
            loss = loss + beta * want["reconstruction"]
        else:
            first = [t.transformer.resblocks[0](t._embeds(view))[:, 1:] for t in (tower, average)]
            tokens, taught = adapter(first[0], masked), first[1].detach()
        want["cosines"], want["norms"] = structure(tokens, taught)
        return want | {"loss": loss + gamma * (want["cosines"] + want["norms"]), "gamma": gamma}

    @torch.no_grad()
    def move_average():
        for a, b in zip(average.parameters(), tower.parameters(), strict=True):
            a.lerp_(b, 1 - DECAY)

    parts = {"vision": (tower, names.table("vision", spec)), "adapter": (adapter, ADAPTER)}
    compare_steps(p, arrays, parts, STEPS, want_of, 1e-4, after=move_average)


ALIGN, SPARSITY, SCALE, MASK_RATE = 10.0, 2.0, 30.0, 3.0
MASK_NET = names.Table("mask network", (*BLOCKS, (r"^transformer\.resblocks\.0\.", "block.")))


class MaskNet(torch.nn.Module):
    def __init__(self, text, embed_dim):
        super().__init__()
        width, linear, self.heads = text.width, torch.nn.Linear, text.heads
        self.norm_in, self.norm = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.block = ResidualAttentionBlock(width, text.heads, text.mlp_dim / width, act_layer=QuickGELU)
        self.query = torch.nn.Parameter(torch.zeros(width))
        self.keys, self.values = linear(width, width, bias=False), linear(width, width)
        self.proj = linear(width, embed_dim)

    def forward(self, states):
        x = self.norm(self.block(self.norm_in(states)))
        parts = self.query.expand(len(x), 1, -1), self.keys(x), self.values(x)
        heads = [a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in parts]
        return self.proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(1))


def test_smartclip():
    c = small.smartclip_config(batch_size=B, steps=12, smartclip__logit_scale=SCALE)
    c.trainable = (("mask_net/.*", MASK_RATE), (".*", 1.0))
    # AdamW divides by the gradient's own size, so that the rounding of a gradient that is zero, such as that of the
    # bias of keys, is an update of any size where eps is not much larger.
    c.optim.update(lr=2e-3, warmup=0.15, weight_decay=0.5, eps=1e-2)
    p, arrays = random_program(c)
    spec = backbones.spec_of(c)
    model, mask_net, visual = torch_model(spec), MaskNet(spec.text, spec.embed_dim), tower_of(p, arrays, "vision", spec)
    del model.visual, model.logit_scale
    parts = {"vision": (visual, names.table("vision", spec)), "text": (model, names.table("text", spec))}
    parts["mask_net"] = mask_net, MASK_NET
    for part in ("text", "mask_net"):
        parts[part][0].load_state_dict(part_tensors(p, arrays, part, parts[part][1]))
    masks = []
    groups = [{"params": [*visual.parameters(), *model.parameters()]}]
    groups.append({"params": list(mask_net.parameters()), "lr": c.optim.lr * MASK_RATE, "weight_decay": 0.0})

    def want_of(step, batch, key):
        x, ids = visual(resized(pixels(batch), spec)), to_torch(batch["caption"])
        states = model.transformer(model.token_embedding(ids) + model.positional_embedding, attn_mask=model.attn_mask)
        y = model.ln_final(states)[torch.arange(len(ids)), ids.argmax(-1)] @ model.text_projection
        soft = mask_net(states.detach()).sigmoid()
        mask = soft + ((soft > 0.5).float() - soft).detach()
        masks.append(mask.detach().numpy())
        # Every image under every caption's mask, written out: [B, B, D].
        logits = SCALE * torch.cosine_similarity(mask[None] * x[:, None], y[None], dim=-1)
        return {"loss": ALIGN * contrast(logits) + SPARSITY * mask.mean(), "selected": float(mask.mean())}

    compare_steps(p, arrays, parts, STEPS, want_of, 2e-5, groups)
    assert 0.1 < np.mean(masks) < 0.9 and (masks[0][0] != masks[0][1]).any()
