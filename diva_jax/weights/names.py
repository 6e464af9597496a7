"""PyTorch checkpoints into our NNX modules and back, strict in both directions.

A `Table` (`models.names`) turns the path of a parameter into its name in a checkpoint. The map is made by walking the
model, so it covers every parameter. Layouts: `kernel` [in, out] is PyTorch's `weight` [out, in], and a convolution's
`kernel` [H, W, in, out] its `weight` [out, in, H, W]; everything else is carried as it is.

The towers of a backbone have names in open_clip's checkpoints, in tables which each require their tower's names and
ignore the other known ones, and in transformers' models, as each architecture's `TRANSFORMERS` converts them.
"""

import functools
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diva_jax.common.errors import UserError, brief, explained, listing
from diva_jax.common.json_files import packaged
from diva_jax.data import preprocess
from diva_jax.models import backbones, layers
from diva_jax.models.backbones import Spec, TextSpec, architecture, architectures
from diva_jax.models.backbones.shared.open_clip_config import to_open_clip
from diva_jax.models.backbones.shared.transformer import Text, require_text
from diva_jax.models.backbones.shared.transformers_layout import Layout, Recipe, image_processor
from diva_jax.models.names import Table, flat, from_torch_layout, to_torch_layout, torch_shape
from diva_jax.weights.formats import Tensor, Tensors, write_open_clip


def check_type(name: str, dtype: np.dtype, source: str) -> None:
    """Raises a UserError where a tensor is not of a floating type of at least 16 bits."""
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise UserError(f"{source}: the tensor {name} is of type {dtype}: give unquantised floats")


def check_values(name: str, array: np.ndarray, source: str, may_be_zero: bool = True) -> None:
    """Checks floats of 2, 4 or 8 bytes, of any strides, by their bits and without a copy: a UserError where one is NaN
    or infinite, or, unless `may_be_zero` (biases), where all are zero."""
    size = array.dtype.itemsize
    bits = array.ravel(order="K").view(f"u{size}")
    # Without the sign, floats are ordered as integers are. As unsigned integers, the largest ones are negative floats.
    largest = max(int(bits.max(initial=0)) & np.iinfo(f"i{size}").max, int(bits.view(f"i{size}").max(initial=0)))
    if largest >= int(np.asarray(np.inf, array.dtype).view(bits.dtype)):
        raise UserError(f"{source}: the tensor {name} has values that are NaN or infinite: fetch the file again")
    if array.size and not largest and not may_be_zero:
        raise UserError(f"{source}: the tensor {name} is zero everywhere: fetch the file again")


def check_names(state, tensors: Mapping, table: Table, *, source: str = "the checkpoint") -> None:
    """A UserError lists names that are unknown, missing, or of another shape; arguments as `assign`'s."""
    names = {table.canonical(n): n for n in tensors}
    shapes = {table.torch_name(path): torch_shape(path, var.shape) for path, var in flat(state).items()}
    there = {n: tuple(tensors[names[n]].shape) for n in shapes if n in names}
    problems = {
        "missing": [n for n in shapes if n not in names],
        "unknown": [n for c, n in names.items() if c not in shapes and not table.ignored(c)],
        "wrong shape": [f"{n} (is {there[n]}, should be {shapes[n]})" for n in there if there[n] != shapes[n]],
    }
    if listed := [f"{title}: {listing(wrong, 40)}" for title, wrong in problems.items() if wrong]:
        raise UserError(f"{source} does not fit the {table.what} of the config: {'; '.join(listed)}")


def assign(
    state, tensors: Mapping[str, Any], table: Table, *, source: str = "the checkpoint", only: Collection | None = None
):
    """Fills an abstract module or state with a checkpoint's tensors, which may be lazy; returns a state with its
    dtypes and shardings, of which each process provides the shards of its own devices. With `only`, some of its paths,
    the others are not read, and not in the result. A UserError as of `check_names`, and where a tensor is not of a
    floating type, not finite, or a kernel of zeros."""
    check_names(state, tensors, table, source=source)
    names = {table.canonical(n): n for n in tensors}

    def fill(item) -> tuple[tuple, nnx.Variable]:
        path, var = item
        name = names[table.torch_name(path)]
        # A transposed view: jax copies any layout to the device as fast as a dense one, so no copy is made here.
        array = np.asarray(tensors[name])
        check_type(name, array.dtype, source)
        with np.errstate(over="ignore"):  # What overflows is infinite, and found as such.
            array = from_torch_layout(path, array).astype(var.dtype, copy=False)
        if array.shape != var.shape:
            raise UserError(f"{source}: the tensor {name} has not the shape that its file declares")
        check_values(name, array, source, may_be_zero=path[-1] != "kernel")
        want = var.get_value()
        if isinstance(want, jax.ShapeDtypeStruct) and want.sharding:
            return path, var.replace(jax.make_array_from_callback(want.shape, want.sharding, array.__getitem__))
        return path, var.replace(jax.device_put(array))

    with ThreadPoolExecutor(2) as pool:  # A tensor that is read needs its memory a second time meanwhile.
        wanted = {path: var for path, var in flat(state).items() if only is None or path in only}
        return nnx.from_flat_state(dict(pool.map(fill, wanted.items())))


