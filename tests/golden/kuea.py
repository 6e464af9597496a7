"""Golden files of KUEA: the authors' code on one batch of six images for six AdamW steps, over tiny random towers.

A file holds the pixels, the student's, the original's and the teacher's weights, the results of the first step and the
losses of all six. Every switch is faithful.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from reading import gradients, relative, same_names, take

from diva_jax import config
from diva_jax.models import backbones
from diva_jax.training import partition
from diva_jax.training.step import Program
from diva_jax.weights import clip, names
from diva_jax.weights.readers import Tensors

# Relative L2 error; gradients concatenated, because that of a key's bias is zero but for rounding.
BOUNDS = {
    "teacher_input": 2e-6,
    "f": 2e-6,
    "f0": 2e-6,
    "g": 2e-6,
    "k_clip": 2e-6,
    "k_dino": 2e-6,
    "loss_clean": 1e-5,
    "loss_kernel": 1e-5,
    "loss_total": 1e-5,
    "grad": 1e-5,
    "grad_kernel": 1e-5,
    "trajectory": 1e-5,
}
# What the arrays do not tell: the recipe of the recorded runs, and the towers' heads.
HEADS = 4
OPTIM = dict(name="adamw", lr=3e-5, weight_decay=1e-4, decay_all=True, warmup=0.5, clip=0.0)
INPUTS = ("pixels", "gamma_coef0")


def spec_of(tensors: dict[str, np.ndarray], arch: str, size: int, like: backbones.Spec) -> backbones.Spec:
    """The Spec of a tower at a resolution, from its tensors."""
    found = backbones.architecture(arch).shapes(tensors)
    return dataclasses.replace(like, **found | dict(arch=arch, heads=HEADS, image_size=size, source="unused"))


def settings(z, **switches: str):
    """The config of a recorded run; `switches` are exact where they say so, all others faithful."""
    teacher = spec_of(take(z, "teacher/", "visual."), "dinov2", z["teacher_input"].shape[1], backbones.DINOV2_L)
    student = spec_of(take(z, "w/", "visual."), "vit", z["pixels"].shape[1], backbones.Spec())
    c = config.faithful(config.default(student, objective="kuea"))
    c.batch_size, c.steps = len(z["pixels"]), len(z["trajectory/lr"])
    c.optim.update(OPTIM)
    c.kuea.gamma, c.kuea.c = map(float, z["gamma_coef0"])
    c.kuea.teacher.update(dataclasses.asdict(teacher))
    c.kuea.update(switches)
    return c


def program(z, **switches: str) -> tuple[Program, dict[str, jax.Array]]:
    """The program of `settings` on one device, and its arrays with the file's weights."""
    p = Program(settings(z, **switches), Mesh(np.asarray([[jax.devices()[0]]]), ("data", "fsdp")))
    arrays = {}
    for part, prefix in (("vision", "w/"), ("original", "w0/"), ("teacher", "teacher/")):
        spec = p.objective.taught_by if part == "teacher" else p.objective.spec
        tensors = clip.to_resolution(Tensors(take(z, prefix, "visual."), []), spec)
        state = names.assign(getattr(p.objective, part), tensors, clip.vision_table(spec), source=prefix)
        arrays |= {f"{part}/{partition.name_of(k)}": v.get_value() for k, v in names.flat(state).items()}
    if "kernel_params" in p.arrays:
        arrays["kernel_params"] = jnp.asarray(z["gamma_coef0"])
    return p, arrays


