"""The interface of objectives; sums over draws, posteriors, losses over pairs and structure, written out."""

import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from helpers import refused

from diva_jax import config, objectives
from diva_jax.common.errors import UserError
from diva_jax.objectives import Stage, diva, judge, salm
from diva_jax.objectives.shared import pairs
from diva_jax.objectives.shared.stable_diffusion import weighted_sum
from diva_jax.training import workdirs


def stage(name, start, end):
    return Stage(name, start, end, 1e-3, ((".*", 1.0),))


@pytest.mark.parametrize("found", [
    (), (stage("a", 1, 3),), (stage("a", 0, 3), stage("b", 4, 6)), (stage("a", 0, 3), stage("b", 2, 6)),
    (stage("a", 0, 0), stage("b", 0, 6)), (stage("a", 0, 3), stage("b", 3, 2)),
])  # fmt: skip
def test_stages_with_gaps_are_refused(found, monkeypatch):
    c = small.small_config()
    monkeypatch.setattr(objectives, "find", lambda name: SimpleNamespace(stages=lambda c: found))
    refused("stages of config.objective=diva must follow one another", objectives.stages, c)


def test_the_longest_prefix_owns_a_parameter_and_adapters_start_fresh():
    p = small.program(small.small_config())
    part = SimpleNamespace(fresh=(r"blocks/1/.*",))
    parts = {"vision": part, "vision/blocks": SimpleNamespace(fresh=()), "visual_proj/bias": SimpleNamespace(fresh=())}
    p.objective = SimpleNamespace(pretrained=lambda: parts)
    owners = workdirs.owners(p)
    assert owners["vision/blocks/1/norm1/scale"] == "vision/blocks" and owners["vision/pos_embed"] == "vision"
    assert owners["visual_proj/bias"] == "visual_proj/bias" and "visual_proj/kernel" not in owners
    del parts["vision/blocks"]
    owners = workdirs.owners(p)
    assert "vision/blocks/1/norm1/scale" not in owners and owners["vision/blocks/0/norm1/scale"] == "vision"
    parts["vison"] = part
    refused(r"pretrained\(\) has 'vison', but parameters are named like", workdirs.owners, p)


def test_an_objective_without_its_section_is_refused():
    c = small.small_config()
    with c.unlocked():
        del c.diva
    refused("config.objective=diva has no section config.diva", config.validate, c, 1)


ONE, GOOD = jnp.float32(1), {"loss": jnp.float32(1), "share": 0.5}
# What a loss returns -> what is said of it.
RETURNED = [
    (ONE, "loss returns a .*Tracer.*, and not the pair"),
    ({"loss": ONE}, "loss returns a dict, and not the pair"),
    ([ONE, GOOD], "loss returns a list"),
    ((ONE,), "a tuple of 1"),
    ((ONE, GOOD, ONE), "a tuple of 3"),
    (None, "a NoneType"),
    ((ONE, ONE), "metrics that loss returns are a .*Tracer"),
    ((ONE, {1: ONE}), "not a dict with texts as keys"),
    ((ONE, {}), r'metrics that loss returns .none. lack "loss"'),
    ((ONE, {"mse": ONE}), r'.mse. lack "loss"'),
    ((ONE, GOOD | {"lr": ONE}), "have lr, which the train step adds itself"),
    ((jnp.ones(3), GOOD), "loss is float32 .3., and not a scalar"),
    ((ONE, GOOD | {"each": jnp.ones((2, 1))}), r"metrics\['each'\] is float32 .2, 1., and not a scalar"),
    ((ONE, GOOD | {"text": "a"}), "and not a scalar"),
    ((jnp.int32(1), GOOD), "loss is int32, which has no gradient"),
]


@pytest.mark.parametrize("found, says", RETURNED)
def test_what_a_loss_returns_is_checked_when_it_is_traced(found, says):
    class Objective(objectives.Objective):
        def __init__(self, config=None, *, rngs=None):
            pass

        def loss(self, batch, keys):
            return jax.tree.map(lambda x: x + (0 * batch).astype(x.dtype) if isinstance(x, jax.Array) else x, found)

    with pytest.raises(UserError, match=rf"\A{re.escape(__file__)}:.*{says}.*return a scalar and a dict"):
        jax.eval_shape(lambda x: Objective().loss(x, None), ONE)
    with pytest.raises(UserError, match="does not define inputs, what a batch holds: see docs/WRITE_AN_OBJECTIVE.md"):
        Objective().inputs  # noqa: B018


