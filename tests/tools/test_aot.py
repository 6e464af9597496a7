"""Tests of ahead-of-time compilation with small programs: memory, costs, and errors for wrong input."""

import collections
import json
import os
import re
import runpy
from types import SimpleNamespace
from unittest import mock

import commands
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import failed, refused
from jax.sharding import NamedSharding, PartitionSpec as P
from packaging.requirements import Requirement
from places import ROOT

from diva_jax import aot, config
from diva_jax.common import config_files
from diva_jax.costs import hlo
from diva_jax.models import attention, backbones, kernels
from diva_jax.models.diffusion import blocks
from diva_jax.models.layers import Keys, Layers
from diva_jax.training import compiler, partition

pytest.importorskip("libtpu")
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module", autouse=True)
def flags_of_the_cpu():
    """`aot.devices` removes them from XLA_FLAGS: they are used before, and are there again afterwards."""
    jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
        yield


class Toy:
    """A replacement of `step.Program`: y = x @ w for images of `width` floats, with an all-reduced gradient."""

    width = 512

    def __init__(self, config, mesh):
        self.config, self.mesh, self.stages = config, mesh, [SimpleNamespace(name=n) for n in ("warm-up", "tune")]
        self.flops = lambda: collections.Counter({"unet": 5.4e12})
        matrix, images = (
            jax.ShapeDtypeStruct((rows, self.width), jnp.float32, sharding=NamedSharding(mesh, spec))
            for rows, spec in ((self.width, P()), (config.batch_size, P(("data", "fsdp"))))
        )
        self.abstract_state = lambda stage: {"w": matrix}
        self.abstract_frozen, self.abstract_batch = lambda: {"v": matrix}, lambda: {"image": images}

    def step(self, stage):
        def step(state, frozen, batch):
            def loss(w):
                with jax.named_scope("unet"):
                    return jnp.sum((batch["image"] @ w @ frozen["v"]) ** 2)

            return {"w": state["w"] - jax.grad(loss)(state["w"])}, {}

        options = compiler.options(self.config.compiler_options, self.mesh.devices.flat[0])
        return jax.jit(step, donate_argnums=0, compiler_options=options)


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(aot, "Program", Toy)
    c = config.default("vitl14")
    c.accum, c.batch_size = 1, 1024
    return c


def test_report(toy, tmp_path):
    row = aot.report(toy, "v5e:2x2", save=str(tmp_path / "saved"), hlo_file=tmp_path / "step.hlo.txt")
    matrix, batch = 4 * 512 * 512, 1024 // 4
    assert row["fits"] and row["chips"] == 4 and row["per_device_batch"] == batch
    assert row["memory"]["arguments"] == 2 * matrix + 4 * batch * 512
    assert row["memory"]["aliases"] == row["memory"]["outputs"] - row["memory"]["outputs"] % matrix == matrix
    assert row["collectives"]["all-reduce"] == {"count": 1, "gb": pytest.approx(matrix / 1e9)}
    # Two products forward and two backward; the gradient of the first input is not needed.
    assert row["flops"] == 4 * 2 * batch * 512 * 512 == 2 * row["parts"]["unet backward"]["flops"]
    assert row["model_ms"] > 1e3 * row["flops"] / 197e12 and row["seconds"]["compile"] > 0
    assert "ENTRY" in (tmp_path / "step.hlo.txt").read_text() and json.loads(json.dumps(row)) == row
    written = {f"{stage}.{kind}" for stage in ("0-warm-up", "1-tune") for kind in ("json", "bin")}
    assert {file.name for file in (tmp_path / "saved").iterdir()} == written
    facts = json.loads((tmp_path / "saved" / "1-tune.json").read_text())["facts"]
    assert facts["libtpu"] == row["versions"]["libtpu"] and facts["the devices"] == "4 x TPU v5 lite"
    assert row["images_per_s"] == pytest.approx(1e3 * batch / row["step_ms"])
    assert all(words in aot.text_of(row) for words in ("to spare", "all-reduce: 1 per step", "unet backward"))


def test_rates_of_a_chip_with_two_devices(toy):
    row = aot.report(toy, "tpu7x:2x2x1")
    assert (row["chips"], row["devices"], row["per_device_batch"]) == (4, 8, 128)
    assert row["images_per_s"] == pytest.approx(2 * 1e3 * 128 / row["step_ms"])
    assert row["mfu"] == pytest.approx(5.4e12 * row["images_per_s"] / 2307e12)
    assert "4 chips, 8 devices" in aot.text_of(row)


