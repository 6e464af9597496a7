"""Checks of a device by `python -m diva_jax.selfcheck`: each returns (a verdict, what was found in words)."""

import contextlib
import functools
import io
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, TimeoutError as Late
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.extend import core
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from PIL import Image

from diva_jax.costs import chips, hlo
from diva_jax.data import images
from diva_jax.models import attention, layers
from diva_jax.models.diffusion import blocks
from diva_jax.training import checkpoint, compiler, distributed, partition
from diva_jax.training.step import Program

_REPEATS = 5
_MARGIN, _ROUNDING = 3.0, 2.0**-9  # Bound of a kernel's error: this factor times XLA's error, plus this.
_HOST_SECONDS = 3.0  # For this time the host decodes images.
OK, FAILED, SLOW, UNKNOWN = "ok", "FAILED", "slow", "-"


class Case(NamedTuple):
    """A kernel, "attention" or "feed-forward", at one shape on one device: `width` is the head dim or the channels, `n`
    the queries or tokens, `m` the keys or hidden units; `backward`: whether there is a gradient."""

    kind: str
    width: int
    batch: int
    n: int
    m: int
    heads: int
    backward: bool

    @property
    def name(self) -> str:
        return f"{self.kind} {self.width}"

    @property
    def flops(self) -> int:
        """Of the matrix products, a multiply-add counted as two."""
        if self.kind == "attention":
            return 2 * (7 if self.backward else 2) * self.batch * self.heads * self.n * self.m * self.width
        return 2 * (6 if self.backward else 3) * self.batch * self.n * self.m * self.width


# For CPUs.
TOY = (Case("attention", 64, 1, 100, 100, 1, True), Case("feed-forward", 128, 1, 128, 512, 1, True))


def cases_of(jaxpr) -> list[Case]:
    """The kernels in a traced program, each shape once; the arrays of their calls are those of one device."""
    from diva_jax.models import kernels

    found: dict[Case, None] = {}
    for eqn in _kernel_calls(jaxpr):
        (batch, channels, n), second = (v.aval.shape for v in eqn.invars[:2])
        prefix, number = re.fullmatch(r"(.*?)(\d*)", eqn.params["name"]).groups()
        if prefix in (kernels.FORWARD, kernels.BACKWARD):
            heads, cut = channels // int(number), int("iota" in str(eqn.params["jaxpr"]))  # Padding is masked.
            n, m = n - cut * (n == second[2]), second[2] - cut
            found[Case("attention", int(number), batch, n, m, heads, prefix == kernels.BACKWARD)] = None
        elif prefix in (kernels.FEED_FORWARD, kernels.FEED_BACKWARD):
            found[Case("feed-forward", channels, batch, n, int(number), 1, prefix == kernels.FEED_BACKWARD)] = None
    # A backward pass is checked together with its forward pass.
    return [c for c in found if c.backward or c._replace(backward=True) not in found]