def to_torch(state, table: Table) -> dict[str, np.ndarray]:
    """Name -> array in PyTorch's names and layouts, contiguous; the inverse of `assign`."""
    return {
        table.torch_name(path): np.ascontiguousarray(to_torch_layout(path, np.asarray(var.get_value())))
        for path, var in flat(state).items()
    }


# Our modules have diffusers' names, but for the positions in the U-Net's feed-forward list. The aliases are names of
# older versions of the libraries; FLUX's are those of Black Forest Labs' own files.
_TABLES = packaged(__file__, "names.json")
UNET, VAE, TEXT_ENCODER, FLUX_VAE = (Table(**_TABLES[name]) for name in ("unet", "vae", "text_encoder", "flux_vae"))

SCALARS = ("logit_scale", "logit_bias")
_MODULES = {"vision": backbones.build, "text": Text}
TOWERS = tuple(_MODULES)


def table(tower: str, spec: Spec) -> Table:
    """The table from the tower "vision" to `visual.*`, see the architecture's `CHECKPOINT`; or from "text" to names at
    the top level for CLIP, else under `text.`; a UserError where there is no text tower."""
    if tower == "vision":
        return architecture(spec.arch).CHECKPOINT.vision
    require_text(spec)
    return architecture(spec.arch).CHECKPOINT.text


def abstract(tower: str, spec: Spec, **kw) -> nnx.Module:
    """The tower "vision" or "text" with shapes in place of arrays; other arguments as `backbones.build`'s."""
    return layers.abstract(lambda rngs: _MODULES[tower](spec, rngs=rngs, **kw))


def write_random_clip(folder: Path, spec: Spec, seed: int = 0) -> None:
    """Writes an open_clip folder with random weights: both towers and logit_scale."""
    tensors = {"logit_scale": np.asarray(np.log(1 / 0.07), np.float32)}
    for i, (tower, build) in enumerate(_MODULES.items()):
        tensors |= to_torch(nnx.state(build(spec, rngs=layers.Keys(seed + i))), table(tower, spec))
    write_open_clip(folder, tensors, to_open_clip(spec))


def misfits(tower: str, shapes: Mapping[str, tuple[int, ...]], spec: Spec) -> list[str]:
    """The names at which parameters (name -> shape) are not those of a tower of `spec`, or not the scalar `tower`."""
    want = {tower: ()} if tower in SCALARS else {}
    if tower in TOWERS:
        want = {"/".join(map(str, path)): var.shape for path, var in flat(abstract(tower, spec)).items()}
    return sorted(n for n in want.keys() | shapes.keys() if n not in shapes or shapes[n] != want.get(n))