@pytest.mark.parametrize("returned", [(jnp.float32(1), GOOD), (jnp.bfloat16(1), {"loss": 1.0, "count": jnp.int32(3)})])
def test_every_loss_of_the_contract_passes(returned):
    class Base(objectives.Objective):
        def loss(self, batch, keys):
            return returned

    class Derived(Base):
        def __init__(self):
            pass

    assert Derived().loss(None, None) is returned


@pytest.mark.parametrize("source, says", {
    "x = 1": "is not an objective: the module does not define Objective",
    "Objective = 3": "must be a subclass of diva_jax.objectives.Objective",
    "class Objective: pass": "must be a subclass of diva_jax.objectives.Objective",
    "from diva_jax import objectives as o\nclass Objective(o.Objective):\n def __init__(self): 0": "must be made as",
}.items())  # fmt: skip
def test_modules_that_are_no_objectives(source, says, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/wrong.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        refused(f"config.objective='mine.wrong'.*{says}", objectives.find, "mine.wrong")
    finally:
        for name in ("mine.wrong", "mine"):
            sys.modules.pop(name, None)


def loss(inputs, draw):
    w, x = inputs
    value = jnp.sum(jnp.tanh(x @ w) * draw["eps"]) * draw["t"]
    return value, {"losses": value}


def test_value_and_gradient_equal_the_plain_sum():
    rng = np.random.default_rng(0)
    inputs = (jnp.asarray(rng.normal(size=(3, 5))), jnp.asarray(rng.normal(size=(7, 3))))
    drawn = {"eps": jnp.asarray(rng.normal(size=(4, 7, 5))), "t": jnp.arange(4.0)}
    weights = jnp.asarray([0.1, 2.0, -1.0, 5.0])

    def plain(inputs):
        values = [loss(inputs, jax.tree.map(lambda a, k=k: a[k], drawn))[0] for k in range(4)]
        return sum(w * v for w, v in zip(weights, values, strict=True))

    (value, aux), grads = jax.value_and_grad(lambda i: weighted_sum(loss, i, drawn, weights), has_aux=True)(inputs)
    expected, wanted = jax.value_and_grad(plain)(inputs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chained = jax.grad(lambda i: 3 * weighted_sum(loss, i, drawn, weights)[0])(inputs)
    for got, want, scaled in zip(grads, wanted, chained, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(scaled, 3 * want, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(jnp.vdot(weights, aux["losses"]), expected, rtol=1e-5)
    undifferentiated, _ = weighted_sum(loss, inputs, drawn, weights)
    np.testing.assert_allclose(undifferentiated, expected, rtol=1e-5)


def test_memory_does_not_grow_with_the_draws():
    w = jnp.zeros((256, 256))

    def deep(inputs, draw):
        x = draw
        for _ in range(8):
            x = jnp.tanh(x @ inputs)
        return jnp.sum(x), ()

    def temporaries(n):
        f = jax.grad(lambda w: weighted_sum(deep, w, jnp.zeros((n, 512, 256)), jnp.ones(n))[0])
        return jax.jit(f).lower(w).compile().memory_analysis().temp_size_in_bytes

    one = temporaries(1)
    # The input of each draw is kept; saving eight activations per draw would need eight times the memory.
    assert temporaries(6) < one + 6 * 512 * 256 * 4 * 2


def test_what_the_function_closes_over_is_differentiated_too():
    """Parameters that are not among the inputs, and values that were computed from some; constants are not."""
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(3, 5)), "u": rng.normal(size=(5, 2)), "v": rng.normal(size=(4, 3))}
    x, eps, weights = rng.normal(size=(7, 4)), rng.normal(size=(4, 7, 2)), jnp.asarray([0.1, 2.0, -1.0, 5.0])

    def value(params, summed):
        latents = jnp.tanh(x @ params["v"])

        def one_draw(w, draw):
            value = jnp.sum(jnp.tanh(latents @ w) @ params["u"] * draw)
            return value, value

        return summed(one_draw, params["w"], jnp.asarray(eps))

    def plain(fn, w, drawn):
        return sum(weights[k] * fn(w, drawn[k])[0] for k in range(4))

    def ours(fn, w, drawn):
        return weighted_sum(fn, w, drawn, weights)[0]

    params = jax.tree.map(jnp.asarray, params)
    expected = jax.grad(lambda p: value(p, plain))(params)
    for compiled in (lambda f: f, jax.jit):
        got = compiled(jax.grad(lambda p: value(p, ours)))(params)
        for name in params:
            np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-6, err_msg=name)
    # A frozen parameter of the same function costs no gradient.
    frozen = {n: a for n, a in params.items() if n != "u"}
    grads = jax.make_jaxpr(jax.grad(lambda p, u: value({**p, "u": u}, ours)))(frozen, params["u"])
    both = jax.make_jaxpr(jax.grad(lambda p: value(p, ours)))(params)
    assert str(grads).count("dot_general") < str(both).count("dot_general")


def test_draws_are_uniform_with_replacement_and_differ_by_image():
    keys = jax.random.split(jax.random.key(1), 400)
    drawn = np.asarray(diva.draw_token_indices(keys, "random:50", 15))
    assert drawn.shape == (400, 50) and drawn.min() == 0 and drawn.max() == 14
    counts = np.bincount(drawn.ravel(), minlength=15)
    expected = drawn.size / 15
    assert ((counts - expected) ** 2 / expected).sum() < 36.1  # chi-squared, 14 degrees of freedom, p = 0.001
    assert all(len(set(row)) < 50 for row in drawn), "without replacement there would be no repeats"
    assert len({tuple(row) for row in drawn}) == 400
    assert diva.draw_token_indices(keys, "all", 15) is None


def test_token_wise_text_needs_as_many_tokens():
    diva.check_fit("random:76", "token", 256, 77)
    refused("select=random:76", diva.check_fit, "all", "token", 256, 77)


@pytest.fixture(scope="module", params=range(4))
def errors(request):
    """Errors of 7 images under 5 texts and the neutral one."""
    return jnp.asarray(np.random.default_rng(request.param).uniform(0.5, 1.5, (7, 6)), jnp.float32)


ALL = jnp.ones((7, 6), bool)


def test_the_posterior_follows_the_texts(errors):
    found, weight = judge.posterior(errors, ALL, 9.0)
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    # The order of the texts is theirs, and what all errors have in common does not count.
    flipped, same = judge.posterior(jnp.concatenate([errors[:, 4::-1], errors[:, 5:]], axis=1), ALL, 9.0)
    np.testing.assert_allclose(flipped, found[:, ::-1], rtol=1e-5)
    shifted, also = judge.posterior(errors + jnp.arange(7)[:, None], ALL, 9.0)
    np.testing.assert_allclose(shifted, found, rtol=1e-4)
    for other in (same, also):
        np.testing.assert_allclose(other, weight, rtol=1e-4)
    # A lower error is a larger share, by exp(beta * difference).
    np.testing.assert_allclose(
        jnp.log(found[:, 0] / found[:, 3]), 9 * (errors[:, 3] - errors[:, 0]), rtol=1e-3, atol=1e-4
    )


def test_equal_errors_are_uniform_and_a_better_neutral_text_abstains(errors):
    level = jnp.broadcast_to(errors[:, :1], errors.shape)
    found, weight = judge.posterior(level, ALL, 300.0)
    np.testing.assert_allclose(found, 0.2, rtol=1e-5)
    np.testing.assert_allclose(weight, 0.5, rtol=1e-5)
    for neutral, want in ((0.0, 0.0), (2.0, 1.0)):  # Below and above all texts.
        _, weight = judge.posterior(errors.at[:, -1].set(neutral), ALL, 300.0)
        np.testing.assert_allclose(weight, want, atol=1e-6)


def test_texts_that_are_not_there_have_no_share(errors):
    present = ALL.at[0, 3].set(False).at[1, 1:5].set(False).at[2, :5].set(False).at[3, 5].set(False)
    found, weight = judge.posterior(jnp.where(present, errors, jnp.nan), present, 9.0)
    assert np.isfinite(found).all() and np.isfinite(weight).all()
    alone, _ = judge.posterior(errors[:1, jnp.array([0, 1, 2, 4, 5])], ALL[:1, :5], 9.0)
    np.testing.assert_allclose(found[0, jnp.array([0, 1, 2, 4])], alone[0], rtol=1e-6)
    assert found[0, 3] == 0 and weight[1] == weight[2] == 0 and weight[3] == 1


def test_a_shuffled_verdict_has_the_same_values_and_says_nothing(errors):
    present = ALL[:, :5].at[0, 1].set(False)
    found, _ = judge.posterior(errors, ALL.at[0, 1].set(False), 9.0)
    many = jax.vmap(lambda k: judge.shuffled(found, present, jax.random.split(k, 7)))(
        jax.random.split(jax.random.key(1), 500)
    )
    np.testing.assert_array_equal(np.sort(many, axis=-1), np.broadcast_to(np.sort(found, axis=-1), many.shape))
    assert (many[:, 0, 1] == 0).all()
    mean, kept = np.asarray(many.mean(axis=0)), np.asarray(present)
    np.testing.assert_allclose(mean[kept], (kept / kept.sum(axis=1, keepdims=True))[kept], atol=0.08)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("seed", range(3))
def test_losses_over_pairs(seed):
    rng = np.random.default_rng(seed)
    b, temperature = rng.integers(3, 8), 0.3
    x, t = rng.normal(size=(b, 5)), rng.normal(size=(b, 7))
    rows = np.exp(unit(x) @ unit(x[::-1]).T / temperature)
    logits = pairs.cosines(jnp.asarray(x), jnp.asarray(x[::-1].copy())) / temperature
    want = [-np.log(np.diagonal(rows / rows.sum(axis=a, keepdims=True))).mean() for a in (0, 1)]
    assert float(pairs.contrast(logits)) == pytest.approx(np.mean(want), rel=1e-5)
    for with_self in (True, False):
        kept = np.ones((b, b), bool) if with_self else ~np.eye(b, dtype=bool)
        p, q = (np.where(kept, np.exp(unit(e) @ unit(e).T / temperature), 0) for e in (t, x))
        p, q = (a / a.sum(axis=1, keepdims=True) for a in (p, q))
        want = sum(p[kept] * np.log(p[kept] / q[kept])) / b
        found = pairs.relation(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32), temperature, with_self)
        assert float(found) == pytest.approx(want, rel=1e-4)
    assert float(pairs.relation(jnp.asarray(x), jnp.asarray(3 * x), temperature)) == pytest.approx(0, abs=1e-6)
    apart = np.square(unit(x)[:, None] - unit(x)[None]).sum(-1)[~np.eye(b, dtype=bool)]
    assert float(salm.uniformity(jnp.asarray(x))) == pytest.approx(np.log(np.exp(-2 * apart).mean()), rel=1e-4)


def test_structure_is_that_of_all_pairs_of_patches():
    rng = np.random.default_rng(0)
    x, t = rng.normal(size=(3, 11, 5)), 4 * rng.normal(size=(3, 11, 8))

    def matrices(x):
        length = np.linalg.norm(x, axis=-1)
        apart = length[:, :, None] - length[:, None]
        return unit(x) @ unit(x).swapaxes(1, 2), apart / apart.std(axis=(1, 2), keepdims=True)

    want = [np.square(a - b).mean() for a, b in zip(matrices(x), matrices(t), strict=True)]
    found = salm.structure(jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.parametrize(
    "curriculum, want", [(True, [(0, 1), (0, 1), (0.5, 0.55), (1, 0.1), (1, 0.1)]), (False, [(1, 0.1)] * 5)]
)
def test_weights_of_the_four_quarters(curriculum, want):
    given = SimpleNamespace(options=salm.SalmOptions(curriculum=curriculum))
    at = [salm.Objective.weights(given, done) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(at, want, rtol=1e-6)
