"""Capture for NNX: against `nnx.value_and_grad`, and in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnp_optax
import bnp_optax.flax_nnx

IMAGES = jax.random.normal(jax.random.key(0), (4, 6, 6, 1)) + 2.0
LABELS = jnp.array([0, 1, 2, 1])
ROWS = jax.random.normal(jax.random.key(1), (5, 3)) * 2 + 1


class CNN(nnx.Module):
    """The shape of Flax's MNIST example."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 3, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.25, rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.linear = nnx.Linear(36, 3, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = nnx.relu(self.dropout(self.norm(self.conv1(x)), rngs=rngs))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        return self.linear(x.reshape(x.shape[0], -1))


def loss_fn(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), logits


def assert_equal_trees(one, two, rtol=1e-5):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_loss_gradients_and_state_are_those_of_nnx(jit):
    ours, theirs = CNN(nnx.Rngs(0)), CNN(nnx.Rngs(0))

    def captured(model, x, y):
        (loss, logits), grads, _ = bnp_optax.flax_nnx.value_and_grad(loss_fn, has_aux=True)(
            model, x, y
        )
        return (loss, logits), grads

    plain = nnx.value_and_grad(loss_fn, has_aux=True)
    if jit:
        captured, plain = nnx.jit(captured), nnx.jit(plain)
    for _ in range(2):
        assert_equal_trees(captured(ours, IMAGES, LABELS), plain(theirs, IMAGES, LABELS))
    # Running batch statistics and the counters of the random number streams have moved alike.
    assert_equal_trees(nnx.state(ours), nnx.state(theirs))
    assert (nnx.state(ours, nnx.RngCount)["dropout"]["rngs"]["count"][...] == 2).all()


def test_statistics_are_those_of_what_the_layers_got():
    model = CNN(nnx.Rngs(0))
    model.eval()
    _, _, stats = bnp_optax.flax_nnx.value_and_grad(loss_fn, has_aux=True)(model, IMAGES, LABELS)
    assert sorted(stats) == ["conv1/kernel", "conv2/kernel", "linear/kernel"]
    hidden = nnx.relu(model.norm(model.conv1(IMAGES)))
    pooled = nnx.avg_pool(nnx.relu(model.conv2(hidden)), (2, 2), strides=(2, 2)).reshape(4, -1)
    for name, x in (("conv1", IMAGES), ("conv2", hidden), ("linear", pooled)):
        got = stats[f"{name}/kernel"]
        x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        np.testing.assert_allclose(np.ravel(got.mean), x.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.ravel(got.var), x.var(0), rtol=1e-4, atol=1e-6)
        assert got.layer.bias == f"{name}/bias"
    assert stats["conv2/kernel"].layer.positions == 36
    assert stats["linear/kernel"].count == 4


@pytest.mark.parametrize("tx", [bnp_optax.bnp_sgd(0.3), bnp_optax.bnp_adam(0.01)])
def test_training_with_an_nnx_optimizer(tx):
    model = CNN(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer, x, y):
        (loss, _), grads, stats = bnp_optax.flax_nnx.value_and_grad(loss_fn, has_aux=True)(
            model, x, y
        )
        optimizer.update(model, grads, layer_stats=stats)
        return loss

    losses = [float(train_step(model, optimizer, IMAGES, LABELS)) for _ in range(40)]
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


def test_find_layers_and_summarize():
    model = CNN(nnx.Rngs(0))
    layers = bnp_optax.flax_nnx.find_layers(lambda *a: loss_fn(*a)[0], model, IMAGES, LABELS)
    assert {name: (layer.kind, layer.fan_in) for name, layer in layers.items()} == {
        "conv1/kernel": ("Conv", 9),
        "conv2/kernel": ("Conv", 27),
        "linear/kernel": ("Dense", 36),
    }
    summary = bnp_optax.flax_nnx.summarize(lambda *a: loss_fn(*a)[0], model, IMAGES, LABELS)
    assert summary.layers == layers
    assert "3 of 3 kernels covered" in str(summary)
    chosen = {name: layer for name, layer in layers.items() if layer.kind == "Conv"}
    captured = bnp_optax.flax_nnx.value_and_grad(loss_fn, has_aux=True, layers=chosen)
    assert sorted(captured(model, IMAGES, LABELS)[2]) == sorted(chosen)


