"""Batches that come in parts: short ones at the end of an epoch, microbatches, and scaled losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnp_optax

# ---------------------------------------------------------------------------------------------
# A short batch at the end of an epoch.
# ---------------------------------------------------------------------------------------------

N_INPUTS, BATCH = 256, 64
WIDE = {"kernel": jnp.zeros((N_INPUTS, 2)), "bias": jnp.zeros(2)}


def wide_loss(params, x):
    return jnp.mean((x @ params["kernel"] + params["bias"][None] - 1.0) ** 2)


def epoch(tx, sizes, seed=0):
    """Norms of the updates, and 1 / q^2, after batches of these sizes."""
    rng = np.random.default_rng(seed)
    state, lengths, inv_q_squared = tx.init(WIDE), [], []
    for size in sizes:
        x = rng.normal(size=(size, N_INPUTS)).astype(np.float32)
        _, grads, stats = bnp_optax.value_and_grad(wide_loss)(WIDE, x)
        updates, state = tx.update(grads, state, WIDE, layer_stats=stats)
        lengths.append(float(jnp.linalg.norm(updates["kernel"])))
        inv_q_squared.append(float(bnp_optax.metrics(state)["q/kernel"]) ** -2)
    return lengths, inv_q_squared


@pytest.mark.parametrize("last", [1, 7, 63])
def test_a_short_last_batch_has_the_step_of_a_full_one(last):
    sizes = [BATCH] * 3 + [last] + [BATCH]
    lengths, inv_q_squared = epoch(bnp_optax.bnp_adam(1e-3), sizes)
    assert inv_q_squared == pytest.approx([BATCH / N_INPUTS] * 5, rel=1e-6)
    # Adam's step has the learning rate's length times P, whatever the gradient's size.
    assert 0.7 * lengths[2] < lengths[3] < 1.3 * lengths[2]


def test_q_follows_larger_batches_and_the_batch_size_given():
    _, inv_q_squared = epoch(bnp_optax.bnp_adam(1e-3), [8, 32, 16, 512, 8])
    assert inv_q_squared == pytest.approx([8 / 256, 32 / 256, 32 / 256, 1.0, 1.0], rel=1e-6)
    _, inv_q_squared = epoch(bnp_optax.bnp_adam(1e-3, batch_size=16), [64, 8])
    assert inv_q_squared == pytest.approx([16 / 256] * 2, rel=1e-6)


def test_a_batch_that_does_not_enter_has_no_size():
    tx = bnp_optax.bnp_adam(1e-3)
    state = tx.init(WIDE)
    for size, spoil in ((8, 1.0), (64, np.nan), (4, 1.0)):
        x = jax.random.normal(jax.random.key(size), (size, N_INPUTS)) * spoil
        grads, stats = bnp_optax.value_and_grad(wide_loss)(WIDE, x)[1:]
        _, state = tx.update(grads, state, WIDE, layer_stats=stats)
    logged = bnp_optax.metrics(state)
    assert float(logged["q/kernel"]) ** 2 == pytest.approx(256 / 8, rel=1e-6)
    assert int(logged["batches_rejected"]) == 1