def test_programs_that_do_not_fit_or_cannot_be_compiled(toy, monkeypatch):
    """One that jaxlib cannot read is as vitl14's step for a tpu7x:2x2x4; a kernel beyond VMEM is no lack of memory."""

    def failing(said):
        return mock.Mock(side_effect=jax.errors.JaxRuntimeError(said))

    with monkeypatch.context() as patch:
        patch.setattr(Toy, "width", 65536)  # Two matrices of 16 GiB.
        row = aot.report(toy, "v5e:2x2")
    assert not row["fits"] and row["available"] == 15.75 * 2**30 and row["needed"] > 32 * 2**30
    assert "does not fit" in aot.text_of(row) and "GiB too much" in aot.text_of(row)
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Compiled, "as_text", failing("INTERNAL: RET_CHECK failure: async-update instruction"))
        said = r"compiles for v5e:2x2 in \d+ s and needs \d+\.\d\d of 15.75 GiB, .*jaxlib .* cannot read what libtpu "
        failed(said, aot.report, toy, "v5e:2x2")
    # The table's options reach the compiler of the slice, and the compiler's refusal is one sentence.
    toy.compiler_options = "xla_tpu_rwb_fusion=perhaps"
    refused("config.compiler_options.*xla_tpu_rwb_fusion", aot.report, toy, "v5e:2x2")
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 24.05M of 16.00M vmem."
    monkeypatch.setattr(compiler, "compiled", failing(vmem))
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):
        aot.report(toy, "v5e:2x2")


@pytest.mark.parametrize("largest, weights, curve, tries", [
    (11, 5, 1, [8, 11, 12]),  # Memory grows linearly with the batch,
    (11, 5, 2, None), (11, 5, 0.5, None),  # faster, and more slowly.
    (3, 0, 1, [8, 3, 4]), (1, 5, 1, [8, 4, 2, 1]), (0, 5, 1, [8, 3, 2, 1]), (300, 5, 1, [8, 256]),
    (300, 5, 0, None),
])  # fmt: skip
def test_search_finds_the_largest_batch(toy, monkeypatch, capsys, largest, weights, curve, tries):
    def pretend(config, topology):
        images = config.batch_size // 4
        needed, there = (weights + n**curve for n in (images, largest + 0.5))
        memory = {"memory": {"arguments": weights}} if needed <= there else {}
        return {"needed": needed, "available": there, "images": images, "fits": needed <= there} | memory

    monkeypatch.setattr(aot, "report", pretend)
    toy.batch_size = 4 * 8
    found = aot.search(toy, "v5e:2x2")
    assert (found["images"], found["fits"]) == (min(max(largest, 1), 256), largest > 0)
    asked = [int(line.split()[2][:-1]) for line in capsys.readouterr().err.splitlines()]
    assert len(asked) <= 6 and asked == (tries or asked)


def test_search_keeps_groups_of_images_whole(monkeypatch):
    monkeypatch.setattr(aot, "report", lambda c, _: dict(needed=c.batch_size, available=170, fits=c.batch_size <= 170))
    assert aot.search(config_files.read(CONFIGS / "dcr_vitl14"), "v5e:2x2")["needed"] == 160


def test_the_batch_of_the_config_or_of_the_flag():
    c = config.default("vitl14")
    assert aot.with_batch(c, 16, None).batch_size == 640
    assert aot.with_batch(c, 16, 3).batch_size == 16 * 3 * c.accum and c.batch_size == 640
    refused("per-device-batch=0", aot.with_batch, c, 16, 0)
    refused("7 devices", aot.with_batch, c, 7, None)


REPORTS, RUNS = ROOT / "bench/tpu", runpy.run_path(str(ROOT / "bench/tpu.py"))["RUNS"]


@pytest.mark.parametrize("name", sorted(file.stem for file in REPORTS.glob("*.json")))
def test_reports_are_of_the_configs_and_of_the_compiler_that_pods_install(name):
    """Versions are those of the constraints, for the Python of tpu/vm.sh and tpu/gke/Dockerfile, or, for a TPU7x, of
    the other lane; the program fits."""
    pods = re.search(r"uv venv --python (\S+)", (ROOT / "tpu/vm.sh").read_text())[1]
    assert f"FROM python:{pods}-slim" in (ROOT / "tpu/gke/Dockerfile").read_text()
    python = {"python_version": "3.13" if "tpu7x" in name else pods}
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    wanted = {r.name: str(r.specifier) for r in lines if not r.marker or r.marker.evaluate(python)}
    report, (of, topology, flags) = json.loads((REPORTS / f"{name}.json").read_text()), RUNS[name]
    assert {n: f"=={version}" for n, version in report["versions"].items()} == {n: wanted[n] for n in ("jax", "libtpu")}
    c, many = config_files.read(CONFIGS / of), flags == ["--config.accum=1"]
    assert (report["topology"], report["remat"], report["batch_size"]) == (topology, c.remat, c.batch_size)
    assert report["accum"] == (1 if many else c.accum) and report["mesh"]["fsdp"] == c.mesh.fsdp
    # 8 is the batch for which the TPU compiler leaves convolutions unchanged.
    assert of not in backbones.TABLE or many or report["per_device_batch"] == 8
    assert report["fits"] and report["needed"] < report["available"]


