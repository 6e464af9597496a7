"""The interface of objectives; sums over draws, posteriors, losses over pairs and structure, written out."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import trees
from helpers import refused

from diva_jax import config, objectives
from diva_jax.models.backbones import Features
from diva_jax.objectives import Stage, diva, judge
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
    c = small.diva_config()
    monkeypatch.setattr(objectives, "find", lambda name: SimpleNamespace(stages=lambda c: found))
    refused("stages of config.objective=diva must follow one another", objectives.stages, c)


def test_the_longest_prefix_owns_a_parameter_and_adapters_start_fresh():
    p = small.program(small.diva_config())
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
    c = small.diva_config()
    with c.unlocked():
        del c.diva
    refused("config.objective=diva has no section config.diva", config.validate, c, 1)


ONE, GOOD = jnp.float32(1), {"loss": jnp.float32(1), "share": 0.5}
# What a loss returns -> what is said of it.
RETURNED = [
    (ONE, "loss returns a .*Tracer.*, and not the pair"),
    ((ONE,), "a tuple of 1"),
    (None, "a NoneType"),
    ((ONE, ONE), "metrics that loss returns are a .*Tracer"),
    ((ONE, {1: ONE}), "not a dict with texts as keys"),
    ((ONE, {}), r'metrics that loss returns .none. lack "loss"'),
    *(((ONE, GOOD | {n: ONE}), f"have {n}, which a run") for n in "lr step mfu eval/x feedback/x".split()),
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

    says = rf"\A{re.escape(__file__)}:.*{says}.*return a scalar and a dict"
    refused(says, jax.eval_shape, lambda x: Objective().loss(x, None), ONE)
    refused("does not define inputs, what a batch holds: see docs/WRITE_AN_OBJECTIVE.md", lambda: Objective().inputs)


WRONG = {
    "x = 1": "is not an objective: the module does not define Objective",
    "Objective = 3": "must be a subclass of diva_jax.objectives.Objective",
    "class Objective: pass": "must be a subclass of diva_jax.objectives.Objective",
    "from diva_jax import objectives as o\nclass Objective(o.Objective):\n def inputs(self): 0": "write @property",
    "from diva_jax import objectives as o\nclass Objective(o.Objective):\n def __init__(self): 0": "must be made as",
}


def test_modules_that_are_no_objectives(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for number, (source, says) in enumerate(WRONG.items()):
        trees.change(tmp_path, {f"wrong_objectives/number{number}.py": source})
        name = f"wrong_objectives.number{number}"
        refused(f"config.objective='{name}'.*{says}", objectives.find, name)


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


def test_value_and_gradients_equal_the_plain_sum():
    """Of the inputs, of parameters that the function closes over, and of values that were computed from some."""
    rng = np.random.default_rng(1)
    params = {"w": rng.normal(size=(3, 5)), "u": rng.normal(size=(5, 2)), "v": rng.normal(size=(4, 3))}
    x, weights = rng.normal(size=(7, 4)), jnp.asarray([0.1, 2.0, -1.0, 5.0])
    drawn = {"eps": jnp.asarray(rng.normal(size=(4, 7, 2))), "t": jnp.arange(1.0, 5.0)}

    def value(params, summed):
        latents = jnp.tanh(x @ params["v"])

        def one_draw(w, draw):
            value = jnp.sum(jnp.tanh(latents @ w) @ params["u"] * draw["eps"]) * draw["t"]
            return value, {"losses": value}

        found, aux = summed(one_draw, params["w"], drawn, weights)
        return 3 * found, aux["losses"]

    def plain(fn, w, drawn, weights):
        each = jnp.stack([fn(w, jax.tree.map(lambda a, k=k: a[k], drawn))[0] for k in range(4)])
        return weights @ each, {"losses": each}

    params = jax.tree.map(jnp.asarray, params)
    ours, goal = (jax.value_and_grad(lambda p, f=f: value(p, f), has_aux=True) for f in (weighted_sum, plain))
    wanted = jax.jit(goal)(params)
    for found in ((jax.jit(lambda p: value(p, weighted_sum))(params), wanted[1]), jax.jit(ours)(params)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), found, wanted)
    # A frozen parameter of the same function costs no gradient.
    frozen = {n: a for n, a in params.items() if n != "u"}
    fewer = jax.make_jaxpr(jax.grad(lambda p, u: value({**p, "u": u}, weighted_sum)[0]))(frozen, params["u"])
    assert str(fewer).count("dot_general") < str(jax.make_jaxpr(ours)(params)).count("dot_general")


def test_relations_without_an_image_itself_and_token_wise_text():
    """The losses over pairs themselves are compared with PyTorch in tests/parity."""
    rng, left_out = np.random.default_rng(0), np.eye(5, dtype=bool)
    x, t = (e / np.linalg.norm(e, axis=1, keepdims=True) for e in (rng.normal(size=(5, n)) for n in (4, 7)))
    p, q = (np.where(left_out, 0, np.exp(e @ e.T / 0.3)) for e in (t, x))
    p, q = (a / a.sum(axis=1, keepdims=True) for a in (p, q))
    want = (p * np.log(np.where(left_out, 1, p / np.where(left_out, 1, q)))).sum() / 5
    assert float(pairs.relation(jnp.asarray(x), jnp.asarray(t), 0.3, False)) == pytest.approx(want, rel=1e-4)
    tokens = Features(jnp.arange(8.0)[None, :, None], jnp.full((1, 1), 9.0))
    assert diva.select_tokens(tokens, "runs:3").ravel().tolist() == [9, 1, 4]  # The last two are left out.
    diva.check_fit("random:76", "token", 256, 77)
    refused("select=random:76", diva.check_fit, "all", "token", 256, 77)


@pytest.mark.parametrize("beta", [9.0, 300.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_posterior_is_the_softmax_over_the_texts_that_are_there(seed, beta):
    """The weight is that of the best text against the neutral one; 1 without a neutral text, 0 with fewer than two."""
    rng = np.random.default_rng(seed)
    errors, present = rng.uniform(0.5, 1.5, (40, 6)), rng.random((40, 6)) < 0.7
    errors[0], errors[1:3, -1], present[:3], present[3, :5] = 1.0, (0.0, 2.0), True, False
    found, weights = judge.posterior(jnp.where(present, errors, jnp.nan), jnp.asarray(present), beta)
    assert np.isfinite(found).all() and np.isfinite(weights).all()
    for shares, weight, error, there in zip(np.asarray(found), weights, errors, present, strict=True):
        texts, neutral = np.flatnonzero(there[:5]), np.exp(-beta * (error[5] - 1)) * there[5]
        likely = np.exp(-beta * (error[texts] - 1))
        if len(texts):
            np.testing.assert_allclose(shares[texts], likely / likely.sum(), rtol=1e-3, atol=1e-6)
            assert shares.sum() == pytest.approx(1)
        want = likely.max() / (likely.max() + neutral) if len(texts) > 1 else 0
        assert float(weight) == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_a_shuffled_verdict_has_the_same_values_and_says_nothing():
    present = np.ones((7, 5), bool)
    present[0, 1] = False
    found = jnp.where(present, np.random.default_rng(0).random((7, 5)), 0)
    found = found / found.sum(axis=1, keepdims=True)
    keys = jax.random.split(jax.random.key(1), 500)
    many = jax.vmap(lambda k: judge.shuffled(found, present, jax.random.split(k, 7)))(keys)
    np.testing.assert_array_equal(np.sort(many, axis=-1), np.broadcast_to(np.sort(found, axis=-1), many.shape))
    assert (many[:, 0, 1] == 0).all()
    mean = np.asarray(many.mean(axis=0))
    np.testing.assert_allclose(mean[present], (present / present.sum(axis=1, keepdims=True))[present], atol=0.08)
