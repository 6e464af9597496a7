"""Golden files of KUEA: the authors' code on one batch of six images for six AdamW steps, over tiny random towers.

A file holds the pixels, the student's, the original's and the teacher's weights, the results of the first step and the
losses of all six. Every switch is faithful.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from reading import differentiate, gradients, take

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.training import partition
from diva_jax.training.step import Program, learning_rate, pace
from diva_jax.weights import names
from diva_jax.weights.formats import Tensors

PREFIX = "kuea"
# What the arrays do not tell: the recipe of the recorded runs, and the towers' heads.
HEADS = 4
OPTIM = dict(name="adamw", lr=3e-5, weight_decay=1e-4, decay_all=True, warmup=0.5, clip=0.0)
GIVEN = ("w", "w0", "teacher", "pixels", "gamma_coef0")


def settings(z, **switches: str):
    """The config of a recorded run; `switches` are exact where they say so, all others faithful."""

    def spec(prefix: str, arch: str, like: backbones.Spec, pixels: str) -> backbones.Spec:
        found = backbones.architecture(arch).shapes(take(z, prefix, "visual."))
        fixed = dict(arch=arch, heads=HEADS, image_size=z[pixels].shape[1], source="unused")
        return dataclasses.replace(like, **found | fixed)

    c = config.faithful(config.default(spec("w/", "vit", backbones.Spec(), "pixels"), objective="kuea"))
    c.batch_size, c.steps = len(z["pixels"]), len(z["trajectory/lr"])
    c.optim.update(OPTIM)
    c.kuea.gamma, c.kuea.c = map(float, z["gamma_coef0"])
    c.kuea.teacher.update(dataclasses.asdict(spec("teacher/", "dinov2", backbones.DINOV2_L, "teacher_input")))
    c.kuea.update(switches)
    return c


def program(z, **switches: str) -> tuple[Program, dict[str, jax.Array]]:
    p = Program(settings(z, **switches), Mesh(np.asarray([[jax.devices()[0]]]), ("data", "fsdp")))
    arrays = {}
    for part, prefix in (("vision", "w/"), ("original", "w0/"), ("teacher", "teacher/")):
        spec = p.objective.taught_by if part == "teacher" else p.objective.spec
        tensors = names.to_resolution(Tensors(take(z, prefix, "visual."), []), spec)
        state = names.assign(getattr(p.objective, part), tensors, names.table("vision", spec), source=prefix)
        arrays |= {f"{part}/{partition.name_of(k)}": v.get_value() for k, v in names.flat(state).items()}
    if "kernel_params" in p.arrays:
        arrays["kernel_params"] = jnp.asarray(z["gamma_coef0"])
    return p, arrays


def trajectory(z, **switches: str) -> dict[str, np.ndarray]:
    """Every step through the program that trains: lr, the losses before the update, gamma and c used and after it.
    Where gamma and c are constant, `gamma_coef0_leaf` is what AdamW makes of a copy that no forward pass reads, as
    it is in the authors' code.
    """
    p, arrays = program(z, **switches)
    trains = "kernel_params" in p.trained
    watcher, _ = program(z, kernel_params="exact")
    state = p.init_state({n: jnp.array(arrays[n]) for n in p.trained})
    frozen = {n: arrays[n] for n in p.abstract_frozen()}
    pixels, start = jnp.asarray(z["pixels"]), jnp.asarray(z["gamma_coef0"])
    images = np.round(z["pixels"] * 255).astype(np.uint8)
    assert np.array_equal(images.astype(np.float32) / np.float32(255), z["pixels"]), "no pixels of 8-bit images"
    batch = {"image": jnp.asarray(images), "row": jnp.arange(len(images), dtype=jnp.int32)}
    tx = optax.adamw(learning_rate(p.stages[0], pace(p.stages[0], p.config.optim.warmup)), weight_decay=0.0)
    opt, leaf, step = tx.init(start), start, p.step(0)

    def loss(params, vision):
        return watcher.skeleton.merge({**frozen, **vision, "kernel_params": params}).forward(pixels, pixels)[0]

    slope, rows = jax.jit(jax.grad(loss)), []
    for _ in range(p.config.steps):
        params = dict(state["params"])
        row = {"gamma_coef0_used": np.array(params["kernel_params"] if trains else start)}
        if not trains:
            row["gamma_coef0_leaf"] = np.array(leaf)
            updates, opt = tx.update(slope(start, params), opt, leaf)
            leaf = optax.apply_updates(leaf, updates)
        state, metrics = step(state, frozen, batch)
        row |= {"lr": metrics["lr"], "loss_total": metrics["loss"]}
        rows.append(row | {k: metrics[k] for k in ("loss_clean", "loss_kernel")})
    out = {f"trajectory/{k}": np.stack([np.asarray(r[k]) for r in rows]) for k in rows[0]}
    return out | ({"end": np.asarray(state["params"]["kernel_params"])} if trains else {})


def compute(z) -> dict[str, np.ndarray]:
    # With gamma and c as parameters, their gradients are there too; the forward pass is the same.
    p, arrays = program(z, kernel_params="exact")
    pixels = jnp.asarray(z["pixels"])

    def forward(of, module):
        value, seen = module.forward(pixels, pixels)
        seen = {**seen, "loss_total": value}
        return seen[of], seen

    out = {"teacher_input": p.skeleton.merge(arrays).teacher_view(pixels)}
    for key, of in (("grad", "loss_total"), ("grad_kernel", "loss_kernel")):
        (_, seen), tree = differentiate(p.skeleton, arrays, p.trained.__contains__, functools.partial(forward, of))
        tensors = gradients(p.skeleton, tree, "vision", names.table("vision", p.objective.spec))
        out |= {f"{key}/{n.removeprefix('visual.')}": a for n, a in tensors.items()}
        out[f"{key}/gamma_coef0"] = tree["kernel_params"]
    return {k: np.asarray(v) for k, v in (out | seen).items()} | trajectory(z)


def compare(path, z, sd):
    """Gradients are concatenated, because that of a key's bias is zero but for rounding."""

    def grouped(arrays) -> dict[str, np.ndarray]:
        groups = {}
        for key in sorted(arrays):
            whole = key.startswith(("grad/", "grad_kernel/")) and not key.endswith("gamma_coef0")
            groups.setdefault(key.split("/")[0] if whole else key, []).append(arrays[key])
        return {k: np.concatenate([np.ravel(a) for a in found]) for k, found in groups.items()}

    # A squared distance |f - f0|^2, with the rounding of f, has an error of the order of |f - f0| |f0|.
    length = np.mean(np.sum(np.square(z["f0"]), axis=-1))
    losses = [k for k in z.files if k.endswith(("loss_clean", "loss_total"))]
    scales = {k: np.sqrt(z[k.replace("total", "clean")] * length) for k in losses}
    return grouped({k: z[k] for k in z.files if k.split("/")[0] not in GIVEN}), grouped(compute(z)), scales
