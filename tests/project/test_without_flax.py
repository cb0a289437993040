"""What works where Flax is not installed, in an interpreter that cannot import it."""

import pathlib
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Flax and what it alone brings.
HIDE = """
import importlib.abc
import sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"flax", "orbax", "treescope"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hidden())
import jax
import jax.numpy as jnp
import optax
import bnp_optax

def step(loss_fn, params, x):
    layers = bnp_optax.find_layers(loss_fn, params, x)
    tx = bnp_optax.bnp_adam(1e-3, layers=layers)
    loss, grads, stats = jax.jit(bnp_optax.value_and_grad(loss_fn))(params, x)
    updates, _ = tx.update(grads, tx.init(params), params, layer_stats=stats)
    after = loss_fn(optax.apply_updates(params, updates), x)
    assert after < loss, (after, loss)
    return layers

x = jax.random.normal(jax.random.key(0), (8, 3)) + 2.0
"""
PROGRAMS = {
    "plain JAX": """
        params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
        layers = step(lambda p, x: jnp.mean((x @ p["w"] + p["b"] - 1.0) ** 2), params, x)
        assert layers["w"].bias == "b"
        """,
    "Equinox": """
        import equinox as eqx
        params, static = eqx.partition(
            eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(1)), eqx.is_inexact_array
        )
        loss = lambda p, x: jnp.mean((jax.vmap(eqx.combine(p, static))(x) - 1.0) ** 2)
        assert len(step(loss, params, x)) == 2
        """,
    "Haiku": """
        import haiku as hk
        net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
        loss = lambda p, x: jnp.mean((net.apply(p, x) - 1.0) ** 2)
        assert len(step(loss, net.init(jax.random.key(1), x), x)) == 2
        """,
    "drop-in, summary, metrics, diagnostics": """
        loss_fn = lambda p, x: jnp.mean((x @ p["kernel"] - 1.0) ** 2)
        params = {"kernel": jnp.ones((3, 2))}
        layers = bnp_optax.find_layers(loss_fn, params, x)
        assert "1 of 1 kernels covered" in str(bnp_optax.summarize(loss_fn, params, x))
        tx = bnp_optax.bnp_sgd(0.1, layers=layers)
        wrapped, params, tx = bnp_optax.drop_in(loss_fn, params, tx, x)
        _, state = tx.update(jax.grad(wrapped)(params, x), tx.init(params), params)
        assert int(bnp_optax.metrics(state)["layers_never_seen"]) == 0
        assert bnp_optax.diagnostics.conditioning(state)["kernel"] > 1.0
        """,
    "errors": """
        message = "needs Flax, of which `flax` is not installed: `pip install 'bnp-optax[flax]'`"
        for use in (lambda: bnp_optax.flax_nnx, lambda: bnp_optax.TrainState):
            try:
                use()
            except ModuleNotFoundError as error:
                assert message in str(error) and error.name == "flax", error
            else:
                raise AssertionError(use)
        """,
}


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("name", PROGRAMS)
def test_runs(name):
    done = run(HIDE + textwrap.dedent(PROGRAMS[name]) + "\nassert 'flax' not in sys.modules\n")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_framework():
    done = run(
        "import sys, bnp_optax\n"
        "print([m for m in ('flax', 'orbax', 'equinox', 'haiku', 'matplotlib', 'matfree')"
        " if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr
