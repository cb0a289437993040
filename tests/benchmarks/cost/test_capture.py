"""What capture and BNP add to a step, as exact figures that must not grow unnoticed."""

import json

import jax
import numpy as np
import pytest

from benchmarks.cost import capture
from benchmarks.cost.capture import METHODS, PLAIN, CaptureConfig, classification, mlp, transformer
from benchmarks.networks.resnet import CifarResNet


@pytest.fixture(autouse=True)
def one_device():
    """Of several, each would measure rows of its own, by more kernels."""
    with jax.set_mesh(jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))):
        yield


@pytest.mark.optimized
@pytest.mark.parametrize(("depths", "most"), [((4, 8), 10), ((8, 16), 8.5)])
@pytest.mark.parametrize("name", ["BNP + SGD", "Adam in z"])
def test_kernels_that_a_layer_adds(name, depths, most):
    pair = METHODS[name], METHODS[PLAIN[name]]
    added = [sum(capture.kernels_per_layer(method, depths=depths).values()) for method in pair]
    assert added[1] < added[0] <= added[1] + most


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("problem", "flops"),
    [
        (mlp(4, 64), 1.03),
        (transformer(2, 64, False), 1.007),
        (classification(CifarResNet(8), (8, 32, 32, 3)), 1.005),
    ],
    ids=["mlp", "transformer", "resnet"],
)
def test_flops_that_capture_adds(problem, flops):
    assert 1.0 < capture.gradient_costs(problem)["flops"] <= flops


def test_arrays_in_the_state_of_a_transformer():
    problem = transformer(24, 64, False)
    ours, adams = (
        len(jax.tree.leaves(jax.eval_shape(METHODS[name].tx.init, problem.params)))
        for name in ("Adam in z", "Adam")
    )
    assert ours <= 1.4 * adams


@pytest.mark.slow
def test_the_whole_benchmark_on_a_small_network(tmp_path, monkeypatch, capsys):
    small = mlp(1, 4)
    for name in ("transformer", "classification", "mlp"):
        monkeypatch.setattr(capture, name, lambda *_, **__: small)
    out = tmp_path / "cost.json"
    capture.main(CaptureConfig(turns=1, compiled_turns=1, steps=1, out=out))
    results = json.loads(out.read_text())["results"]
    assert set(results) == {"gradients", "kernels", "compilation", "steps"}
    for rows in (results["gradients"], results["kernels"], results["compilation"]):
        for row in rows.values():
            numbers = [x for x in row.values() if isinstance(x, int | float)]
            assert np.isfinite(numbers).all()
    assert "ResNet-20" in capsys.readouterr().out
