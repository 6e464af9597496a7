"""How noisy the gradient to the encoder is, and which draws and batch size that asks for.

    python -m diva_jax.world.noise --out=runs/world_noise [--arms=stages,unclip]

The gradient of one image and one draw of timestep and noise is G + a + e: G is what all images agree on, a belongs
to the image, e to the draw. From gradients of groups of images, each with several draws, inner products give

    two draws of one group      |G|^2 + A / m        A: the power of a
    two groups                  |G|^2                E: the power of e
    a gradient with itself      |G|^2 + (A + E) / m  m: images per group

The gradient noise scale (arXiv 1812.06162, equation 2.9) is the batch size at which noise and signal have equal power:
(A + E / k) / |G|^2 images with k draws each. A image costs c passes for the encoder and k for the draws, so that
the cost for a given noise is smallest for k = sqrt(c E / A). For a batch of B images, the learning rate that lowers
the loss most is 1 / (1 + noise scale / B) of that of a very large batch (equation 2.6). That is an argument for plain
gradient descent at the first step, and for the training loss alone: it says what is wasted, not what helps.
"""

import contextlib
import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np

from diva_jax.common import log, paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.log import say
from diva_jax.world import arms, drawing, scenes
from diva_jax.world.tuning import Tuner

SEED = 9301
GROUPS, IMAGES, DRAWS = 16, 16, 3
FROM = (0, 300, 500, 700)  # DIVA: first timesteps to compare.
COST = 1.0  # Passes of the encoder per image, in those of the U-Net; each is a forward and a backward pass.
_RESAMPLES = 2000


def inner_products(vectors: np.ndarray) -> np.ndarray:
    """[G, R, P] -> [G, R, G, R], float64."""
    flat = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
    return (flat @ flat.T).reshape(*vectors.shape[:2], *vectors.shape[:2])


def powers(products: np.ndarray, per_group: int) -> dict[str, float]:
    """{"signal", "image", "draw"}: |G|^2, A and E of the module's text, without bias; those of noise can be below 0.

    Args:
      products: inner products of gradients, [G, R, G, R]: R draws each of G groups.
      per_group: images per group.
    """
    g, r = products.shape[:2]
    own = np.trace(products.reshape(g * r, g * r)) / (g * r)
    same = np.einsum("arab->", products) - own * g * r
    other = products.sum() - np.einsum("arab->", products)
    draws, groups = same / (g * r * (r - 1)), other / (g * (g - 1) * r * r)
    return {"signal": groups, "image": per_group * (draws - groups), "draw": per_group * (own - draws)}


def advice(found: dict[str, float], batch: int, cost: float = COST) -> dict[str, float]:
    """What follows from `powers`.

    Args:
      found: the powers.
      batch: U-Net passes per step, of which the share of the best learning rate is given.
      cost: of the encoder per image, in passes.

    Returns:
      {"noise_scale": images of one draw, "best_draws": per image, not rounded, "rate": share of the learning rate}.
      Infinite noise scale and a rate of 0 where the signal is not above zero.
    """
    image, draw = (max(found[n], 0.0) for n in ("image", "draw"))
    scale = (image + draw) / found["signal"] if found["signal"] > 0 else math.inf
    best = math.sqrt(cost * draw / image) if image > 0 else math.inf
    return {"noise_scale": scale, "best_draws": max(1.0, best), "rate": 1 / (1 + scale / batch)}


def interval(products: np.ndarray, per_group: int, seed: int = 0) -> list[float]:
    """The 95% percentile bootstrap interval, over groups, of the noise scale.

    A group that was drawn twice is left out of the products of different groups, since it is not a different one.
    """
    rng, n = np.random.default_rng(seed), len(products)
    found = []
    for _ in range(_RESAMPLES):
        drawn = np.unique(rng.integers(0, n, n))
        if len(drawn) > 1:
            found.append(advice(powers(products[np.ix_(drawn, range(products.shape[1]), drawn)], per_group), 1))
    low, high = np.percentile([f["noise_scale"] for f in found], [2.5, 97.5], method="nearest")
    return [float(low), float(high)]


