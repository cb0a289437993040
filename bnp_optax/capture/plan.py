"""What is known of a jaxpr: the measurements to make in it, for which parameters."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from bnp_optax.capture.reading import Reading
from bnp_optax.capture.views import Axes, Piece, View


@dataclasses.dataclass(eq=False)
class Use:
    """One measurement of the inputs that a parameter meets, as seen from one jaxpr.

    Attributes:
      piece: The parameter, as an input of this jaxpr, and how statistics get to its layout.
      eqn: Index of the equation that measures, a product or a call.
      inner: The same measurement seen from inside of the call; None for a product.
      branch: Index of the branch of a `cond` that it is in, else 0.
      input_axes: Axes of the parameter that are summed over.
      stacked_axes: Axes of the parameter along which layers are stacked.
      positions: Output positions that share the parameter.
      count: Batch size x positions of one call.
      kind: `'Dense'` or `'Conv'`.
      measure: Makes the reading of a product, given its inputs.
      inputs: The variable that holds these inputs.
      depends: Whether the inputs depend on parameters.
      name: Of the parameter, for messages.
      biases: Parameters added to the product, with pairs (bias axis, parameter axis).
    """

    piece: Piece
    eqn: int
    inner: "Use | None"
    branch: int
    input_axes: frozenset[int]
    stacked_axes: frozenset[int]
    positions: int
    count: int
    kind: str
    measure: Callable[[Any], Reading] | None = None
    inputs: Any = None
    depends: bool = True
    name: str = ""
    biases: "list[Bias]" = dataclasses.field(default_factory=list)

    @property
    def root(self) -> int:
        """The parameter's index among the inputs of the jaxpr."""
        return self.piece.root


@dataclasses.dataclass(frozen=True)
class Bias:
    """A parameter added to a product: its index and pairs (its axis, axis of the kernel)."""

    root: int
    pairs: frozenset[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Product:
    """A result of products: for each measurement, the kernel's axes along the result's axes."""

    entries: tuple[tuple[Use, Axes], ...]


@dataclasses.dataclass
class Plan:
    """What is known of a jaxpr.

    Attributes:
      jaxpr: The jaxpr.
      consts: Values of its constants.
      uses: The measurements in it.
      calls: Plans of the functions that it calls, by the equation's index.
      altered: For an input, what changed it before a product took it.
      consumers: For an input, the primitives that took it and are neither products nor views.
      out_views: The outputs that are views of inputs.
      out_products: The outputs that are results of products.
    """

    jaxpr: Any
    consts: Sequence[Any]
    uses: list[Use] = dataclasses.field(default_factory=list)
    calls: "dict[int, list[Plan]]" = dataclasses.field(default_factory=dict)
    altered: dict[int, dict[str, None]] = dataclasses.field(default_factory=dict)
    consumers: dict[int, dict[str, None]] = dataclasses.field(default_factory=dict)
    out_views: list[View | None] = dataclasses.field(default_factory=list)
    out_products: list[Product | None] = dataclasses.field(default_factory=list)


def innermost(use: Use) -> Use:
    """The measurement as the jaxpr sees it that holds the product."""
    while use.inner is not None:
        use = use.inner
    return use
