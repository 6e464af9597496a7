"""A case of GenHancer in the form of the authors' golden files, from transformers' SigLIP and PyTorch."""

import json

import check
import numpy as np
import pytest
import torch
from torch.func import functional_call
from torch_genhancer import FREQS, Model

from diva_jax.models.diffusion import flow
from diva_jax.models.layers import Keys, Layers
from diva_jax.objectives import genhancer as objective
from diva_jax.training import partition
from diva_jax.weights import flux, names

FLOW = flow.FlowConfig(24, 28, 36, 48, 3, 2, 1, axes=(4, 6, 6))
HEAD_OUT = "vision_model.head.attention.out_proj"
RANK, ALPHA = 3, 6


def generator(rng):
    """(tensors under our names, arrays under the files' names) of projectors and denoiser."""
    layers = Layers(Keys(4))
    parts = {
        "project_clip": (objective.EmbeddingProjector(48, 28, layers), flux.PROJECTOR),
        "project_t5": (objective.EmbeddingProjector(48, 36, layers), flux.PROJECTOR),
        "denoiser": (flow.Flow(FLOW, rngs=Keys(5)), flux.DENOISER),
    }
    ours, theirs = {}, {}
    for part, (module, table) in parts.items():
        for name, array in partition.disassemble(module)[1].items():
            ours[f"{part}/{name}"] = torch.from_numpy(np.array(array) + 0.02 * rng.normal(size=array.shape)).float()
        skeleton, _ = partition.disassemble(module)
        prefix = "dit" if part == "denoiser" else part
        for name, (path, _) in skeleton.variables.items():
            theirs[f"{prefix}.{table.torch_name(path)}"] = (f"{part}/{name}", path)
    return ours, theirs


