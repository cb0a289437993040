"""What is known of a traced function: which inputs meet which of its parameters, and where.

A `Use` is one product of inputs with one parameter, as seen from one jaxpr. Seen from the jaxpr
that calls it, the same product is a use of its own: there the parameter may be a slice of a larger
one, and the equation is a call.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bnp_optax.capture.products import Product
from bnp_optax.capture.views import Piece, View

Pairs = frozenset[tuple[int, int]]


class Bias(NamedTuple):
    """A parameter added to a product.

    Attributes:
      root: Its index among the inputs of the jaxpr.
      pairs: Its axes, each with the axis of the kernel that it runs along, or -1 for a misfit.
      scale: What it is multiplied by before it is added, relative to the product.
    """

    root: int
    pairs: Pairs
    scale: float


@dataclasses.dataclass(eq=False)
class Use:
    """One product of inputs with a parameter, as seen from one jaxpr.

    Attributes:
      piece: The parameter, as an input of this jaxpr, and how statistics get to its layout.
      scale: What the parameter's entries are multiplied by before they meet the inputs.
      scaled: The primitive that does so.
      eqn: Index of the equation that multiplies, or that calls what does.
      branch: Index of the branch of a `cond` that it is in, else 0.
      inner: The same use seen from inside of the call; None for a product of this jaxpr.
      product: What multiplies.
      inputs: The variable of the innermost jaxpr that is measured.
      rows_from: The same for rows of second moments, as the product meets them; None if there
        is none.
      rows: Numbers of the inputs' value and of the kernel's: equal for the same rows once more.
      input_axes: Axes of the parameter that are summed over.
      stats_axes: Axes of the parameter along which the statistics vary.
      partial_axes: Axes of the parameter of which the product takes a part of several places.
      group_axes: Of a grouped convolution, the axes of the parameter along its features.
      count: Batch size x positions x calls, as traced.
      varying: In `shard_map`, the mesh axes along which devices hold different inputs.
      depends: Whether the inputs depend on parameters.
      constant: Whether they depend on nothing.
      live: Whether a derivative of the loss reaches the result.
      needed: Whether any output depends on the result, differentiated or not.
      marked: Whether a framework has named the inputs as those of a layer.
      trusted: Whether it vouches that the kernel meets them, however it was quantized.
      name: Of the parameter, for messages.
      biases: Parameters added to the product.
    """

    piece: Piece
    scale: float
    scaled: str | None
    eqn: int
    branch: int
    inner: "Use | None"
    product: Product
    inputs: Any
    rows_from: Any
    varying: frozenset[str]
    rows: tuple[int, int]
    input_axes: frozenset[int]
    stats_axes: frozenset[int]
    partial_axes: frozenset[int]
    group_axes: frozenset[int]
    count: Any
    depends: bool
    constant: bool
    live: bool
    needed: bool
    marked: bool
    trusted: bool
    name: str = ""
    biases: list[Bias] = dataclasses.field(default_factory=list)

    @property
    def root(self) -> int:
        """The parameter's index among the inputs of the jaxpr."""
        return self.piece.root

    @property
    def innermost(self) -> "Use":
        """The use as the jaxpr sees it that holds the product."""
        return self if self.inner is None else self.inner.innermost


class Result(NamedTuple):
    """A result of products.

    Attributes:
      entries: The uses, each with its kernel as the result shows it.
      scale: What the products have been multiplied by since.
    """

    entries: "tuple[tuple[Use | Passed, Piece], ...]"
    scale: float = 1.0


@dataclasses.dataclass(eq=False)
class Passed:
    """A result of products as the function sees it that it is given to, axes as they are.

    Attributes:
      root: Its index among the function's inputs.
      piece: Of no parameter.
      trusted: Whether all the products are.
      biases: Parameters that the function adds, paired with the result's axes.
    """

    root: int
    trusted: bool
    piece: Piece = dataclasses.field(default_factory=lambda: Piece(-1, ()))
    biases: list[Bias] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Trace:
    """What is known of a jaxpr.

    Attributes:
      jaxpr: The jaxpr.
      consts: Values of its constants.
      uses: The products of its parameters.
      calls: The same for the functions that it calls, by the equation's index.
      altered: For an input, what changed its values before a product took it.
      consumers: For an input, the equations that took it and are neither products nor views.
      passed: For an input that is a result of products, that.
      out_views: The outputs that are views of inputs.
      out_results: The outputs that are results of products.
      out_mixed: For each output that is no view, the inputs that are in it beside data.
      out_varying: For each output, the mesh axes along which it varies over devices.
    """

    jaxpr: Any
    consts: Sequence[Any]
    uses: list[Use] = dataclasses.field(default_factory=list)
    calls: "dict[int, list[Trace]]" = dataclasses.field(default_factory=dict)
    altered: dict[int, dict[str, None]] = dataclasses.field(default_factory=dict)
    consumers: dict[int, dict[str, None]] = dataclasses.field(default_factory=dict)
    passed: dict[int, Passed] = dataclasses.field(default_factory=dict)
    out_views: list[View | None] = dataclasses.field(default_factory=list)
    out_results: list[Result | None] = dataclasses.field(default_factory=list)
    out_mixed: list[dict[int, None]] = dataclasses.field(default_factory=list)
    out_varying: list[frozenset[str]] = dataclasses.field(default_factory=list)