def test_meshes_of_slices_and_libtpu_that_is_missing_or_locked(monkeypatch):
    for topology, fsdp in (("v6e:4x4", 2), ("v5p:4x4x4", 8), ("tpu7x:2x2x2", 2)):
        c, found = config.default().mesh, aot.devices(topology)[2]
        c.fsdp = fsdp
        mesh = partition.make_mesh(c, found)
        assert mesh.devices.shape == (len(found) // fsdp, fsdp) and set(mesh.devices.flat) == set(found)
    refused("v5e:3x3 is not a slice", aot.devices, "v5e:3x3")
    assert len(aot.devices("v4:2x2x1")[2]) == 4, "v4 has one device per chip"
    assert len(aot.devices("tpu7x:2x2x1")[2]) == 8, "tpu7x has two devices per chip"
    for flag, says in (("topology=v9:4x4", "use one of v4, v5e, v5p, v6e"), ("hlo=setup.cfg/x", "setup.cfg is a file")):
        assert says in commands.refused("aot", "--config=vitl14", "--topology=v5e:2x2", f"--{flag}")
    assert "shows no running process, remove" in aot.explain("The TPU is already in use by another process", "v5e:4x4")
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    refused(r"\.\[tpu\]", aot.devices, "v5e:4x4")


SLOW = pytest.mark.slow  # Each case compiles a program of its own for a TPU.


def lowered(topology, fn, batched, *state):
    """A function lowered for a slice, of arrays with these shapes and the arrays of `state`."""
    mesh = partition.make_mesh(config.default().mesh, aot.devices(topology)[2])

    def array(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(axes)))

    args = [array(shape, "data", "fsdp") for shape in batched]
    args += jax.tree.map(lambda a: array(a.shape), state)
    # The tests' default precision, "highest", does not support bfloat16.
    with jax.default_matmul_precision("default"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn).lower(*args)


def test_a_kernel_is_the_same_wherever_the_package_is_installed(monkeypatch):
    """So that `main --executables` takes what was compiled on another machine."""
    texts = []
    for folder in ("home/me", "opt"):
        names = {"co_filename": f"/{folder}/diva_jax/models/kernels.py"}
        monkeypatch.setattr(kernels._forward_kernel, "__code__", kernels._forward_kernel.__code__.replace(**names))
        jax.clear_caches()
        texts.append(lowered("v5e:2x2", attention.attention, [(8, 512, 1, 64)] * 3).as_text())
    assert texts[0] == texts[1] and "tpu_custom_call" in texts[0]


def compiled(*program):
    """(FLOPs of the TPU kernels of a program `lowered` and compiled, those of other products, number of kernels)."""
    module = hlo.parse(lowered(*program).compile().as_text())
    found = {True: [], False: []}
    for op, c, _ in module.executed():
        found[op.target == "tpu_custom_call"].append(module.flops(op, c))
    return sum(found[True]), sum(found[False]), len(found[True])


def squared(out):
    return jnp.sum(out.astype(jnp.float32) ** 2)


@pytest.mark.parametrize(("n", "m", "heads", "width", "gradient"), [
    (729, 729, 2, 72, True),
    pytest.param(4096, 77, 5, 64, True, marks=SLOW),
    pytest.param(1024, 1024, 10, 64, True, marks=SLOW),
    pytest.param(4096, 4096, 1, 512, False, marks=SLOW),  # The wide head of the VAE.
])  # fmt: skip
def test_attention_kernels_compile_for_the_tpu(n, m, heads, width, gradient):
    """Forward and backward, with sizes of the U-Net and of a tower whose length is not a multiple of the tile."""
    backward = jax.grad(lambda *a: squared(attention.attention(*a)), argnums=(0, 1, 2))
    shapes = [(8, length, heads, width) for length in (n, m, m)]
    work, _, kernels = compiled("v5e:2x2", backward if gradient else attention.attention, shapes)
    rows, columns = (-(-length // 128) * 128 for length in (n, m))
    assert work == 2 * (7 if gradient else 2) * (8 // 4) * heads * rows * columns * width
    assert kernels == 1 + gradient


@pytest.mark.parametrize(("topology", "tokens", "channels"), [
    ("v5e:2x2", 384, 320),
    pytest.param("v6e:2x2", 256, 640, marks=SLOW),
    pytest.param("v5p:2x2x1", 1024, 640, marks=SLOW),
    pytest.param("tpu7x:2x2x1", 256, 640, marks=SLOW),
])  # fmt: skip
def test_feed_forward_kernels_compile_for_the_tpu(monkeypatch, topology, tokens, channels):
    """Forward and backward with the largest tiles of both numbers of channels; weights have no gradient."""
    monkeypatch.setattr(blocks, "MIN_TOKENS", tokens)

    def modules():
        layers = Layers(Keys(), jnp.bfloat16, jnp.bfloat16)
        return layers.layer_norm(channels, 1e-5), blocks.FeedForward(channels, layers)

    graph, state = nnx.split(nnx.eval_shape(modules))
    loss = jax.grad(lambda x, state: squared(blocks.feed_forward(x, *nnx.merge(graph, state))))
    work, rest, _ = compiled(topology, loss, [(8, tokens, channels)], state)
    images = 8 // (8 if topology.startswith("tpu7x") else 4)  # Per device; a chip of a TPU7x is two.
    assert work == 2 * 2 * images * tokens * 3 * channels * 4 * channels and not rest
