"""Linen models to capture, and their inputs recorded by Flax."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(1)
ROWS = jnp.asarray(RANDOM.normal(2.0, 3.0, (6, 8)))
IMAGES = jnp.asarray(RANDOM.normal(1.0, 1.0, (2, 8, 8, 4)))
VOLUMES = jnp.asarray(RANDOM.normal(0.0, 1.0, (2, 4, 5, 6, 3)))
SEQUENCES = jnp.asarray(RANDOM.normal(-1.0, 1.0, (3, 5, 8)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Dense(16, name="up")(x)
        return x + nn.Dense(8, use_bias=False, name="down")(nn.relu(y)), None


class Stacked(nn.Module):
    remat: bool = False
    unroll: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        if self.unroll:
            for i in range(3):
                x, _ = block(name=f"block_{i}")(x)
            return x
        scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scanned(name="blocks")(x, None)[0]


class TwoLevels(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = functools.partial(
            nn.scan, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return scan(scan(Block))(name="blocks")(x, None)[0]


class Shared(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(8, name="shared")
        return dense(nn.relu(dense(x)))


class SharedUnequal(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(8, name="shared")
        return dense(x[:2]).sum() + dense(x[2:] * 5).sum()


class WithSetup(nn.Module):
    def setup(self):
        self.first = nn.Dense(4)
        self.second = nn.Conv(3, (3,))

    def __call__(self, x):
        return self.second(self.first(x))


class SharedScope(nn.Module):
    def setup(self):
        self.dense = nn.Dense(5)
        nn.share_scope(self, self.dense)

    def __call__(self, x):
        return self.dense(x)


class Subclass(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return super().__call__(2 * x)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(x))


class NeverRuns(nn.Module):
    @nn.compact
    def __call__(self, x):
        if self.is_initializing():
            nn.Dense(2, name="idle")(x)
        return nn.Dense(3, name="busy")(x)


class Reparametrized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.WeightNorm(nn.Dense(4))(x))


class OwnKernel(nn.Module):
    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.ones, (x.shape[-1], 3))
        return nn.Dense(2)(x @ kernel)


def vmapped_dense(axis=0):
    return nn.vmap(
        nn.Dense, variable_axes={"params": axis}, split_rngs={"params": True}, in_axes=0
    )(5, name="ensemble")


MODELS = {
    "dense": (nn.Dense(3), ROWS),
    "dense without bias": (nn.Dense(3, use_bias=False), ROWS),
    "dense on sequences": (nn.Dense(3), SEQUENCES),
    "dense on a single example": (nn.Dense(3), ROWS[0]),
    "dense in bfloat16": (nn.Dense(3, dtype=jnp.bfloat16), ROWS),
    "dense on integers": (nn.Dense(3), jnp.arange(12).reshape(3, 4)),
    "subclass of dense": (Subclass(3), ROWS),
    "conv": (nn.Conv(6, (3, 3)), IMAGES),
    "conv, strided": (nn.Conv(6, (3, 3), strides=2), IMAGES),
    "conv, dilated": (nn.Conv(6, (3, 3), kernel_dilation=2), IMAGES),
    "conv, valid": (nn.Conv(6, (3, 3), padding="VALID"), IMAGES),
    "conv, circular": (nn.Conv(6, (3, 3), padding="CIRCULAR"), IMAGES),
    "conv, grouped": (nn.Conv(8, (3, 3), feature_group_count=2), IMAGES),
    "conv, depthwise": (nn.Conv(8, (3, 3), feature_group_count=4), IMAGES),
    "conv without bias": (nn.Conv(6, (3, 3), use_bias=False), IMAGES),
    "conv, no batch axis": (nn.Conv(6, (3, 3)), IMAGES[0]),
    "conv, two batch axes": (nn.Conv(6, (3,)), IMAGES),
    "conv 1-D": (nn.Conv(6, (3,)), SEQUENCES),
    "conv 1-D, causal": (nn.Conv(6, 3, padding="CAUSAL"), SEQUENCES),
    "conv 3-D": (nn.Conv(6, (3, 3, 3)), VOLUMES),
    "conv transpose": (nn.ConvTranspose(6, (3, 3), strides=(2, 2)), IMAGES),
    "conv transpose, kernel transposed": (
        nn.ConvTranspose(6, (3, 3), transpose_kernel=True),
        IMAGES,
    ),
    "dense general, two axes": (nn.DenseGeneral((2, 3), axis=(-2, -1)), SEQUENCES),
    "dense general, axes out of order": (nn.DenseGeneral(3, axis=(-1, 1)), SEQUENCES),
    "dense general, batch axis": (nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), SEQUENCES),
    "einsum": (nn.Einsum((8, 2, 3), "...d,dhk->...hk"), SEQUENCES),
    "einsum with a batch index": (nn.Einsum((5, 8, 3), "btd,tdf->btf"), SEQUENCES),
    "attention": (nn.MultiHeadDotProductAttention(num_heads=2), SEQUENCES),
    "simple cell": (nn.RNN(nn.SimpleCell(7)), SEQUENCES),
    "GRU": (nn.RNN(nn.GRUCell(7)), SEQUENCES),
    "LSTM": (nn.RNN(nn.LSTMCell(7)), SEQUENCES),
    "optimized LSTM": (nn.RNN(nn.OptimizedLSTMCell(7)), SEQUENCES),
    "convolutional LSTM": (nn.RNN(nn.ConvLSTMCell(4, (3, 3))), jnp.stack([IMAGES] * 3, 1)),
    "scan over layers": (Stacked(), ROWS),
    "scan over layers with remat": (Stacked(remat=True), ROWS),
    "layers in a loop": (Stacked(unroll=True), ROWS),
    "layers in a loop with remat": (Stacked(remat=True, unroll=True), ROWS),
    "scan in scan": (TwoLevels(), ROWS),
    "vmap over parameters": (vmapped_dense(), SEQUENCES),
    "shared module": (Shared(), ROWS),
    "shared module on batches of two sizes": (SharedUnequal(), ROWS),
    "setup": (WithSetup(), SEQUENCES),
    "share_scope": (SharedScope(), ROWS),
    "batch norm and dropout": (Normalized(), ROWS),
}


def make_loss(model, x):
    """Parameters and a loss with aux, dropout and mutable state."""
    variables = model.init({"params": KEY, "dropout": KEY}, x)
    params = variables.pop("params")

    def loss_fn(params, x):
        outputs = model.apply(
            {"params": params, **variables},
            x,
            rngs={"dropout": KEY},
            mutable=list(variables) or False,
        )
        out, state = outputs if variables else (outputs, {})
        leaves = [jnp.sin(leaf.astype(jnp.float32)).sum() for leaf in jax.tree.leaves(out)]
        return sum(leaves), state

    return params, loss_fn


def recorded_inputs(loss_fn, params, x):
    """Inputs of every module call, by module path, with loops over layers unrolled by Flax."""
    calls = {}

    def record(next_fun, args, kwargs, context):
        if context.method_name == "__call__" and args:
            calls.setdefault("/".join(context.module.path), []).append(args[0])
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        loss_fn(params, x)
    return calls
