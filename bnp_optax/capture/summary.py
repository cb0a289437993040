"""`summarize`: every kernel of a loss, covered or not, as a table."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from bnp_optax._tree import BIAS, KERNEL, is_named, named_leaves
from bnp_optax.capture import covered
from bnp_optax.capture.api import options_of
from bnp_optax.capture.moments import ConvStatistics
from bnp_optax.statistics import Layer, Shape


@dataclasses.dataclass(frozen=True)
class Summary:
    """Every kernel of a loss: the covered ones, and why the others are not. `print` it.

    Attributes:
      layers: The covered layers by kernel name.
      uncovered: Reason by leaf name, for the other kernels.
      shapes: Shape by leaf name, of all of these.
      batch_sizes: N by the name of a covered kernel: examples x calls.
    """

    layers: dict[str, Layer]
    uncovered: dict[str, str]
    shapes: dict[str, Shape]
    batch_sizes: dict[str, float]

    def __str__(self) -> str:
        """A table with a row for each kernel."""
        header = ("kernel", "layer", "shape", "fan-in", "positions", "q²", "bias", "covered")
        rows: list[tuple[str, ...]] = [header]
        for name, shape in self.shapes.items():
            text = "x".join(map(str, shape))
            layer = self.layers.get(name)
            if layer is None:
                rows.append((name, "", text, "", "", "", "", f"no: {self.uncovered[name]}"))
            else:
                facts = (str(layer.fan_in), str(layer.positions), f"{self.q_squared(name):.4g}")
                rows.append((name, layer.kind, text, *facts, "yes" if layer.bias else "no", "yes"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        n_entries = sum(math.prod(shape) for shape in self.shapes.values())
        n_covered = sum(math.prod(self.shapes[name]) for name in self.layers)
        share = 100 * n_covered / n_entries if n_entries else 0.0
        lines.append(
            f"{len(self.layers)} of {len(self.shapes)} kernels covered, "
            f"{share:.1f}% of their {n_entries:,} entries."
        )
        return "\n".join(lines)

    def q_squared(self, name: str) -> float:
        """q^2 = max(fan_in / N, sqrt(positions)) of Alg. 2 and 3."""
        layer, batch_size = self.layers[name], self.batch_sizes[name]
        if not batch_size:
            return 1.0
        return max(layer.fan_in / batch_size, math.sqrt(layer.positions))


def summarize(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    conv_statistics: ConvStatistics = "channel",
    embeddings: bool = False,
    **kwargs: Any,
) -> Summary:
    """What is preconditioned and what is not, and why: print the result.

    Lists every floating-point leaf that a product takes or may take, and every one named `kernel`;
    not biases, norm scales, class tokens or position tables, which meet no inputs in a product.

    Args:
      loss_fn: As for `find_layers`.
      params: As for `find_layers`.
      *args: Further arguments of the loss.
      conv_statistics: As in `value_and_grad`.
      embeddings: As in `value_and_grad`.
      **kwargs: Further keyword arguments of the loss.

    Returns:
      A `Summary`.

    Raises:
      ValueError: If a leaf of `params` is no array, or an option is not one of those above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flax.linen as nn
      >>> import bnp_optax
      >>> model, x = nn.Sequential([nn.Embed(9, 4), nn.Dense(2)]), jnp.ones((8,), jnp.int32)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> loss_fn = lambda p: jnp.mean(model.apply({"params": p}, x) ** 2)
      >>> summary = bnp_optax.summarize(loss_fn, params)
      >>> print(summary)  # doctest: +ELLIPSIS
      kernel              layer  shape  fan-in  positions  q²  bias  covered
      ------------------  -----  -----  ------  ---------  --  ----  ---...
      layers_0/embedding         9x4                                 no: it is an embedding: ...
      layers_1/kernel     Dense  4x2    4       1          1   yes   yes
      1 of 2 kernels covered, 18.2% of their 44 entries.
    """
    options = options_of(conv_statistics, None, embeddings)
    found = covered.find(loss_fn, params, args, kwargs, options)
    layers = {name: kernel.layer for name, kernel in found.kernels.items()}
    biases = {layer.bias for layer in layers.values()}

    def is_listed(name: str, shape: Shape) -> bool:
        if name in layers or is_named(name, KERNEL):
            return True
        is_bias = name in biases or is_named(name, BIAS)
        return len(shape) >= 2 and not is_bias and name not in found.others

    every = {name: tuple(leaf.shape) for name, leaf in named_leaves(params).items()}
    shapes = {name: shape for name, shape in every.items() if is_listed(name, shape)}
    return Summary(
        layers=layers,
        uncovered={name: found.reasons[name] for name in shapes if name not in layers},
        shapes=shapes,
        batch_sizes={n: k.count / k.layer.positions for n, k in found.kernels.items()},
    )