def to_resolution(tensors: Tensors, spec: Spec) -> Tensors:
    """Returns the tensors with position embeddings for `spec.image_size`; the same object if they fit already.
    Interpolation is bicubic over the grid of patches, in float32, as in the original (open_clip's `resize_pos_embed`;
    for DINOv2 the models of transformers). Embeddings of other tokens are kept. Rotary embeddings are computed by the
    model and are not in a checkpoint."""
    positions = architecture(spec.arch).CHECKPOINT.positions
    old, new = positions.grid(tensors), spec.grid
    if old == new:
        return tensors
    antialias = spec.registers > 0 if positions.antialias is None else positions.antialias
    was = tensors[positions.name]
    extra = was.shape[-2] - old * old
    shape = (*was.shape[:-2], extra + new * new, was.shape[-1])

    def read() -> np.ndarray:
        table = np.asarray(was, np.float32).reshape(-1, was.shape[-1])
        grid = table[extra:].reshape(old, old, -1)
        if antialias:
            # In full precision: by default an accelerator rounds products to bfloat16.
            with jax.default_matmul_precision("highest"):
                grid = np.asarray(jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic", antialias=True))
        else:
            weights = preprocess.cubic_weights((np.arange(new) + 0.5) * old / new - 0.5, old)
            grid = np.einsum("io,opd,jp->ijd", weights, grid, weights, optimize=True).astype(np.float32)
        return np.concatenate([table[:extra], grid.reshape(new * new, -1)]).reshape(shape)

    return Tensors(tensors | {positions.name: Tensor(shape, np.dtype(np.float32), read)}, tensors.files)


def stretch(table: np.ndarray, length: int, kept: int) -> np.ndarray:
    """Position embeddings of texts [old, D] for a longer context, float32 [length, D], as Long-CLIP's (arXiv
    2403.15378, section 3.2). The first `kept` rows, at most old - 2, stay. Row kept + i of the result is read at kept +
    i * (old - kept) / (length - kept) by linear interpolation; past the last row it is extrapolated."""
    old = len(table)
    at = kept + np.arange(length - kept) * ((old - kept) / (length - kept))
    low = np.minimum(at.astype(int), old - 2)
    share = (at - low)[:, None]
    return np.concatenate([table[:kept], (1 - share) * table[low] + share * table[low + 1]]).astype(np.float32)


def to_context(tensors: Tensors, text: TextSpec) -> Tensors:
    """The tensors with `text.context_length` position embeddings of texts; the same object where they have them. Where
    they do not, and `text.kept_positions` is not negative, they are stretched, see `stretch`; a UserError where more
    are to be kept than can be."""
    name = next((n for n in ("positional_embedding", "text.positional_embedding") if n in tensors), None)
    if text.kept_positions < 0 or name is None or tensors[name].shape[0] == text.context_length:
        return tensors
    was = tensors[name]
    old, length, kept = was.shape[0], text.context_length, text.kept_positions
    if kept > min(old - 2, length - 1):
        problem = f"text.kept_positions={kept} cannot be kept of {old} position embeddings for {length} tokens"
        raise UserError(f"{problem}: use at most {min(old - 2, length - 1)}")

    shape = (length, *was.shape[1:])
    longer = Tensor(shape, np.dtype(np.float32), lambda: stretch(np.asarray(was, np.float32), length, kept))
    return Tensors(tensors | {name: longer}, tensors.files)


def layouts() -> list[Layout]:
    """The layouts of all architectures that exist in transformers."""
    return [module.TRANSFORMERS for module in architectures().values() if module.TRANSFORMERS is not None]


def _layout(spec: Spec) -> Layout:
    """The layout of `spec` in transformers; a UserError where transformers has no such model."""
    layout = architecture(spec.arch).TRANSFORMERS
    if layout is None:
        raise UserError(f"transformers has no {spec.arch} model: use --format=open_clip or --format=pt")
    return layout


def _convert(recipe: Recipe, tensors: Mapping[str, Any], to_hf: bool) -> dict[str, Tensor]:
    """The tensors of one side that hold the rows of the other's, each computed where it is read."""
    names, out = (recipe.open_clip, recipe.hf) if to_hf else (recipe.hf, recipe.open_clip)
    parts, shares = [tensors[n] for n in names], (1,) * len(out) if to_hf else recipe.shares

    def moved(arrays: list[np.ndarray]) -> list[np.ndarray]:
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        if recipe.transposed:
            array = array.T
        elif recipe.lead:  # Removes the axis in the layout that has it, and adds it in the other.
            array = array.reshape(array.shape[1:] if (recipe.lead > 0) == to_hf else (1, *array.shape))
        if len(out) == 1:
            return [array]
        units = array.reshape(sum(shares), -1, *array.shape[1:])
        return [part.reshape(-1, *array.shape[1:]) for part in np.split(units, np.cumsum(shares)[:-1])]

    # Arrays without memory of their own have the shapes of the results.
    with explained(f"the shapes of {listing(names)} do not fit", "fetch the file again", ValueError, TypeError):
        shapes = [a.shape for a in moved([np.broadcast_to(False, p.shape) for p in parts])]

    def read(k: int) -> np.ndarray:
        return moved([np.asarray(p) for p in parts])[k]

    return {name: Tensor(shapes[k], parts[0].dtype, functools.partial(read, k)) for k, name in enumerate(out)}


def to_open_clip_names(tensors: Tensors, spec: Spec, source: str) -> Tensors:
    """A transformers model under open_clip's names, lazily; a UserError lists names that are missing or unknown."""
    plan = _layout(spec).recipes(spec)
    known = {n for r in plan for n in r.hf}
    constants = {f"{m}_model.embeddings.position_ids" for m in ("text", "vision")}
    problems = {"missing": known - tensors.keys(), "unknown": tensors.keys() - known - constants}
    if listed := [f"{what}: {listing(sorted(wrong))}" for what, wrong in problems.items() if wrong]:
        raise UserError(f"{source} does not fit its config.json: {'; '.join(listed)}")
    return Tensors({n: t for r in plan for n, t in _convert(r, tensors, False).items()}, tensors.files)


def to_transformers_names(tensors: Mapping[str, Any], spec: Spec) -> dict[str, Tensor]:
    """The inverse of `to_open_clip_names`; `tensors` are those of the whole model."""
    return {n: t for r in _layout(spec).recipes(spec) for n, t in _convert(r, tensors, True).items()}


def from_transformers(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], where: str
) -> tuple[Spec, frozenset[str]]:
    """(The Spec that config.json and preprocessor_config.json, or {}, describe, the fields of it that they do not
    specify); a UserError where the model or its activation is not implemented."""
    kind = config.get("model_type")
    known = {model: layout for layout in layouts() for model in layout.models}
    if not isinstance(kind, str) or kind not in known:
        names = [name for layout in known.values() for name in layout.models.values()]
        problem = f"{where} is a {brief(kind)} model"
        raise UserError(f"{problem}: give the folder of a whole {' or '.join(dict.fromkeys(names))}")
    spec, silent = known[kind].from_config(config, preprocessor, where)
    return backbones.check(spec, f"{where}: backbone"), silent


def transformers_configs(spec: Spec, dtype: str = "float32") -> tuple[dict, dict]:
    """The contents of config.json, for weights of a dtype, and of preprocessor_config.json, the test-time transform; a
    UserError for what transformers has not."""
    layout = _layout(spec)
    return layout.to_config(spec, dtype), image_processor(spec, layout.processor)
