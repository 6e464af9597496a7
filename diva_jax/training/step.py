"""The train step: one pure function, its optimizer, abstract inputs and shardings, for training and for `aot`."""

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from diva_jax import objectives
from diva_jax.common import log
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import REGEX, Rule, above, below, between, choice, field
from diva_jax.costs import chips
from diva_jax.models import backbones, layers, platform
from diva_jax.training import compiler, partition, terms


@dataclasses.dataclass(frozen=True)
class OptimOptions:
    """`config.optim`."""

    name: str = choice(("sgd", "adamw"), "The optimizer.")
    lr: float = field(1e-4, "The peak learning rate.", above(0))
    warmup: float = field(
        0.005, "The learning rate rises from 0 to its peak in this share of a stage's steps, rounded up.", below(0, 1)
    )
    warmup_steps: int = field(-1, "The length of the warm-up in steps; -1: as warmup says.", between(-1, 10**9))
    schedule: str = choice(
        ("cosine", "constant"),
        "After the warm-up, the learning rate falls to 0 at the stage's end (cosine) or is constant.",
    )
    clip: float = field(1.0, "The gradient's global norm is clipped to this; 0: it is not.", between(0, 1e38))
    momentum: float = field(0.9, "The momentum of sgd.", below(0, 1))
    b1: float = field(0.9, "The decay of adamw's average of gradients.", below(0, 1))
    b2: float = field(0.999, "The decay of adamw's average of squared gradients.", below(0, 1))
    eps: float = field(1e-8, "Adamw's epsilon.", Rule(lambda v: 0 < v <= 1, "must be above 0, at most 1"))
    weight_decay: float = field(0.0, "The decay of weights, decoupled in adamw, not in sgd.", between(0, 1e38))
    decay_all: bool = field(False, "Whether vectors, such as biases and norms, decay as matrices do.")
    no_decay: str = field("", "Parameters whose whole name matches this regular expression do not decay.", REGEX)


def pace(stage: objectives.Stage, warmup: float) -> objectives.Pace:
    """The numbers of a stage's learning rate, as numpy scalars; a warm-up that it does not give in steps (None or -1)
    is the share `warmup` of its steps, rounded up."""
    given = stage.warmup_steps is not None and stage.warmup_steps >= 0
    warm = min(stage.warmup_steps if given else math.ceil(warmup * stage.steps), stage.steps - 1)
    return objectives.Pace(np.float32(stage.lr), np.int32(stage.start), np.int32(stage.steps), np.int32(warm))


def learning_rate(stage: objectives.Stage, numbers: objectives.Pace) -> optax.Schedule:
    """Linear from 0 to the peak, then as `stage.schedule` says: cosine to 0 at the stage's end, or constant. The
    argument counts steps from the stage's start. `numbers` are those of `pace`, or traced. A stage with a `rate` of its
    own has that one."""
    if stage.rate is not None:
        return lambda count: stage.rate(count, numbers)

    def rate(count):
        up = numbers.peak * count / jnp.maximum(numbers.warm, 1)
        past = jnp.clip((count - numbers.warm) / (numbers.steps - numbers.warm), 0, 1)
        down = numbers.peak
        if stage.schedule != "constant":
            down = down * (0.5 * (1 + jnp.cos(jnp.pi * past)))
        return jnp.where(count < numbers.warm, up, down)

    return rate