def numpy_of(tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """The three files of a SigLIP case: latents given, on a grid of 3 x 5 tokens."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(2)
    rng = np.random.default_rng(2)
    sizes = dict(hidden_size=48, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4)
    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=42, patch_size=7)).requires_grad_(False)
    # Some versions of transformers leave this beginning out.
    start = "" if any(n.startswith("vision_model.") for n, _ in tower.named_parameters()) else "vision_model."
    weights = {start + n: p + 0.05 * torch.randn_like(p) for n, p in tower.named_parameters()}
    tensors, theirs = generator(rng)

    def normal(*shape):
        return torch.from_numpy(rng.normal(size=shape)).float()

    pixels, latents = torch.from_numpy(rng.uniform(size=(3, 42, 42, 3))).float(), normal(3, 6, 10, 6)
    t_normal, noise = normal(3), normal(3, 15, 24)
    model = Model(tensors, FLOW)

    def run(weights):
        view = ((pixels - 0.5) / 0.5).permute(0, 3, 1, 2)
        named = {n.removeprefix(start): p for n, p in weights.items()}
        out = functional_call(tower, named, (), {"pixel_values": view})
        loss, seen = model.forward(out.pooler_output, latents, t_normal, noise)
        return loss, seen | {"last_hidden": out.last_hidden_state, "pooled": out.pooler_output}

    def as_recorded(prefix, grads):
        return {
            f"{prefix}/{n}": names.to_torch_layout(path, numpy_of(grads[ours])) for n, (ours, path) in theirs.items()
        }

    def backward(loss, extra):
        tracked = {**tensors, **extra}
        grads = torch.autograd.grad(loss, list(tracked.values()), allow_unused=True)
        return dict(zip(tracked, grads, strict=True))

    for tensor in tensors.values():
        tensor.requires_grad_(True)
    loss, seen = run(weights)
    first = {
        "pixels": pixels,
        "draw/t_normal": t_normal,
        "draw/noise": noise,
        "latents": latents,
        "loss": loss.double(),
    }
    first |= {"clip_pixels": (pixels - 0.5) / 0.5, "f/freqs": FREQS}
    first |= {f"f/{k}": v for k, v in seen.items()}
    first |= {"f/timestep_code": model.code(seen["t"]), "f/guidance_code": model.code(seen["guidance"])}
    ids = torch.tensor([(0.0, i, j) for i in range(3) for j in range(5)])
    first |= {"f/img_ids": ids.expand(3, 15, 3), "f/txt_ids": torch.zeros(3, 1, 3)}
    first["f/dit.pe_embedder"] = model.turns((3, 5)).expand(3, 1, 16, 8, 2, 2)
    rounded = (1000 * seen["t"].bfloat16()).float()[:, None] * FREQS
    first["bf16/timestep_code"] = torch.cat([rounded.cos(), rounded.sin()], -1).bfloat16().float()
    first |= {f"w/model.{n}": p for n, p in weights.items()}
    first = {k: numpy_of(v) for k, v in first.items()} | as_recorded("w", tensors)
    second = as_recorded("grad1", backward(loss, {}))

    layers = [n.removesuffix(".weight") for n in weights if n.endswith(("_proj.weight", "fc1.weight", "fc2.weight"))]
    lora = {
        n: (normal(RANK, weights[f"{n}.weight"].shape[1]), normal(weights[f"{n}.weight"].shape[0], RANK))
        for n in layers
    }
    lora = {n: (0.2 * a, 0.2 * b) for n, (a, b) in lora.items()}
    leaves = {f"{n}.lora_{x}": p for n, pair in lora.items() for x, p in zip("AB", pair, strict=True)}
    leaves |= {f"{n}.bias": weights[f"{n}.bias"].clone() for n in layers}
    for leaf in leaves.values():
        leaf.requires_grad_(True)

    def merged(dead: bool):
        out = dict(weights) | {n: leaves[n] for n in leaves if n.endswith(".bias")}
        for n, (a, b) in lora.items():
            if dead or n != HEAD_OUT:
                out[f"{n}.weight"] = weights[f"{n}.weight"] + ALPHA / RANK * b @ a
        return out

    loss, seen = run(merged(False))
    grads = backward(loss, leaves)
    third = {"loss2": loss.double()} | {f"f2/{k}": seen[k] for k in ("embed", "vec", "txt", "pred")}
    third |= {f"lora/model.{n}": p for n, p in leaves.items() if ".lora_" in n}
    third |= {f"grad2/model.{n}": grads[n] for n in leaves if grads[n] is not None}
    every = as_recorded("grad2all", grads)
    dit = [every.pop(n) for n in list(every) if n.startswith("grad2all/dit.")]
    with torch.no_grad():
        whole = merged(True)
        third["f2/merged_embed"] = run(whole)[1]["embed"]
    third["merged/head_out.weight"] = whole[f"{HEAD_OUT}.weight"]
    for leaf in ("weight", "bias"):
        third[f"merged/q0.{leaf}"] = whole[f"vision_model.encoder.layers.0.self_attn.q_proj.{leaf}"]
    third = {k: numpy_of(v) for k, v in third.items()} | every
    third["grad2all/dit_norm"] = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in dit))
    assert f"grad2/model.{HEAD_OUT}.bias" in third and f"grad2/model.{HEAD_OUT}.lora_A" not in third

    dit = dict(in_channels=24, hidden_size=48, num_heads=3, depth=2, depth_single_blocks=1, axes_dim=[4, 6, 6])
    meta = dict(kind="SigLIP", dit=dit, clip_dim=28, t5_dim=36, scale_factor=1.0, guidance=4)
    folder = tmp_path_factory.mktemp("siglip")
    for end, arrays in (("", first), ("_grad1", second), ("_stage2", third)):
        about = meta | (dict(rank=RANK, lora_alpha=ALPHA) if end == "_stage2" else {})
        np.savez(folder / f"genhancer_s{end}.npz", meta=json.dumps(about), **arrays)
    return folder


@pytest.mark.parametrize("end", ["", "_grad1", "_stage2"])
def test_siglip_on_a_grid_that_is_not_square(siglip, end):
    assert not [row for row in check.errors(siglip / f"genhancer_s{end}.npz") if not row[1] <= row[2]]
