"""`orthogonalize` against Optax's Muon, and against singular vectors in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers
from support.quick_jit import jit
from support.whiten_cases import CASES, draw

import bnp_optax
from bnp_optax import orthogonalize

SHAPES = [(8, 8), (4, 40), (40, 4), (12, 16), (1, 5), (7, 1)]


def assert_trees(got, want, tolerance):
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale), got, want
    )


def run(tx, params, n_steps=3):
    """The updates of some steps."""
    state, found = tx.init(params), []
    for step in range(n_steps):
        leaves, treedef = jax.tree.flatten(params)
        grads = treedef.unflatten([draw(10 * step + i, *p.shape) for i, p in enumerate(leaves)])
        updates, state = jit(tx.update)(grads, state, params)
        found.append(updates)
    return found


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("rms", [None, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_muon(shape, rms, nesterov):
    """Kernels and what is none; the small side's iteration and the large one's."""
    params = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
    ours = optax.chain(orthogonalize(rms=rms, nesterov=nesterov), optax.scale_by_learning_rate(0.1))
    theirs = optax.contrib.muon(0.1, consistent_rms=rms, nesterov=nesterov)
    assert_trees(run(ours, params), run(theirs, params), 2e-4)


def muon(**options):
    numbers = {"kernel": MuonDimensionNumbers()}
    return optax.contrib.scale_by_muon(weight_dimension_numbers=numbers, **options)


def test_it_is_scale_by_muon():
    params = {"kernel": jnp.zeros((6, 5))}
    ours = run(orthogonalize(rms=None, momentum=0.8, n_steps=3), params)
    theirs = run(muon(beta=0.8, ns_steps=3), params)
    assert_trees(ours, theirs, 2e-4)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("attention", MuonDimensionNumbers((0, 1), 2)),
        ("queries", MuonDimensionNumbers(0, (1, 2))),
        ("stacked", MuonDimensionNumbers(1, 2)),
    ],
)
def test_dimensions_are_those_of_the_layers(name, numbers):
    case = CASES[name]
    params = jax.tree.map(jnp.zeros_like, case.params)
    ours = optax.chain(orthogonalize(layers=case.layers()), optax.scale_by_learning_rate(0.1))
    dimensions = {"kernel": numbers, "bias": None}
    theirs = optax.contrib.muon(0.1, consistent_rms=0.2, muon_weight_dimension_numbers=dimensions)
    assert_trees(run(ours, params), run(theirs, params), 2e-4)


@pytest.mark.parametrize("name", CASES)
def test_each_block_has_the_singular_vectors_of_its_momentum(name):
    """And singular values near those of an orthogonal matrix, at Adam's size."""
    case = CASES[name]
    tx = orthogonalize(momentum=0.0, layers=case.layers())
    grads = jax.tree.map(lambda p: draw(5, *p.shape), case.params)
    updates, _ = tx.update(grads, tx.init(case.params))
    got, given = (case.columns(np.asarray(t["kernel"], np.float64)) for t in (updates, grads))
    for x, g in zip(got, given, strict=True):
        left, sizes, right = np.linalg.svd(g, full_matrices=False)
        core = left.T @ x @ right.T
        scale = 0.2 * np.sqrt(max(x.shape))
        clear = sizes > 0.02 * np.linalg.norm(g)
        assert np.abs(core - np.diag(np.diag(core))).max() < 1e-3 * scale
        assert ((0.6 * scale < np.diag(core)) & (np.diag(core) < 1.3 * scale))[clear].all()


def test_entries_are_of_the_size_of_adam_s():
    params = {"kernel": jnp.zeros((64, 32))}
    tx = orthogonalize(momentum=0.0)
    grads = {"kernel": jax.random.normal(jax.random.key(0), (64, 32))}
    updates, _ = tx.update(grads, tx.init(params))
    assert 0.15 < float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2))) * np.sqrt(2) < 0.25


@pytest.mark.parametrize(("n", "m"), [(32, 2048), (64, 512)])
def test_it_costs_less_than_muon_where_a_side_is_small(n, m):
    params = {"kernel": jnp.zeros((n, m))}

    def flops(tx):
        compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile()
        return compiled.cost_analysis()["flops"]

    ratio = flops(orthogonalize()) / flops(muon())
    assert ratio < {32: 0.3, 64: 0.5}[n]


@pytest.mark.parametrize("shape", [(16, 16), (16, 20)])
def test_it_costs_no_more_elsewhere(shape):
    params = {"kernel": jnp.zeros(shape)}

    def flops(tx):
        compiled = jax.jit(tx.update).lower(params, tx.init(params)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(orthogonalize()) < 1.15 * flops(muon())


def test_only_the_layers_given_are_orthogonalized():
    case = CASES["dense"]
    params = {"a": case.params, "head": {"kernel": jnp.zeros((3, 4))}}
    loss_fn = lambda p, x: jnp.mean((case.apply(p["a"], x) @ p["head"]["kernel"]) ** 2)  # noqa: E731
    layers = bnp_optax.find_layers(loss_fn, params, case.batch(0))
    tx = orthogonalize(layers={"a/kernel": layers["a/kernel"]})
    grads = jax.tree.map(lambda p: draw(5, *p.shape), params)
    updates, state = tx.update(grads, tx.init(params))
    adam = optax.scale_by_adam(nesterov=True)
    want, _ = adam.update(grads["head"], adam.init(params["head"]))
    np.testing.assert_allclose(updates["head"]["kernel"], want["kernel"], rtol=1e-6)
    assert isinstance(state.mu["head"]["kernel"], optax.MaskedNode)


def test_bfloat16_updates_from_float32_momentum():
    params = {"kernel": jnp.zeros((4, 3), jnp.bfloat16)}
    tx = orthogonalize()
    updates, state = tx.update({"kernel": draw(0, 4, 3).astype(jnp.bfloat16)}, tx.init(params))
    assert updates["kernel"].dtype == jnp.bfloat16
    assert state.mu["kernel"].dtype == jnp.float32


def test_a_zero_gradient_is_no_step():
    params = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    tx = orthogonalize()
    updates, _ = tx.update(params, tx.init(params))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "`momentum` must lie in [0, 1), got 1.0"),
        ({"n_steps": 0}, "`n_steps` must be an integer > 0"),
        ({"rms": -0.2}, "`rms` must be finite and > 0, got -0.2"),
        ({"coefficients": (1.0, 2.0)}, "`coefficients` must be the three numbers a, b, c"),
        ({"b2": 2.0}, "`b2` must lie in [0, 1), got 2.0"),
        ({"layers": "kernel"}, "`layers` must be a dict of `Layer`"),
    ],
)
def test_options_out_of_their_range(options, message):
    with pytest.raises(ValueError) as caught:
        orthogonalize(**options)
    assert message in str(caught.value)