def gradients(tuner: Tuner) -> np.ndarray:
    """Gradients of the loss of an arm's last stage to its vision tower, before the first step: [G, R, P], float32."""
    p = tuner.program
    if set(p.objective.inputs) != {"image"}:
        raise UserError("--arms has one whose loss needs more than images: give arms with a diffusion model")
    arrays = tuner.initial(0)
    encoder = [n for n in p.active(len(p.stages) - 1) if n.startswith("vision/")]

    @jax.jit
    def gradient(arrays, images, keys):
        def loss(trained):
            return p.skeleton.merge(arrays, trained).loss({"image": images}, keys)[0]

        with p.tracing():
            found = jax.grad(loss)({n: arrays[n] for n in encoder})
        return jax.numpy.concatenate([found[n].ravel() for n in encoder])

    images = drawing.draw(scenes.sample(np.random.default_rng(SEED), GROUPS * IMAGES))
    out = []
    with contextlib.closing(log.progress("  gradients", GROUPS * DRAWS, "groups")) as bar:
        for i, some in enumerate(np.split(images, GROUPS)):
            for r in range(DRAWS):
                keys = jax.random.split(jax.random.key(SEED + i * DRAWS + r), IMAGES)
                out.append(np.asarray(gradient(arrays, some, keys)))
                bar.update()
    return np.stack(out).reshape(GROUPS, DRAWS, -1)


def measure(arm: arms.Arm, batch: int, folder: Path) -> dict:
    """`powers`, `advice` and `interval` of an arm, and the cosines of two draws of one group and of two groups.

    Args:
      arm: with a diffusion model.
      batch: see `advice`.
      folder: where a teacher with random weights is written, if the arm needs it.
    """
    products = inner_products(gradients(Tuner(arm, 3, batch, folder)))
    found = powers(products, IMAGES)
    own = found["signal"] + (found["image"] + found["draw"]) / IMAGES
    return (
        found
        | advice(found, batch)
        | {
            "interval": interval(products, IMAGES),
            "cosine_draws": (found["signal"] + found["image"] / IMAGES) / own,
            "cosine_groups": found["signal"] / own,
        }
    )


def settings(name: str) -> dict[str, arms.Arm]:
    """The arm itself; for DIVA also with other first timesteps."""
    arm = arms.ARMS[name]
    if arm.objective != "diva":
        return {name: arm}
    of = {t: dict(arm.fields) | {"diva.first_timestep": t} for t in FROM}
    return {f"{name}, timesteps from {t}": dataclasses.replace(arm, fields=f) for t, f in of.items()}


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    lines = [
        f"| setting | cosine of two draws of the same {IMAGES} images | of other images | noise scale, images "
        "[95% interval] | best draws per image | share of the learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        low, high = r["interval"]
        lines.append(
            f"| {name} | {r['cosine_draws']:.3f} | {r['cosine_groups']:.3f} | {r['noise_scale']:.0f} [{low:.0f}, "
            f"{high:.0f}] | {r['best_draws']:.1f} | {r['rate']:.2f} |"
        )
    return "\n".join(lines)


def _main() -> None:
    given = flags.FLAGS
    if not given.out:
        raise UserError("--out is missing: give a folder for noise.json, e.g. --out=runs/world_noise")
    if unknown := [n for n in given.arms if n not in arms.ARMS or not arms.ARMS[n].objective]:
        raise UserError(
            f"--arms has {listing(unknown)}: use some of {listing([n for n in arms.ARMS if n != 'untuned'])}"
        )
    folder = paths.folder(given.out, "--out")
    Path(folder).mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, arm in {k: v for n in given.arms for k, v in settings(n).items()}.items():
        say(name)
        rows[name] = measure(arm, given.batch_size, Path(folder))
        (Path(folder) / "noise.json").write_text(json.dumps(rows, indent=1) + "\n")
    say(table(rows))


if __name__ == "__main__":
    from absl import flags

    from diva_jax.common import cli

    # Here and not above: other modules of this package define --out as well.
    flags.DEFINE_string("out", None, "Folder for noise.json.")
    flags.DEFINE_list("arms", ["stages", "unclip"], "Names of arms with a diffusion model, see arms.py.")
    flags.DEFINE_integer("batch_size", 40, "Passes through the U-Net per step, for the share of the learning rate.", 1)
    cli.run(_main)