def _kernel_calls(jaxpr) -> Iterator:
    """Every call of a Pallas kernel in a jaxpr and in those inside of it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for inner in core.jaxprs_in_params(eqn.params):
                yield from _kernel_calls(inner)


def _errors(found: list, goals: list) -> list[float]:
    """Relative L2 errors."""
    pairs = [(np.asarray(x, np.float64), np.asarray(goal, np.float64)) for x, goal in zip(found, goals, strict=True)]
    return [float(np.linalg.norm(x - goal) / np.linalg.norm(goal)) for x, goal in pairs]


def _timed(run: Callable, *args) -> tuple[list, float]:
    """The results of a compiled function, and its seconds, the median of a few calls."""
    out, seconds = jax.block_until_ready(run(*args)), []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(run(*args))
        seconds.append(time.perf_counter() - began)
    return out, statistics.median(seconds)


def _functions(case: Case, interpret: bool) -> tuple[Callable, Callable, list[tuple[int, ...]]]:
    """(the kernel, XLA's operations, the shapes of their arguments) of a case; the second takes float32 too."""
    if case.kind == "attention":
        kernel = functools.partial(attention.flash, interpret=interpret)
        shapes = [(case.batch, length, case.heads, case.width) for length in (case.n, case.m, case.m)]
        return kernel, jax.nn.dot_product_attention, shapes

    def modules(dtype):
        make = layers.Layers(nnx.Rngs(0), dtype, jnp.bfloat16)
        return make.layer_norm(case.width, 1e-5), blocks.FeedForward(case.width, make)

    graph, state = nnx.split(modules(jnp.bfloat16))
    mesh = Mesh(np.asarray([jax.local_devices()[:1]]), ("data", "fsdp"))

    def kernel(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return blocks.fused(x, state, graph, interpret)

    def plain(x):
        norm, layer = modules(x.dtype)
        return x + layer(norm(x))

    return kernel, plain, [(case.batch, case.n, case.width)]


def check_kernel(case: Case, interpret: bool) -> tuple[bool, str]:
    """Compares results and gradients of a kernel in bfloat16 with XLA's operations in float32, for one image. The
    relative L2 error may be three times that of XLA's operations in bfloat16."""
    kernel, plain, shapes = _functions(case, interpret)

    def both(fn: Callable, dtype) -> Callable:
        def run(weight, *args):
            weight, *args = (a.astype(dtype) for a in (weight, *args))
            out, pull = jax.vjp(fn, *args)
            return [out, *pull(weight.astype(out.dtype))] if case.backward else [out]

        return jax.jit(run)

    keys = [jax.random.key(i) for i in range(1 + len(shapes))]
    args = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, (shapes[0], *shapes), strict=True)]
    out, seconds = _timed(both(kernel, jnp.bfloat16), *args)
    one = [a[:1] for a in args]
    with jax.default_matmul_precision("highest"):
        goals = both(plain, jnp.float32)(*one)
    ours, xla = _errors([x[:1] for x in out], goals), _errors(both(plain, jnp.bfloat16)(*one), goals)
    right = all(a <= _MARGIN * b + _ROUNDING for a, b in zip(ours, xla, strict=True))
    said = f"error {max(ours):.1e} (XLA's {max(xla):.1e}), {1e3 * seconds:.2f} ms for {case.batch} images"
    if chip := chips.of(jax.local_devices()[0]):
        said += f", {case.flops / seconds / chip.flops:.0%} of peak"
    return right and all(bool(jnp.isfinite(x).all()) for x in out), said


def check_collectives(mesh: Mesh) -> tuple[bool, str]:
    """Compares a sum, a gather and a scattered sum over devices, of a row of its own number on each, with the truth."""
    axes, n, length = mesh.axis_names, mesh.size, mesh.size * 2**14

    def local(row):
        sums = jax.lax.psum(row, axes), jax.lax.psum_scatter(row[0], axes, tiled=True)
        wrong = [jnp.max(jnp.abs(x - n * (n - 1) / 2)) for x in sums]
        every = jax.lax.all_gather(row[0, 0], axes)
        return jax.lax.pmax(sum(wrong) + jnp.max(jnp.abs(every - jnp.arange(n))), axes)

    number = jnp.arange(n, dtype=jnp.float32)[:, None]
    rows = jax.jit(lambda: jnp.broadcast_to(number, (n, length)), out_shardings=NamedSharding(mesh, partition.BATCH))()
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=partition.BATCH, out_specs=P(), check_vma=False))
    wrong, seconds = _timed(run, rows)
    said = f"{n} devices: sum, gather and scatter of {4 * length / 2**20:.2g} MiB in {1e3 * seconds:.2f} ms"
    return float(wrong) == 0, said


def check_checkpoint(mesh: Mesh, workdir: epath.Path | None, timeout: int) -> tuple[bool, str]:
    """Compares an array that all devices share with what is read back of its checkpoint."""
    folder = (workdir or compiler.kept()) / "selfcheck"
    by_device = NamedSharding(mesh, partition.BATCH)
    abstract = {"x": jax.ShapeDtypeStruct((mesh.size, 2**18), jnp.float32, sharding=by_device)}
    state = {"params": made_up(abstract)}
    if jax.process_index() == 0 and folder.exists():
        folder.rmtree()  # Of a check that was killed: a checkpoint that is there already is not written.
    distributed.gathered(True)  # No process saves before.
    try:
        began = time.perf_counter()
        with checkpoint.Checkpoints(folder, 1, timeout) as checkpoints:
            checkpoints.save(1, state, {}, {}, wait=True)
        written = time.perf_counter()
        found = checkpoint.restore_newest(folder, lambda step: {"params": abstract})
        read = time.perf_counter()
        same = found is not None and bool(jnp.array_equal(found.state["params"]["x"], state["params"]["x"]))
    finally:
        if jax.process_index() == 0 and folder.exists():
            folder.rmtree()
    said = f"{mesh.size} MiB to {folder.parent}: written in {written - began:.1f} s, read in {read - written:.1f} s"
    return same, said


