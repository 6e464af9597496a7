"""The tuned towers of an objective as functions of its parameters, for evaluation and export."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from diva_jax.common.errors import UserError, listing
from diva_jax.models.backbones import Spec
from diva_jax.training.partition import Skeleton, disassemble
from diva_jax.weights import clip

Flat = dict[str, dict[str, jax.Array]]  # Tower -> name of a parameter in it -> array.


def _leaves(skeleton: Skeleton, arrays: Mapping[str, jax.Array]) -> Flat:
    """Returns `Objective.towers`, each as a flat dict; in that of a bare variable (logit_scale) the key is its name."""
    found = skeleton.merge(arrays).towers()
    return {t: disassemble(m)[1] if isinstance(m, nnx.Module) else {t: m.get_value()} for t, m in found.items()}


class Towers:
    """The towers of an objective, traced once: `shapes` has tower -> name -> ShapeDtypeStruct.

    Most parameters of a tower are parameters of the objective under another name; others (merged adapters) are computed
    from several. Tracing `Objective.towers` shows which parameters each of them needs.
    """

    def __init__(self, skeleton: Skeleton, arrays: Mapping[str, jax.ShapeDtypeStruct]):
        self._skeleton = skeleton
        self._abstract = {n: jax.ShapeDtypeStruct(a.shape, a.dtype) for n, a in sorted(arrays.items())}
        traced, self.shapes = jax.make_jaxpr(lambda a: _leaves(skeleton, a), return_shape=True)(self._abstract)
        jaxpr, names = traced.jaxpr, list(self._abstract)
        # Variable of the traced program -> the parameters that its value depends on.
        depends = {var: frozenset((name,)) for var, name in zip(jaxpr.invars, names, strict=True)}
        for eqn in jaxpr.eqns:
            used = frozenset().union(*(depends.get(v, ()) for v in eqn.invars if not hasattr(v, "val")))
            depends.update(dict.fromkeys(eqn.outvars, used))
        inputs = dict(zip(jaxpr.invars, names, strict=True))
        self._needs: dict[tuple[str, str], frozenset[str]] = {}
        self._same: dict[tuple[str, str], str] = {}  # Leaves that are an unchanged parameter.
        paths = [(path[0].key, path[1].key) for path, _ in jax.tree_util.tree_leaves_with_path(self.shapes)]
        for leaf, var in zip(paths, jaxpr.outvars, strict=True):
            self._needs[leaf] = frozenset() if hasattr(var, "val") else depends.get(var, frozenset())
            if not hasattr(var, "val") and var in inputs:
                self._same[leaf] = inputs[var]

    def check(self, spec: Spec) -> None:
        """A UserError where a tower has other names or shapes than that of the backbone `spec`, or is not known."""
        for tower, shapes in self.shapes.items():
            if tower not in (*clip.TOWERS, *clip.SCALARS):
                raise UserError(f"towers() returns {tower!r}: return only vision, text, logit_scale and logit_bias")
            if wrong := clip.misfits(tower, {n: a.shape for n, a in shapes.items()}, spec):
                raise UserError(
                    f"the {tower} tower of the objective is not that of config.backbone, they differ in "
                    f"{listing(wrong, 5)}: towers() must return the plain tower, with adapters merged"
                )

    def needs(self, tower: str) -> frozenset[str]:
        """Returns the names of the objective's parameters that a tower is computed from."""
        return frozenset().union(*(names for (t, _), names in self._needs.items() if t == tower))

    def __call__(self, arrays: Mapping[str, jax.Array], wanted: Iterable[str] | None = None) -> Flat:
        """The towers `wanted` (default all) of these parameters: tower -> name -> array, for an unchanged parameter the
        given array.

        `arrays` has at least those that `needs` names, on devices or on the host.
        """
        wanted = set(self.shapes if wanted is None else wanted)
        leaves = [leaf for leaf in self._needs if leaf[0] in wanted]
        out: Flat = {t: {} for t in self.shapes if t in wanted}
        computed = [leaf for leaf in leaves if leaf not in self._same]
        for tower, name in leaves:
            if (tower, name) in self._same:
                out[tower][name] = arrays[self._same[tower, name]]
        if computed:
            needed = sorted(frozenset().union(*(self._needs[leaf] for leaf in computed)))

            def compute(given):
                rest = {n: jnp.zeros(a.shape, a.dtype) for n, a in self._abstract.items() if n not in given}
                found = _leaves(self._skeleton, {**rest, **given})
                return [found[tower][name] for tower, name in computed]

            for (tower, name), array in zip(computed, jax.jit(compute)({n: arrays[n] for n in needed}), strict=True):
                out[tower][name] = array
        return out
