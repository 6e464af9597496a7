"""Ten optimizer steps of DCR, four of the projector and six of the adapters, against the same in plain PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import small
import torch
from torch_objectives import Generator, begin, check_trained, part_tensors, random_program, to_torch, vision_tower

from diva_jax.data import preprocess
from diva_jax.models import backbones
from diva_jax.training.step import image_keys
from diva_jax.weights import clip, names

FIRST, SECOND = 4, 6
GROUP, BATCH = 3, 6
SPEC = small.SPEC_28
# Our layer -> open_clip's weight.
LAYERS = {
    "attn/qkv": "attn.in_proj_weight",
    "attn/proj": "attn.out_proj.weight",
    "mlp/fc1": "mlp.c_fc.weight",
    "mlp/fc2": "mlp.c_proj.weight",
}


PROJECTOR = names.Table("projector", (("^norm.", "0."), ("^fc1.", "1."), ("^fc2.", "3.")))


def leaf(array) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.array(array)))


class TorchDcr:
    """The objective in PyTorch, from open_clip's and diffusers' own modules; dropout 0."""

    def __init__(self, p, arrays):
        s, cross, self.generator = SPEC, p.config.diffusion.unet.cross_attention_dim, Generator(p, arrays)
        self.vision = vision_tower(p, arrays, s)
        self.scale = p.config.dcr.lora.alpha / p.config.dcr.lora.rank
        self.lora = {n: leaf(a) for n, a in arrays.items() if "/lora/" in n}
        linear = torch.nn.Linear
        layers = (torch.nn.LayerNorm(s.embed_dim), linear(s.embed_dim, cross), torch.nn.GELU(), linear(cross, cross))
        self.projector = torch.nn.Sequential(*layers)
        self.projector.load_state_dict(part_tensors(p, arrays, "projector", PROJECTOR))

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
        noisy = self.generator.add_noise(self.generator.latents(2 * pixels - 1, posterior), noise, t)
        total = 0.0

        def unit(x):
            return torch.nn.functional.normalize(x.flatten(1), dim=1)

        for i in range(len(t)):
            group = range(i // GROUP * GROUP, i // GROUP * GROUP + GROUP)
            conditions = torch.stack([*(p[j] for j in group), plus[i]])[:, None] + self.generator.text
            n = len(conditions)
            pred = unit(self.generator.unet(noisy[i].expand(n, -1, -1, -1), t[i].expand(n), conditions).sample)
            k = i % GROUP
            s = torch.cat([pred, unit(noise[i : i + 1])]) @ pred[k] / 0.1  # Exact: the target is the noise.
            z = torch.logsumexp(torch.cat([s[:k], s[k + 1 :]]), 0)
            total = total + z - (s[GROUP] + s[GROUP + 1]) / 2
        return total / len(t)


def test_ten_steps_in_two_stages():
    c = small.dcr_config(
        steps=SECOND,
        batch_size=BATCH,
        condition__warmup_steps=FIRST,
        condition__warmup_lr=1e-2,
        # As AdamW divides by the gradient's own size, a tiny gradient's rounding would show through 1e-8.
        optim__eps=1e-3,
        optim__lr=1e-2,
        optim__clip=0.5,
        optim__weight_decay=0.1,
        dcr__group=GROUP,
        dcr__tile=GROUP + 1,
        dcr__lora__alpha=3.0,
        dcr__lora__dropout=0.0,
    )
    p, arrays = random_program(c)
    arrays = {n: 0.3 * a if "/lora/" in n else a for n, a in arrays.items()}
    model = TorchDcr(p, arrays)
    state, frozen, key = begin(p, arrays)
    module, batches = p.skeleton.merge(arrays), [small.batch(p, i) for i in range(FIRST + SECOND)]

    @jax.jit
    def drawn_views(image, keys):
        drawn, pixels = module.draw(keys, (14, 14, 4)), preprocess.to_float(image)
        return drawn[:3], pixels, module.views(pixels, drawn.jitter)

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
            drawn, pixels, views = to_torch(inputs[i])
            model.vision.zero_grad()
            opt.zero_grad()
            loss = model.loss(pixels, views, drawn)
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, o.clip)))
            opt.step()
            np.testing.assert_allclose(metrics["loss"], float(loss.detach()), rtol=1e-4, err_msg=f"step {i}")
            np.testing.assert_allclose(metrics["grad_norm"], norms[-1], rtol=1e-3, err_msg=f"step {i}")
    assert max(norms) > c.optim.clip, "the clip never worked: the test would not see it missing"
    ours, theirs = jax.device_get(state["params"]), model.lora | dict(model.projector.named_parameters())
    theirs |= {f"visual.{k}": v for k, v in model.biases().items()}

    def trained_tensors(arrays):
        tower = part_tensors(p, arrays, "vision", clip.vision_table(SPEC))
        found = arrays | tower | part_tensors(p, arrays, "projector", PROJECTOR)
        return {n: found[n] for n in theirs}

    check_trained(trained_tensors(arrays), trained_tensors(arrays | ours), theirs)
    assert backbones.spec_of(c) == SPEC and module.options.target == "exact"