def made_up(abstract: dict) -> dict[str, jax.Array]:
    """Random arrays: small normal numbers, images of noise, and zeros and ones for other integers."""

    @functools.cache
    def maker(shape, dtype, place):
        def make(seed):
            key = jax.random.key(seed)
            if jnp.issubdtype(dtype, jnp.floating):
                return (0.02 * jax.random.normal(key, shape)).astype(dtype)
            return jax.random.randint(key, shape, 0, 256 if dtype == jnp.uint8 else 2).astype(dtype)

        return jax.jit(make, out_shardings=place)

    return {n: maker(a.shape, a.dtype, a.sharding)(np.uint32(i)) for i, (n, a) in enumerate(abstract.items())}


class Step:
    """The train step of a program's last stage, which is compiled while other checks run."""

    def __init__(self, program: Program):
        self.program, self._pool = program, ThreadPoolExecutor(1)

    def trace(self, kernels: frozenset[str] | None):
        """The jaxpr of the step with these kernels, see `platform.traced_on`."""
        p, last = self.program, len(self.program.stages) - 1
        p.kernels = kernels
        self._step = p.step(last)
        given = p.abstract_state(last), p.abstract_frozen(), p.abstract_batch(), self._step.pace
        self._traced = self._step.jitted.trace(*given)
        return self._traced.jaxpr.jaxpr

    def compile(self) -> None:
        """Starts to compile what was traced last."""
        self._compiled: Future = self._pool.submit(lambda: compiler.compiled(self._traced.lower()))

    def check(self, seconds: float) -> tuple[str, str, float]:
        """(verdict, what was found, seconds per step) of a few steps, which are compiled within so many seconds."""
        p = self.program
        try:
            compiled, problem = self._compiled.result(max(seconds, 1)), None
        except Exception as e:  # Every process asks the others first, also where the compiler of this one failed.
            problem = e
        not_compiled = distributed.any_failed(problem is not None)
        if problem is not None and not isinstance(problem, Late):
            raise problem
        if not_compiled:
            said = "not compiled on all processes when time was over; training compiles it once and keeps it"
            return UNKNOWN, said, 0.0
        arrays = made_up(p.arrays)
        state, frozen = p.init_state(arrays), {n: arrays[n] for n in p.abstract_frozen()}
        batch, times = made_up(p.abstract_batch()), []
        for _ in range(3):
            began = time.perf_counter()
            state, metrics = jax.block_until_ready(compiled(state, frozen, batch, self._step.pace))
            times.append(time.perf_counter() - began)
        values, took, device = {n: float(v) for n, v in metrics.items()}, min(times[1:]), p.mesh.local_devices[0]
        said = [f"loss {values['loss']:.3g}, {1e3 * took:.0f} ms for {p.config.batch_size} images"]
        verdict, chip = OK if all(map(math.isfinite, values.values())) else FAILED, chips.of(device)
        if device.platform == "tpu" and chip:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # This jaxlib may not read what libtpu has made.
                cost = hlo.analyse(compiled.as_text(), chip)
                estimate = (cost["model_ms"] + cost["kernel_bound_ms"]) / 1e3
                said.append(f"{took / estimate:.2f} times the compiler's estimate of {1e3 * estimate:.0f} ms")
                verdict = SLOW if verdict == OK and took > 2 * estimate else verdict
        if used := (device.memory_stats() or {}).get("peak_bytes_in_use"):
            needed = hlo.memory(compiled)["needed"] / 2**30
            said.append(f"peak {used / 2**30:.2f} GiB, by the compiler {needed:.2f}")
        return verdict, ", ".join(said), took


def check_host(config, seconds_per_step: float) -> tuple[str, str]:
    """Images per second that this host decodes and crops, of 512 x 640 pixels, beside what its devices take."""
    noise, file, data = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8), io.BytesIO(), config.data
    Image.fromarray(noise).resize((640, 512), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)

    def one(number: int) -> None:
        image = images.open_image(file.getvalue(), "an image of noise", rgb=True)
        box = images.sample_box(np.random.default_rng(number), *image.size, data.crop.scale, data.crop.ratio)
        images.resized_crop(image, box, data.image_size, data.crop.interpolation)

    with ThreadPoolExecutor(max(data.threads, 1)) as pool:
        count, began = 0, time.perf_counter()
        while (took := time.perf_counter() - began) < _HOST_SECONDS:
            count += len(list(pool.map(one, range(count, count + 4 * data.threads + 1))))
    rate = count / took
    if not seconds_per_step:
        return OK, f"{rate:.0f} images/s"
    needed = config.batch_size / jax.process_count() / seconds_per_step
    return OK if rate >= needed else SLOW, f"{rate:.0f} images/s; the devices of this host take {needed:.0f}"