def test_random_streams_among_the_arguments_move():
    model, rngs = CNN(nnx.Rngs(0)), nnx.Rngs(dropout=7)

    def with_rngs(model, x, rngs):
        return jnp.mean(model(x, rngs=rngs) ** 2)

    for _ in range(2):
        bnp_optax.flax_nnx.value_and_grad(with_rngs)(model, IMAGES, rngs)
    assert rngs.dropout.count[...] == 2


class Stacked(nnx.Module):
    """Layers made by `nnx.vmap` and run by `nnx.scan`, each under `nnx.remat`."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return nnx.Linear(3, 3, rngs=rngs)

        self.layers = create(rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(layer, x)

        return self.head(forward(x, self.layers))


def test_stacked_layers_keep_their_own_statistics():
    model = Stacked(nnx.Rngs(0))

    @nnx.jit
    def run(model, x):
        return bnp_optax.flax_nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))(model, x)

    _, grads, stats = run(model, ROWS)
    assert_equal_trees(grads, nnx.grad(lambda m, x: jnp.mean(m(x) ** 2))(model, ROWS))
    assert stats["layers/kernel"].mean.shape == (3, 3, 1)
    assert stats["layers/kernel"].layer.bias == "layers/bias"
    x = ROWS
    for i in range(3):
        np.testing.assert_allclose(stats["layers/kernel"].mean[i, :, 0], x.mean(0), rtol=1e-5)
        x = jnp.tanh(x @ model.layers.kernel[i] + model.layers.bias[i][None])
    np.testing.assert_allclose(stats["head/kernel"].mean[:, 0], x.mean(0), rtol=1e-5)


def test_vmapped_and_recurrent_modules():
    lstm = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)))
    sequences = jnp.stack([ROWS, ROWS + 1])
    _, _, stats = bnp_optax.flax_nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))(
        lstm, sequences
    )
    x = np.asarray(sequences, np.float64).reshape(-1, 3)
    (name,) = (name for name, s in stats.items() if s.mean.shape == (3, 1))
    np.testing.assert_allclose(stats[name].mean[:, 0], x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats[name].total_variance[:, 0], x.var(0), rtol=1e-4)
    assert stats[name].count == 10

    linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def by_example(model, x):
        return jnp.mean(nnx.vmap(lambda m, row: m(row), in_axes=(None, 0))(model, x) ** 2)

    _, _, stats = bnp_optax.flax_nnx.value_and_grad(by_example)(linear, ROWS)
    np.testing.assert_allclose(stats["kernel"].mean[:, 0], ROWS.mean(0), rtol=1e-5)
    assert stats["kernel"].layer.bias == "bias"


def test_a_filter_chooses_what_is_differentiated():
    class Head(nnx.Param):
        pass

    model = CNN(nnx.Rngs(0))
    model.linear.kernel = Head(model.linear.kernel[...])
    captured = bnp_optax.flax_nnx.value_and_grad(loss_fn, has_aux=True, wrt=Head)
    _, grads, stats = captured(model, IMAGES, LABELS)
    assert sorted(stats) == ["linear/kernel"]
    assert jax.tree.structure(grads) == jax.tree.structure(nnx.state(model, Head))


def test_a_model_without_a_kernel():
    model = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"multiplies no inputs with a parameter.*`scale`: no"):
        bnp_optax.flax_nnx.value_and_grad(lambda m, x: jnp.mean(m(x) ** 2))(model, ROWS)
