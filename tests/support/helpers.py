"""Refusals, rows of runs, errors between arrays and their bounds, abstract meshes, filled modules, random weights."""

import functools
import json

import jax
import margins
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from diva_jax.common.errors import RunError, UserError
from diva_jax.weights import names


def _raises(kind, says: str, call, *args, **kw) -> str:
    """Asserts that a call raises an error of this kind, whose one line matches; returns the line."""
    with pytest.raises(kind, match=says) as e:
        call(*args, **kw)
    assert "\n" not in str(e.value).strip(), str(e.value)
    return str(e.value)


refused, failed = (functools.partial(_raises, kind) for kind in (UserError, RunError))


def rows(workdir) -> list[dict]:
    """The rows that a run has logged."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def relative_error(ours, reference, scale=None) -> float:
    """Returns the L2 error relative to `scale`, by default the reference, in float64."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference if scale is None else scale))


def within(error: float, bound: float, what="") -> None:
    """Asserts that an error is at most `bound`; `make margins` lists where it is more than a third of it."""
    margins.record(error, bound, what)
    assert error <= bound, f"{what}: error {error:.2e}, bound {bound:.1e}"


def close(ours, reference, bound: float, what="") -> None:
    """Asserts that the relative L2 error is at most `bound`, see `within`."""
    within(relative_error(ours, reference), bound, what)


def rounded(ours, reference, rounding: float, bound: float, scale=1.0) -> None:
    """Asserts that `ours` is the reference, each entry rounded by at most a share, but for errors of bound * scale."""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    within(np.max((np.abs(ours - reference) - rounding * np.abs(reference)) / scale), bound)


def abstract_mesh(platform: str, sizes: tuple[int, int] = (2, 2), kind: str = "any") -> jax.sharding.AbstractMesh:
    """Returns a mesh of "cpu", "gpu" or "tpu" devices of a kind to trace for."""
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
    return AbstractMesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)


def filled(module, tensors, table, **kw):
    """Returns a module with the values of tensors under the names of `table`; see `names.assign`."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, names.assign(state, tensors, table, **kw))


def randomise(module, seed: int = 0):
    """Gives every parameter of a PyTorch module a random value, norms and biases too, so that a swap is detected."""
    import torch  # Only here: tests without PyTorch use this file too.

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim >= 2:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return module.eval()


def tensors(module) -> dict[str, np.ndarray]:
    """Returns the state dict of a PyTorch module as numpy arrays."""
    return {k: v.detach().cpu().numpy() for k, v in module.state_dict().items()}