def optimizer(config, lr: optax.Schedule, scales: Mapping[str, float]) -> optax.GradientTransformation:
    """The optax chain of `config.optim`: clip by global norm, SGD with momentum or AdamW, per-parameter scale (name ->
    `scales`). Weight decay reaches matrices and convolutions, and with `decay_all` biases, norms and embeddings of one
    axis, but no parameter whose whole name matches `no_decay`. The optimizer's state does not depend on `lr`."""
    decay, spared = config.weight_decay, re.compile(config.no_decay)

    def mask(params):
        return {n: (config.decay_all or p.ndim > 1) and not spared.fullmatch(n) for n, p in params.items()}

    chain = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    if config.name == "adamw":
        chain.append(optax.adamw(lr, config.b1, config.b2, config.eps, weight_decay=decay, mask=mask))
    else:
        chain += [optax.add_decayed_weights(decay, mask)] if decay else []
        chain.append(optax.sgd(lr, config.momentum or None))
    if any(s != 1 for s in scales.values()):
        chain.append(optax.stateless(lambda updates, _: {n: u * scales[n] for n, u in updates.items()}))
    return optax.chain(*chain)


def image_keys(key_data: jax.Array, step: jax.Array, rows: jax.Array) -> jax.Array:
    """One PRNG key per image, of the run's key, the step and the image's row in the global batch alone."""
    return jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(jax.random.wrap_key_data(key_data), step)))(rows)


def averaged(state: Mapping) -> Mapping[str, jax.Array]:
    """What a state's run evaluates and exports: the moving average of the trained parameters, or these themselves."""
    return state.get("ema", state["params"])


def train_step(
    state: dict,
    frozen: Mapping[str, jax.Array],
    batch: Mapping[str, jax.Array],
    pace: objectives.Pace,
    *,
    skeleton: partition.Skeleton,
    active: frozenset[str],
    tx: Callable[[optax.Schedule], optax.GradientTransformation],
    rate: Callable[[objectives.Pace], optax.Schedule],
    accum: int,
    decay: float = 0.0,
    follows_run: bool = False,
) -> tuple[dict, dict]:
    """One optimizer step. Returns (new state, float32 scalars: loss, grad_norm before the clip, lr, and the objective's
    own metrics).

    The state is {"params": {name: array}, "opt": optax state of the active ones, "step": int32 [], "key": uint32}, and
    where it is kept "ema": the exponential moving average of "params". The batch has the objective's inputs, each [B,
    *shape], and "row": int32 [B]. Static are: the stage's trained names `active`, `tx` (learning rate -> optimizer),
    `rate` (pace -> learning rate), `accum`, the moving average's `decay`, and `follows_run` of the objective.
    """
    trained = {n: a for n, a in state["params"].items() if n in active}
    idle = {n: a for n, a in state["params"].items() if n not in active}
    keys = image_keys(state["key"], state["step"], batch["row"])
    lr = rate(pace)
    progress = ()
    if follows_run:
        done = (state["step"] - pace.start).astype(jnp.float32) / pace.steps
        progress = (objectives.Progress(done, skeleton.merge(averaged(state), frozen)),)

    def loss_fn(trained, batch, keys):
        return skeleton.merge(trained, idle, frozen).loss(batch, keys, *progress)

    gradient = jax.grad(loss_fn, has_aux=True)

    def micro(total, x):
        grads, metrics = gradient(trained, *x)
        return jax.tree.map(jnp.add, total, grads), metrics

    if accum == 1:  # A single pass needs no loop.
        grads, metrics = gradient(trained, dict(batch), keys)
    else:
        xs = jax.tree.map(lambda x: platform.split(x, accum), (dict(batch), keys))
        grads, metrics = jax.lax.scan(micro, jax.tree.map(jnp.zeros_like, trained), xs)
        grads = jax.tree.map(lambda g: g / accum, grads)
    with jax.named_scope("optimizer"):
        updates, opt = tx(lr).update(grads, state["opt"], trained)
        trained = optax.apply_updates(trained, updates)
    new = {"params": {**idle, **trained}, "opt": opt, "step": state["step"] + 1, "key": state["key"]}
    if "ema" in state:  # In this form, parameters that this stage does not train stay bit-identical.
        new["ema"] = {n: a + (1 - decay) * (new["params"][n] - a) for n, a in state["ema"].items()}
    metrics = {k: jnp.mean(v) for k, v in metrics.items()}
    metrics |= {"grad_norm": optax.tree.norm(grads), "lr": jnp.asarray(lr(state["step"] - pace.start))}
    return new, jax.tree.map(lambda m: m.astype(jnp.float32), metrics)