def add_bias(result: Result, bias: View) -> None:
    """Note that a view is added to the result of a product."""
    if bias.altered or not _fit(bias, result):
        return
    for (use, kernel), piece in _matched(result, bias):
        # Merged axes of the kernel, taken apart again, run along several of the result's. A scalar
        # is added without axes of its own.
        along: dict[frozenset[int], frozenset[int]] = {}
        for ours, theirs in zip(piece.axes, kernel.axes if piece.axes else (), strict=True):
            along[theirs] = along.get(theirs, frozenset()) | ours
        pairs = {pair for theirs, ours in along.items() for pair in paired(ours, theirs)}
        pairs = alike(pairs | paired_cuts(piece, use.piece), piece, kernel)
        use.biases.append(Bias(piece.root, pairs, bias.scale / result.scale))


def _fit(bias: View, result: Result) -> bool:
    """Whether each product of a result has a part of the bias, or all have the whole."""
    n_parameters = len({use.piece.root for use, _ in result.entries})
    return len(bias.pieces) == len(result.entries) or len(bias.pieces) == n_parameters == 1


def _matched(result: Result, bias: View) -> Any:
    pieces = bias.pieces * (len(result.entries) if len(bias.pieces) == 1 else 1)
    return zip(result.entries, pieces, strict=True)


def add_biases_of_call(passed: Passed, result: Result, operands: Sequence[View | None]) -> None:
    """Make the biases that a function adds to a result those of the products."""
    for bias in passed.biases:
        view = operands[bias.root]
        if view is None or view.altered or not _fit(view, result):
            continue
        for (use, kernel), piece in _matched(result, view):
            pairs = outside_pairs(bias.pairs, kernel, piece) | paired_cuts(piece, use.piece)
            pairs = alike(pairs, piece, kernel)
            use.biases.append(Bias(piece.root, pairs, bias.scale * view.scale / result.scale))


def outside_result(
    result: Result, adopted: dict[Use, list[Use]], given: dict[Passed, Result]
) -> Result | None:
    """A result that a called function returns, as one of what calls it."""
    entries, scale = [], result.scale
    for use, kernel in result.entries:
        if isinstance(use, Passed):
            outer = given[use]
            scale *= outer.scale
            entries += [(of, through(kernel, piece)) for of, piece in outer.entries]
        else:
            entries += [(of, through(kernel, of.piece)) for of in adopted.get(use, [])]
    return Result(tuple(entries), scale) if entries else None


def through(inner: Piece, outer: Piece) -> Piece:
    """A piece of a called function's input as one of the parameter that `outer` shows."""
    return Piece(
        outer.root,
        tuple(outside(axes, outer) for axes in inner.axes),
        (*outer.steps, *inner.steps),
        outer.reads,
        outer.cuts | {(k, place) for axis, place in inner.cuts for k in outer.axes[axis]},
        outer.varying | outside(inner.varying, outer),
        outer.gathered | inner.gathered,
        outer.partial | outside(inner.partial, outer),
        outer.order + tuple((k, done) for axis, done in inner.order for k in outer.axes[axis]),
    )


def alike(pairs: Iterable[tuple[int, int]], bias: Piece, kernel: Piece) -> Pairs:
    """Pairs of axes; a misfit where entries of the bias and of the kernel do not lie alike."""
    return frozenset(
        (ours, theirs if bias.order_along(ours) == kernel.order_along(theirs) else -1)
        for ours, theirs in pairs
    )


def paired(ours: frozenset[int], theirs: frozenset[int]) -> list[tuple[int, int]]:
    """Pairs of axes that run together; merged axes keep their order. -1 marks a misfit."""
    if not ours:
        return []
    if len(ours) != len(theirs):
        return [(axis, -1) for axis in ours]
    return list(zip(sorted(ours), sorted(theirs), strict=True))


def paired_cuts(bias: Piece, kernel: Piece) -> set[tuple[int, int]]:
    """Pairs of axes at whose same place both are taken, as a layer of stacked parameters."""
    return {
        (ours, theirs)
        for (ours, place), (theirs, other) in itertools.product(bias.cuts, kernel.cuts)
        if place == other
    }


def outside(axes: frozenset[int], piece: Piece) -> frozenset[int]:
    """Axes of a called function's input as axes of the parameter that `piece` shows."""
    return frozenset().union(*(piece.axes[axis] for axis in axes))


def outside_pairs(pairs: Pairs, kernel: Piece, bias: Piece) -> Pairs:
    """Pairs of axes of a called function's inputs as pairs of axes of the parameters."""
    return frozenset(
        pair
        for ours, theirs in pairs
        for pair in paired(bias.axes[ours], kernel.axes[theirs] if theirs >= 0 else frozenset({-1}))
    )


def compose(view: View, operands: Sequence[View | None]) -> View | None:
    """A view of a called function's input as one of what the input is a view of."""
    pieces: list[Piece] = []
    altered, scale = view.altered, view.scale
    for inner in view.pieces:
        outer = operands[inner.root]
        if outer is None or inner.reads:
            return None
        altered = altered or outer.altered
        pieces += [through(inner, piece) for piece in outer.pieces]
    scales = {outer.scale for p in view.pieces if (outer := operands[p.root]) is not None}
    if len(scales) != 1:
        return None
    data = view.data or any(outer.data for p in view.pieces if (outer := operands[p.root]))
    scaled = view.scaled or next((o.scaled for o in operands if o is not None and o.scaled), None)
    return View(view.shape, tuple(pieces), altered, scale * scales.pop(), scaled, data)


def inside(piece: Piece, scanned: bool) -> Piece:
    """The piece as a function sees it that is scanned over the leading axis, or not."""
    return dataclasses.replace(piece, axes=piece.axes[1:]) if scanned else piece
