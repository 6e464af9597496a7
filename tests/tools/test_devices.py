"""FLOPs, chips and optimised HLO; the check of a device, and what config.kernels means by what it has found."""

import functools
import math
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from etils import epath
from flax import nnx
from helpers import abstract_mesh, refused
from jax.sharding import PartitionSpec as P

from diva_jax import config
from diva_jax.common import log
from diva_jax.costs import chips, hlo
from diva_jax.models import attention, platform
from diva_jax.models.diffusion.unet import UNet, UNetConfig
from diva_jax.models.diffusion.vae import VAE, VAEConfig
from diva_jax.models.layers import Keys
from diva_jax.training import checkpoint, compiler, device_checks, distributed, partition
from diva_jax.training.device_checks import FAILED, OK, SLOW, UNKNOWN, Case
from diva_jax.training.step import Program

TERA = 1e12


def traced(make, call, *given, wrt: tuple[int, ...] = ()) -> float:
    """TFLOP of `call(model, *given)`, whose arguments have these shapes, and of its gradient to those in `wrt`."""
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=Keys(0))))
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in given]

    def out(*args):
        return jnp.sum(call(nnx.merge(graph, args[-1]), *args[:-1]))

    return chips.flops_by_part(jax.make_jaxpr(jax.grad(out, wrt) if wrt else out)(*given, state).jaxpr).total() / TERA


def test_stable_diffusion_and_the_whole_step():
    given, make = ((1, 64, 64, 4), (1, 77, 1024)), functools.partial(UNet, UNetConfig())

    def unet(model, latents, context):
        return model(latents, jnp.zeros(1, jnp.int32), context)

    saved = 5 * 2 * (1280**2 * (16**2 + 32**2) + 640**2 * 64**2) / TERA  # 5/9 of three upsampling convolutions.
    assert traced(make, unet, *given) == pytest.approx(0.804 - saved, rel=1e-3)
    assert traced(make, unet, *given, wrt=(1,)) == pytest.approx(1.671 - 2 * saved, rel=1e-3)
    for size, tera in ((512, 1.117), (768, 2.609)):
        assert traced(functools.partial(VAE, VAEConfig()), VAE.encode, (1, size, size, 3)) == pytest.approx(tera, 0.01)
    c = config.default("vitl14")
    c.batch_size, c.accum = 2, 1
    exact = Program(c, jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))).flops()
    assert (exact.total() - exact["vae"]) / TERA == pytest.approx(3.83 - 4 * saved, rel=1e-3)
    assert exact.keys() >= {"vae", "vision", "unet"}


@pytest.mark.parametrize("make, again", [
    (small.diva_config, dict(remat="all", accum=2)),
    (small.dcr_config, dict(remat="vision", dcr__tile=1)),
    (small.genhancer_config, dict(remat="all")),
], ids=['diva', 'dcr', 'genhancer'])  # fmt: skip
def test_what_is_computed_again_does_not_count(make, again):
    plain, recomputed = (small.program(make(**fields)).flops() for fields in ({}, again))
    if "dcr__tile" in again:  # What the conditions of an image have in common is computed once for all tiles.
        assert 0.9 < recomputed.pop("unet") / plain.pop("unet") < 1
    assert plain == pytest.approx(recomputed, rel=1e-4) and plain["vision"] > 0