class Program:
    """A config on a mesh: the objective without its arrays, which arrays it has, and one compiled step per stage.
    `arrays` has name -> ShapeDtypeStruct with its sharding, of every parameter; `scales`, per stage, name ->
    learning-rate scale (0: frozen), without those of the terms' models; `trained` the names that some stage trains,
    which alone are in the state and in checkpoints; `kernels` which of this package's kernels it uses on TPUs, see
    `compiler.chosen_kernels`."""

    def __init__(self, config, mesh: Mesh, workdir=None):
        self.config, self.mesh = config, mesh
        self.kernels = compiler.chosen_kernels(config.get("kernels", compiler.AUTO), mesh.abstract_mesh, workdir)
        self.objective = nnx.eval_shape(self.init_module)
        if config.data.latents and not self.objective.cacheable:
            problem = f"config.objective={config.objective} has no frozen model whose outputs could be cached"
            raise UserError(f"{problem}: leave config.data.latents empty")
        if self.objective.compares_images and config.batch_size // config.accum < 2:
            problem = f"config.objective={config.objective} compares the images of a micro-batch, of which there is one"
            raise UserError(f"{problem}: use a larger config.batch_size, or a smaller config.accum")
        self.stages = objectives.stages(config)
        self.skeleton, shapes = partition.disassemble(self.objective)
        frozen = tuple(f"{term}/" for term in terms.wanted(config))
        open_to_training = [n for n in shapes if not n.startswith(frozen)]
        self.scales = [partition.scales(s.trainable, open_to_training) for s in self.stages]
        self.trained = [n for n in open_to_training if any(s[n] for s in self.scales)]
        if narrow := [n for n in self.trained if shapes[n].dtype.itemsize < 4]:
            problem = f"config.trainable trains {listing(narrow, 2)}, held in {config.frozen_dtype}"
            raise UserError(f"{problem}, which rounds updates: use config.frozen_dtype=float32, or leave them frozen")
        self.replicated, self.batch_sharding = NamedSharding(mesh, P()), NamedSharding(mesh, partition.BATCH)
        self.shardings = partition.parameter_shardings(shapes, mesh, config.mesh.min_shard)
        if not config.mesh.shard_frozen:
            self.shardings |= {n: self.replicated for n in shapes if n not in set(self.trained)}
        self.arrays = {n: a.update(sharding=self.shardings[n]) for n, a in shapes.items()}

    def init_module(self) -> objectives.Objective:
        """The objective with random weights."""
        kind = objectives.find(self.config.objective).Objective
        if terms.wanted(self.config):
            kind = terms.with_terms(kind)
        return kind(self.config, rngs=layers.Keys(self.config.seed))

    @functools.cached_property
    def towers(self) -> partition.Towers:
        """What evaluation and export see, as a function of the parameters."""
        return partition.Towers(self.skeleton, self.arrays)

    def check_exportable(self) -> None:
        """Raises a UserError where the objective's towers are not those of `config.backbone`."""
        self.towers.check(backbones.spec_of(self.config))

    def active(self, stage: int) -> dict[str, float]:
        """Name -> scale of what a stage trains."""
        return {n: s for n, s in self.scales[stage].items() if s}

    def stage_at(self, step: int) -> int:
        """The stage that makes step `step`; the last one when all are done."""
        return next((i for i, s in enumerate(self.stages) if step < s.end), len(self.stages) - 1)

    def optimizer(self, stage: int, lr: optax.Schedule = lambda count: 0.0) -> optax.GradientTransformation:
        """The optimizer of a stage at a learning rate, on which its state does not depend."""
        return optimizer(self.config.optim, lr, self.active(stage))

    def init_opt(self, stage: int, params: Mapping[str, jax.Array]):
        """A fresh optimizer state for a stage, sharded as its parameters."""
        shardings = jax.tree.map(lambda a: a.sharding, self.abstract_state(stage)["opt"])
        init = jax.jit(self.optimizer(stage).init, out_shardings=shardings)
        return init({n: params[n] for n in self.active(stage)})

    def abstract_state(self, stage: int) -> dict:
        """The train state of a stage, as ShapeDtypeStructs with shardings."""

        def placed(leaf, param=None):
            return leaf.update(sharding=self.replicated if param is None else param.sharding)

        tx, active = self.optimizer(stage), {n: self.arrays[n] for n in self.active(stage)}
        opt = jax.eval_shape(tx.init, active)
        opt = optax.tree.map_params(tx, placed, opt, active, transform_non_params=placed)
        key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
        params = {n: self.arrays[n] for n in self.trained}
        average = {"ema": params} if self.config.ema.decay else {}
        numbers = {"step": placed(jax.ShapeDtypeStruct((), jnp.int32)), "key": placed(key)}
        return {"params": params, "opt": opt, **numbers, **average}

    def init_state(self, params: Mapping[str, jax.Array]) -> dict:
        """The state of step 0, from the values of the trained parameters; their moving average begins with them."""
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(self.config.seed), 1))
        put = partial(jax.device_put, device=self.replicated)
        params = {n: params[n] for n in self.trained}
        average = {"ema": jax.tree.map(jnp.copy, params)} if self.config.ema.decay else {}
        numbers = {"step": put(jnp.int32(0)), "key": put(key)}
        return {"params": params, "opt": self.init_opt(0, params), **numbers, **average}

    def tracing(self):
        """Context manager for what is traced: it sees the mesh, from it the platform, which kernels to use, and whether
        products of float32 are in float32."""
        return platform.traced_on(self.mesh.abstract_mesh, self.kernels, self.config.dtype == "float32")

    def jitted(self, fn: Callable, **options) -> Callable:
        """`fn(objective, *args)` compiled, as a function of the objective's arrays, name -> array, and `args`."""

        def call(arrays, *args):
            with self.tracing():
                return fn(self.skeleton.merge(arrays), *args)

        return jax.jit(call, **options)

    def abstract_batch(self) -> dict:
        """One global batch, as ShapeDtypeStructs with shardings."""
        kinds = {n: (i.shape, i.dtype) for n, i in self.objective.inputs.items()} | {"row": ((), jnp.int32)}
        whole = partial(jax.ShapeDtypeStruct, sharding=self.batch_sharding)
        return {n: whole((self.config.batch_size, *shape), dtype) for n, (shape, dtype) in kinds.items()}

    def abstract_frozen(self) -> dict:
        """The parameters that no stage trains, as ShapeDtypeStructs with shardings."""
        trained = set(self.trained)
        return {n: a for n, a in self.arrays.items() if n not in trained}

    def flops(self, stage: int = -1) -> collections.Counter[str]:
        """The FLOPs per image and step of a stage, by the outermost named scope, see `costs.chips`."""
        count = self.config.batch_size // self.config.accum
        batch = {n: jax.ShapeDtypeStruct((count, *a.shape[1:]), a.dtype) for n, a in self.abstract_batch().items()}
        frozen = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in self.arrays.items()}
        trained = {n: frozen.pop(n) for n in self.active(stage)}

        def loss(trained, frozen, batch, keys):
            return self.skeleton.merge(trained, frozen).loss(batch, keys)[0]

        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(trained, frozen, batch, keys)
        return collections.Counter({part: n / count for part, n in chips.flops_by_part(jaxpr.jaxpr).items()})

    def step(self, stage: int) -> "Step":
        """The jitted step of a stage, with `config.compiler_options`; the state is donated."""
        s = self.stages[stage]
        static = dict(
            skeleton=self.skeleton,
            active=frozenset(self.active(stage)),
            tx=partial(self.optimizer, stage),
            rate=partial(learning_rate, s),
            accum=self.config.accum,
            decay=self.config.ema.decay,
            follows_run=self.objective.follows_run,
        )

        def step(state, frozen, batch, pace):
            with self.tracing():
                return train_step(state, frozen, batch, pace, **static)

        out = jax.tree.map(lambda a: a.sharding, self.abstract_state(stage))
        options = compiler.options(self.config.compiler_options, self.mesh.devices.flat[0])
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(out, self.replicated), compiler_options=options)
        return Step(jitted, pace(s, self.config.optim.warmup))


