"""The benchmarks' transformer: what it sees, its initial variance, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.benchmark_network_cases import QUICK, initial

from benchmarks.networks.transformer import CharTransformer
from benchmarks.training import parts
from benchmarks.training.methods import METHODS
from bnp_optax._tree import named_leaves


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_transformer_sees_no_later_characters(norm):
    model = CharTransformer(11, width=8, depth=2, heads=2, context=6, norm=norm)
    tokens = jnp.array(np.random.default_rng(1).integers(0, 11, (3, 5)), jnp.int32)
    variables = initial(model, tokens)
    apply = jax.jit(model.apply, static_argnames="train", compiler_options=QUICK)
    logits = apply(variables, tokens, train=True)
    assert logits.shape == (3, 5, 11)
    assert jnp.all(jnp.isfinite(logits))
    np.testing.assert_array_equal(logits, apply(variables, tokens))
    for t in range(5):
        other = apply(variables, tokens.at[:, t].set((tokens[:, t] + 1) % 11))
        np.testing.assert_array_equal(other[:, :t], logits[:, :t])
        assert np.all(np.abs(other[:, t:] - logits[:, t:]).max((0, 2)) > 1e-6)


def test_unnormalized_stream_keeps_its_variance():
    tokens = jnp.zeros((1, 4), jnp.int32)
    kernels = {}
    for norm in ("none", "layer"):
        model = CharTransformer(11, width=32, depth=2, norm=norm)
        init = jax.jit(model.init, compiler_options=QUICK)
        kernels[norm] = named_leaves(init(jax.random.key(0, impl="rbg"), tokens)["params"])
    for name, kernel in kernels["none"].items():
        ratio = kernel.std() / kernels["layer"][name].std() if kernel.std() > 0 else 1.0
        writes = name in {
            *(f"MultiHeadDotProductAttention_{i}/out/kernel" for i in range(2)),
            *(f"Dense_{2 * i + 1}/kernel" for i in range(2)),
        }
        np.testing.assert_allclose(ratio, 0.5 if writes else 1.0, rtol=0.1)


@pytest.mark.parametrize("norm", ["batch", "group", "renorm", "four"])
def test_transformer_refuses_normalizations_over_tokens(norm):
    model = CharTransformer(11, norm=norm)
    with pytest.raises(ValueError, match=rf"`norm` must be one of .*'layer'.* got '{norm}'"):
        model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def test_transformer_refuses_texts_beyond_its_context():
    model = CharTransformer(11, context=3)
    with pytest.raises(ValueError, match=r"`context` = 3, got length 4"):
        model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


def test_tables_count_as_layers_where_the_method_says_so():
    model = CharTransformer(vocabulary=5, width=8, depth=1, heads=2, context=4)
    x = jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])
    variables = model.init(jax.random.key(0), x)
    tables = {"Embed_0/embedding", "Embed_1/embedding"}
    with_tables = parts.find_layers(model, METHODS["adam_z_embeddings"], variables, x, x)
    without = parts.find_layers(model, METHODS["adam_z"], variables, x, x)
    assert set(with_tables) == {*without, *tables}
    assert tables.isdisjoint(without)
    step = parts.make_step(model, METHODS["adam_z_embeddings"], with_tables)
    carry = parts.init_carry(METHODS["adam_z_embeddings"], with_tables, variables)
    _, loss = step(1e-3, carry, x, x)
    assert jnp.isfinite(loss)
