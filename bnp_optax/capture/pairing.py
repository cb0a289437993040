"""Axes and views seen from inside and outside of a call, and which bias goes with which kernel."""

import dataclasses
import itertools
from collections.abc import Sequence

from bnp_optax.capture.plan import Bias, Product
from bnp_optax.capture.views import Piece, View


def add_bias(product: Product, bias: View) -> None:
    """Note that a view is added to the result of a product."""
    if bias.altered or len(bias.pieces) != len(product.entries):
        return
    for (use, axes), piece in zip(product.entries, bias.pieces, strict=True):
        pairs: set[tuple[int, int]] = set()
        # A scalar is added without axes of its own.
        along = zip(piece.axes, axes if piece.axes else (), strict=True)
        for theirs, run in itertools.groupby(along, key=lambda pair: pair[1]):
            # Merged axes of the kernel, taken apart again, run along several of the result's.
            ours = frozenset().union(*(axis for axis, _ in run))
            pairs.update(paired(ours, theirs))
        use.biases.append(Bias(piece.root, frozenset(pairs | paired_cuts(piece, use.piece))))


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


def partners(view: View | None, position: int, n_pieces: int) -> list[Piece]:
    """The piece of a bias that belongs to the kernel's piece at `position`."""
    if view is None or view.altered or len(view.pieces) != n_pieces:
        return []
    return [view.pieces[position]]


def outside(axes: frozenset[int], piece: Piece) -> frozenset[int]:
    """Axes of a called function's input as axes of the parameter that `piece` shows."""
    return frozenset().union(*(piece.axes[axis] for axis in axes))


def outside_pairs(
    pairs: frozenset[tuple[int, int]], kernel: Piece, bias: Piece
) -> frozenset[tuple[int, int]]:
    """Pairs of axes of a called function's inputs as pairs of axes of the parameters."""
    return frozenset(
        pair
        for ours, theirs in pairs
        for pair in paired(bias.axes[ours], kernel.axes[theirs] if theirs >= 0 else frozenset({-1}))
    )


def compose(view: View, operands: Sequence[View | None]) -> View | None:
    """A view of a called function's input as one of what the input is a view of."""
    pieces: list[Piece] = []
    altered = view.altered
    for inner in view.pieces:
        outer = operands[inner.root]
        if outer is None:
            return None
        altered = altered or outer.altered
        if inner.reads:
            return None
        pieces += [
            Piece(
                piece.root,
                tuple(outside(axes, piece) for axes in inner.axes),
                (*piece.steps, *inner.steps),
                piece.reads,
                piece.cuts | {(k, place) for axis, place in inner.cuts for k in piece.axes[axis]},
            )
            for piece in outer.pieces
        ]
    return View(view.shape, tuple(pieces), altered)


def inside(piece: Piece, scanned: bool) -> Piece:
    """The piece as a function sees it that is scanned over the leading axis, or not."""
    return dataclasses.replace(piece, axes=piece.axes[1:]) if scanned else piece