class Step(NamedTuple):
    """The step of a stage: (state, frozen, batch) -> (state, metrics). The pace is an argument of the jitted program,
    so that it is not compiled again for another number of steps or rate."""

    jitted: Any
    pace: objectives.Pace

    def __call__(self, state, frozen, batch):
        return self.jitted(state, frozen, batch, self.pace)

    def lower(self, state, frozen, batch):
        """As of a jitted function; what is compiled of it takes `pace` as its last argument."""
        return self.jitted.lower(state, frozen, batch, self.pace)


class Steps:
    """The step of each stage of a program, compiled at its first batch or taken from the folder `saved`, see
    `compiler.load_executable`; `on_compiled` gets the seconds it took. Several runs can share them, whose configs
    differ in what no compiled step depends on (seed, data, steps)."""

    def __init__(self, program: Program, on_compiled: Callable = lambda s: None, saved: epath.Path | None = None):
        self.program, self._on_compiled, self._saved = program, on_compiled, saved
        self._compiled: dict[int, tuple[jax.stages.Compiled, Any]] = {}

    def __call__(self, index: int, state: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        """Makes one step of stage `index`; the state is donated. Returns (state, metrics)."""
        if index not in self._compiled:
            arrays, active, stage = self.program.arrays, self.program.active(index), self.program.stages[index]
            count, where = sum(arrays[n].size for n in active), dict.fromkeys(n.split("/")[0] for n in active)
            log.say(
                f"{partition.summary(arrays, active)}\n"
                f"stage {stage.name}: steps {stage.start} to {stage.end}, peak learning rate {stage.lr:g}, trains "
                f"{count:,} parameters of {', '.join(where)}" + ("" if self._saved else "; compiling")
            )
            step = self.program.step(index)
            began = time.perf_counter()
            with log.waiting("compiling"):
                lowered = step.lower(state, frozen, batch)
                ready = compiler.load_executable(self._saved, index, lowered, self.program) if self._saved else None
                program = ready or compiler.compiled(lowered)
            self._compiled[index] = program, step.pace
            log.say(f"{'ready' if ready else 'compiled'} in {time.perf_counter() - began:.0f} s")
            self._on_compiled(time.perf_counter() - began)
        program, pace = self._compiled[index]
        return program(state, frozen, batch, pace)


def train_steps(
    steps: Steps,
    state: dict,
    frozen: dict[str, jax.Array],
    next_batch: Callable[[], dict[str, np.ndarray] | None],
    start: int,
    end: int,
) -> Iterator[tuple[int, dict, dict[str, jax.Array]]]:
    """Makes the steps from `start` to `end`; yields (completed steps, state, metrics) after each. The state, see
    `train_step`, is donated to the next step. `next_batch` returns this process's rows of a batch; None ends the
    training. A stage that follows another one begins with a new optimizer. A UserError as of `compiler.compiled`."""
    program = steps.program
    for step in range(start, end):
        index = program.stage_at(step)
        if (batch := next_batch()) is None:
            return
        rows = {k: jax.make_array_from_process_local_data(program.batch_sharding, v) for k, v in batch.items()}
        state, values = steps(index, state, frozen, rows)
        if step + 1 == program.stages[index].end and index + 1 < len(program.stages):
            state["opt"] = program.init_opt(index + 1, state["params"])
        yield step + 1, state, values