def test_loops_and_strides():
    def loss(w, x):
        def body(x, _):
            with jax.named_scope("turn"):
                return jnp.tanh(x @ w), None

        with jax.named_scope("all"):
            x, _ = jax.lax.scan(body, x, length=5)
        return x.sum()

    w, x = jax.ShapeDtypeStruct((7, 7), jnp.float32), jax.ShapeDtypeStruct((3, 7), jnp.float32)
    assert chips.flops_by_part(jax.make_jaxpr(loss)(w, x).jaxpr) == {"all": 5 * 2 * 3 * 7 * 7}
    assert chips.flops_by_part(jax.make_jaxpr(jax.grad(loss))(w, x).jaxpr) == {"all": 15 * 2 * 3 * 7 * 7}

    def strided(x, k):
        return jax.lax.conv_general_dilated(x, k, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")).sum()

    x, k = jax.ShapeDtypeStruct((1, 10, 6, 3), jnp.float32), jax.ShapeDtypeStruct((2, 2, 3, 5), jnp.float32)
    once = 2 * (5 * 3) * (2 * 2) * 3 * 5
    for f, count in ((strided, 1), (jax.grad(strided, (0, 1)), 2), (jax.value_and_grad(strided, (0, 1)), 3)):
        assert chips.flops_by_part(jax.make_jaxpr(f)(x, k).jaxpr) == {"": count * once}  # What is not used is not made.


def test_chips_are_found_by_device_kind_and_topology():
    peaks = {"TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "NVIDIA H100 80GB HBM3": 989e12}
    for kind, peak in peaks.items():
        assert chips.of(SimpleNamespace(device_kind=kind)).flops == chips.of(kind).flops == peak
    assert chips.of(SimpleNamespace(device_kind="cpu")) is None
    assert chips.parse_topology("v5e:4x4") == ("v5e", chips.CHIPS["v5e"], (4, 4))
    assert chips.parse_topology("tpu7x:2x2x1") == ("tpu7x", chips.of("TPU7x"), (2, 2, 1))
    for bad in ("v5e", "v5e:4", "tpu7x:4x4", "v5e:4x4x4", "v4:4x4", "v5e:axb", "v5e:0x4", "v9:4x4", "4x4"):
        refused(bad, chips.parse_topology, bad)


def test_time_of_an_all_reduce():
    """A whole pod, and with three axes a slice of whole cubes, is a torus: each chip sends over all its links."""
    # An axis without wrap-around links has half of the bandwidth, and an axis of one chip has none.
    cases = [("v5e", (1, 1), 0), ("v5e", (16, 16), 1), ("v5e", (4, 4), 1 / 2), ("v5e", (1, 4), 1 / 4)]
    for name in ("v4", "v5p", "tpu7x"):
        cases += [(name, (4, 4, 8), 1), (name, (2, 2, 4), 1 / 2)]
    for name, shape, share in cases:
        n, chip = math.prod(shape), chips.CHIPS[name]
        want = 2e9 * (n - 1) / n / (chip.ici * share) if share else 0
        assert chips.all_reduce_seconds(1e9, chip, shape) == pytest.approx(want)


# A step with a loop of three iterations, a fused product and a kernel inside it, an asynchronous copy and an
# all-reduce.
TEXT = (Path(__file__).parent / "step.hlo.txt").read_text()


def test_operations_in_loops_parts_kinds_and_traffic():
    report = hlo.analyse(TEXT, chips.CHIPS["v5e"])
    product, kernel = 2 * 32 * 64 * 16, 2 * 2 * 2 * 4 * 64 * 256 * 128
    assert report["flops"] == 3 * product and report["kernel_flops"] == 3 * kernel
    assert report["kernel_ms"] == pytest.approx(1e3 * 3 * kernel / 197e12)
    assert report["model_ms"] == pytest.approx(1e3 * (3 * 1500 + 3000) / 1.5e9)
    assert report["kernels"] == {"flash_forward_d64": 3}
    parts = report["parts"]
    assert parts["unet backward"]["kinds"] == {"matmul": pytest.approx(1e3 * 3 * 1500 / 1.5e9)}
    assert parts["unet forward"]["kernel_flops"] == report["kernel_flops"]
    assert parts["optimizer"]["model_ms"] == pytest.approx(0.002)
    assert "vision forward" not in parts, "the name of a parameter is not an operation"
    fusion = 2 * 32 * 64 + 2 * 32 * 16  # The second operand is on-chip.
    assert report["parts"]["unet backward"]["hbm_gb"] * 1e9 == pytest.approx(3 * fusion)
    copied, reduced = 4 * 800, 4 * 800  # The all-reduce reads the copy, which is on-chip.
    # The copy has no path, so it has the path of the all-reduce that reads it.
    assert report["parts"]["optimizer"]["hbm_gb"] * 1e9 == pytest.approx(reduced + copied)
    assert "other" not in report["parts"]
    assert report["collectives"] == {"all-reduce": {"count": 1, "gb": pytest.approx(3200 / 1e9)}}
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("hello")


@pytest.mark.parametrize(("chip", "wide"), [("v5e", 128), ("v4", 128), ("v6e", 256)])
def test_kernels_at_the_bound_of_their_shape(chip, wide):
    """Sums over heads of 64 take the time of sums as long as the matrix unit is wide; rows are not padded."""
    chip = chips.CHIPS[chip]
    few, report = (hlo.analyse(TEXT.replace("bf16[2,256,128]", f"bf16[2,256,{keys}]"), chip) for keys in (128, 2**20))
    product = 3 * 2 * 2 * 4 * 256 * 2**20
    assert report["kernel_ms"] == pytest.approx(1e3 * product * 2 * 64 / chip.flops)
    assert report["kernel_bound_ms"] == pytest.approx(1e3 * product * (64 + wide) / chip.flops)
    assert report["parts"]["unet forward"]["kernel_bound_ms"] == report["kernel_bound_ms"]
    # With few keys, the time is that of reading and writing operands and results once.
    moved = 3 * (4 * 512 * 128 + 2 * (2 * 256 * (256 + 256 + 128 + 128)))
    assert few["kernel_bound_ms"] == pytest.approx(1e3 * moved / chip.hbm_bandwidth)
    # Sums over 320 channels take the time of the next multiple of the unit's side; rows of 320 do not.
    text = TEXT.replace("flash_forward_d64", "feed_forward_backward_h1280").replace("[2,256,256]", "[2,320,4096]")
    found, channels = hlo.analyse(text, chip), -(-320 // wide) * wide
    product = 3 * 2 * 2 * 4096
    assert found["kernel_flops"] == product * 3 * 320 * 1280
    assert found["kernel_bound_ms"] == pytest.approx(1e3 * product * (channels * 1280 + 2 * 320 * 1280) / chip.flops)


def test_collectives_inside_of_fusions():
    """An asynchronous all-gather counts once; an all-reduce followed by a slice is a reduce-scatter."""
    text = (Path(__file__).parent / "collectives.hlo.txt").read_text()
    assert hlo.analyse(text, chips.CHIPS["v5e"])["collectives"] == {
        "all-gather": {"count": 1, "gb": pytest.approx(2 * 64 * 64 / 1e9)},
        "reduce-scatter": {"count": 1, "gb": pytest.approx(4 * 64 * 64 / 1e9)},
    }


@pytest.mark.parametrize(("dims", "window", "pairs"), [
    # 3x3 over 8x8, padded by one: 8 + 7 + 7 pairs per axis.
    ((8, 3, 8), "size=3x3 pad=1_1x1_1", 22 * 22),
    # Stride 2 with padding (0, 1): the three kernel positions read 0, 2, 4, 6; 1, 3, 5, 7; and 2, 4, 6.
    ((8, 3, 4), "size=3x3 stride=2x2 pad=0_1x0_1", 11 * 11),
    # The backward pass of that: four pixels with input dilation two.
    ((4, 3, 8), "size=3x3 pad=2_1x2_1 lhs_dilate=2x2", 11 * 11),
])  # fmt: skip
def test_convolutions_do_not_count_padding(dims, window, pairs):
    size, taps, out = dims
    text = f"""
ENTRY %main (x: f32[]) -> f32[] {{
  %x = f32[2,{size},{size},5]{{3,2,1,0}} parameter(0)
  %k = f32[{taps},{taps},5,7]{{3,2,1,0}} parameter(1)
  ROOT %c = f32[2,{out},{out},7]{{3,2,1,0}} convolution(%x, %k), window={{{window}}}, dim_labels=b01f_01io->b01f
}}
"""
    module = hlo.parse(text)
    main = module.computations["main"]
    assert module.flops(main["c"], main) == 2 * 2 * 5 * 7 * pairs


KERNELS = ["attention 64, 100 x 100", "feed-forward 128, 128 x 512"]
ROWS = ["machine", *KERNELS, "collectives", "checkpoint", "train step", "host"]


def test_the_command(tmp_path):
    """One table, one line for an issue, results that are kept; nothing is left in the workdir, or done twice."""
    again = ("selfcheck", f"--workdir={tmp_path}/run", "--unless_kept")
    place = {"XDG_CACHE_HOME": f"{tmp_path}/cache"}
    table, _, report = commands.succeed(*again, **place).partition("\n\nfor the report of an issue: ")
    rows = {line[:30].strip(): line[30:].split()[0] for line in table.splitlines() if line[0] != " "}
    late = {UNKNOWN} if rows["train step"] == UNKNOWN else set()  # On a machine that is very busy.
    assert list(rows) == ROWS and set(rows.values()) <= {OK, SLOW} | late
    assert all(f"{name} {verdict} (" in report for name, verdict in rows.items()) and report.count("\n") == 1
    file = re.search(r"kept in (\S+)", table)[1]
    assert file.startswith(f"{tmp_path}/cache/diva_jax/selfcheck-cpu-") and list((tmp_path / "run").iterdir()) == []
    assert commands.succeed(*again, **place) == f"this device was checked before: {file}\n"


def test_a_wrong_kernel_is_found(monkeypatch):
    """A result or a gradient that is 2% off, or NaN in one image of several."""
    right, some = jax.nn.dot_product_attention, jnp.bfloat16(0.02)
    wrong = {
        "fine": right,
        "result": lambda q, k, v: right(q, k, v) * (1 + some),
        "gradient": lambda q, k, v: right(q, k, v * (1 - some) + jax.lax.stop_gradient(v * some)),
        "nan": lambda q, k, v: right(q, k, v).at[1].set(jnp.nan),
    }
    for name, kernel in wrong.items():
        monkeypatch.setattr(attention, "flash", lambda *a, interpret, kernel=kernel: kernel(*a))
        ok, said = device_checks.check_kernel(Case("attention", 8, 2, 24, 17, 2, True), True)
        assert ok == (name == "fine"), (name, said)


def test_the_kernels_of_a_program_are_found():
    """Their shapes on one device, heads and padding; a backward pass stands for its forward pass too."""
    q, k, long = (jax.ShapeDtypeStruct((8, n, 3, 64), jnp.bfloat16) for n in (4096, 77, 1024))

    def run(q, k, long):
        with platform.traced_on(abstract_mesh("tpu"), None):
            own = jax.grad(lambda x: jnp.sum(attention.attention(x, x, x).astype(jnp.float32)))(long)
            return attention.attention(q, k, k), own

    found = device_checks.cases_of(jax.make_jaxpr(jax.jit(run))(q, k, long).jaxpr)
    assert found == [Case("attention", 64, 2, 1024, 1024, 3, True), Case("attention", 64, 2, 4096, 127, 3, False)]
    assert found[0].flops == 7 * 2 * 2 * 3 * 1024**2 * 64


def test_collectives_and_checkpoint_on_eight_devices(tmp_path, monkeypatch):
    mesh = partition.make_mesh(config.MeshOptions(fsdp=2))
    ok, said = device_checks.check_collectives(mesh)
    assert ok and said.startswith("8 devices")
    with checkpoint.Checkpoints(tmp_path / "selfcheck") as left:  # By a check that was killed.
        left.save(1, {"params": {"x": np.zeros((3, 5), np.float32)}}, {}, {}, wait=True)
    ok, said = device_checks.check_checkpoint(mesh, epath.Path(tmp_path), 60)
    assert ok and said.startswith(f"8 MiB to {tmp_path}") and not list(tmp_path.iterdir())
    monkeypatch.setattr(jax.lax, "psum_scatter", lambda x, axes, **kw: x[: x.shape[0] // 8])
    assert not device_checks.check_collectives(mesh)[0]


@pytest.mark.parametrize("loss", [1.5, float("nan")])
def test_a_step_that_is_late_fails_or_is_not_finite(loss, monkeypatch):
    """With the arrays of a program that is one product, on a TPU of whose program jaxlib has no text."""
    mesh = partition.make_mesh(config.MeshOptions())
    arrays = {"w": jax.ShapeDtypeStruct((5, 3), jnp.bfloat16, sharding=jax.sharding.NamedSharding(mesh, P()))}
    given = dict(abstract_frozen=dict, abstract_batch=lambda: arrays, init_state=lambda arrays: arrays["w"])
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU7x", memory_stats=dict)
    given |= dict(stages=["only"], config=config.default("vitl14"), mesh=SimpleNamespace(local_devices=[tpu]))
    step = device_checks.Step(SimpleNamespace(arrays=arrays, **given))
    step._step = SimpleNamespace(pace=0)
    compiled = mock.Mock(side_effect=lambda s, *_: (s, {"loss": jnp.sum(s) * 0 + loss}))
    compiled.as_text = mock.Mock(side_effect=jax.errors.JaxRuntimeError("INTERNAL"))
    step._compiled = step._pool.submit(lambda: compiled)
    verdict, said, seconds = step.check(60)
    assert verdict == (OK if loss == 1.5 else FAILED) and "640 images" in said and seconds > 0
    step._compiled = device_checks.Future()
    assert step.check(0.0)[0] == UNKNOWN and not distributed.any_failed(False)
    asked = mock.Mock(return_value=True)
    monkeypatch.setattr(distributed, "any_failed", asked)
    step._compiled = step._pool.submit(lambda: 1 // 0)
    pytest.raises(ZeroDivisionError, step.check, 60)
    asked.assert_called_once_with(True)  # As often as by a process whose compiler did not fail.


V5E, V6E = "TPU v5 lite", "TPU v6 lite"
HEADS, CHANNELS = "attention 64", "feed-forward 320"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    log.say_once.cache_clear()


def chosen(setting="auto", kind=V5E, platform="tpu", **kw):
    return compiler.chosen_kernels(setting, abstract_mesh(platform, kind=kind), **kw)


def test_auto_takes_what_has_passed_on_this_kind_of_device_a_tpu(capsys, tmp_path):
    assert chosen() == frozenset()
    assert "not checked" in (said := capsys.readouterr().out) and "diva_jax.selfcheck" in said
    compiler.keep_checked("none", {})  # Of configs without a kernel.
    assert not chosen(kind="none") and not capsys.readouterr().out
    compiler.keep_checked(V5E, {HEADS: True, CHANNELS: False})
    assert chosen() == chosen() == {HEADS} and chosen(kind=V6E) == frozenset()
    assert capsys.readouterr().out.count(HEADS) == 1, "one line for all programs of a process"
    compiler.keep_checked(V5E, {CHANNELS: True, "attention 72": False})
    assert chosen() == {HEADS, CHANNELS} and chosen("own") is None and chosen("xla") == frozenset()
    capsys.readouterr()
    compiler.checked_file("any").write_text("damaged")  # Without a TPU nothing is read or said.
    assert [chosen(platform=p, kind="any") for p in ("cpu", "gpu")] == [frozenset()] * 2
    assert compiler.chosen_kernels("auto", jax.sharding.AbstractMesh((1, 1), ("data", "fsdp"))) == frozenset()
    assert not capsys.readouterr().out


VERSION, SOURCES = (compiler.importlib.metadata, "version", lambda _: "9"), (compiler, "_SOURCES", [Path(__file__)])


@pytest.mark.parametrize("changed", [VERSION, SOURCES], ids=["version", "kernel"])
def test_another_version_or_another_kernel_was_not_checked(changed, monkeypatch):
    compiler.keep_checked(V5E, {HEADS: True})
    assert chosen()
    monkeypatch.setattr(*changed)
    assert not chosen()


def test_a_damaged_file_is_refused_and_processes_agree(monkeypatch):
    file = compiler.keep_checked(V5E, {HEADS: True})
    for content in ("", "[]", '{"kernels": {"attention 64": 1}}', '{"kernels": ["attention 64"]}'):
        file.write_text(content)
        refused("remove it", chosen)
    file.unlink()
    # A kernel must have passed on one of the processes and have failed on none.
    others = [{}, {HEADS: True, CHANNELS: False}, {"attention 72": True}]
    monkeypatch.setattr(distributed, "gathered", lambda mine: [mine, *others])
    compiler.keep_checked(V5E, {CHANNELS: True})
    assert chosen() == {HEADS, "attention 72"}