def batch(z) -> dict[str, jax.Array]:
    """The recorded images as a batch; a ValueError where they are no 8-bit ones."""
    pixels = np.round(z["pixels"] * 255).astype(np.uint8)
    if not np.array_equal(pixels.astype(np.float32) / np.float32(255), z["pixels"]):
        raise ValueError("the pixels are not those of 8-bit images")
    return {"image": jnp.asarray(pixels), "row": jnp.arange(len(pixels), dtype=jnp.int32)}


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
    start = jnp.asarray(z["gamma_coef0"])
    tx = optax.adamw(p.learning_rate(0), weight_decay=0.0)
    opt, leaf, step = tx.init(start), start, p.step(0)

    @jax.jit
    def slope(vision):
        def loss(params):
            x = watcher.skeleton.merge({**frozen, **vision, "kernel_params": params})
            return x.forward(jnp.asarray(z["pixels"]), jnp.asarray(z["pixels"]))[0]

        return jax.grad(loss)(start)

    rows = []
    for _ in range(p.config.steps):
        params = dict(state["params"])
        if trains:
            used = leaf = params["kernel_params"]
        else:
            used = start
            updates, opt = tx.update(slope(params), opt, leaf)
        row = {"gamma_coef0_used": np.array(used)}
        if not trains:
            row["gamma_coef0_leaf"] = np.array(leaf)
            leaf = optax.apply_updates(leaf, updates)
        state, metrics = step(state, frozen, batch(z))
        row |= {"lr": metrics["lr"], "loss_total": metrics["loss"]}
        rows.append(row | {k: metrics[k] for k in ("loss_clean", "loss_kernel")})
    out = {f"trajectory/{k}": np.stack([np.asarray(r[k]) for r in rows]) for k in rows[0]}
    return out | ({"end": np.asarray(state["params"]["kernel_params"])} if trains else {})


def compute(z) -> dict[str, np.ndarray]:
    """Every recorded quantity, by its name in the file."""
    # With gamma and c as parameters, their gradients are there too; the forward pass is the same.
    p, arrays = program(z, kernel_params="exact")
    pixels = jnp.asarray(z["pixels"])
    tuned = {n: a for n, a in arrays.items() if n in p.trained}
    frozen = {n: a for n, a in arrays.items() if n not in tuned}

    def forward(tuned):
        value, seen = p.skeleton.merge(tuned, frozen).forward(pixels, pixels)
        return value, {**seen, "loss_total": value}

    def kernel_alone(tuned):
        return forward(tuned)[1]["loss_kernel"]

    (_, seen), grads = jax.jit(jax.value_and_grad(forward, has_aux=True))(tuned)
    out = dict(seen, teacher_input=p.skeleton.merge(arrays).teacher_view(pixels))
    for key, tree in (("grad", grads), ("grad_kernel", jax.jit(jax.grad(kernel_alone))(tuned))):
        tensors = gradients(p.skeleton, tree, "vision", clip.vision_table(p.objective.spec))
        out |= {f"{key}/{n.removeprefix('visual.')}": a for n, a in tensors.items()}
        out[f"{key}/gamma_coef0"] = tree["kernel_params"]
    return {k: np.asarray(v) for k, v in out.items()} | trajectory(z)


def reads(name: str) -> bool:
    return name.startswith("kuea")


def errors(golden: Path, sd: Path) -> list[tuple[str, float, float]]:
    z = np.load(golden)
    with jax.default_matmul_precision("highest"):
        ours = compute(z)
    weights = ("w", "w0", "teacher", *INPUTS)
    recorded = [k for k in z.files if k.split("/")[0] not in weights]
    same_names(recorded, ours)
    groups: dict[str, list[str]] = {}
    for key in recorded:
        whole = key.startswith(("grad/", "grad_kernel/")) and not key.endswith("gamma_coef0")
        groups.setdefault(key.split("/")[0] if whole else key, []).append(key)

    def joined(arrays, members) -> np.ndarray:
        return np.concatenate([arrays[m].ravel() for m in members])

    def scale(key, want) -> np.ndarray:
        """A squared distance |f - f0|^2, with the rounding of f, has an error of the order of |f - f0| |f0|."""
        if not key.endswith(("loss_clean", "loss_total")):
            return want
        return np.sqrt(z[key.replace("total", "clean")] * np.mean(np.sum(np.square(z["f0"]), axis=-1)))

    found = {}
    for key, members in groups.items():
        want = joined(z, members)
        found[key] = relative(joined(ours, members), want, scale(key, want))
    return [(key, error, BOUNDS[key.split("/")[0]]) for key, error in found.items()]
