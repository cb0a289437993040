"""How parameters look by the time they meet an input: cast, transposed, reshaped, sliced, joined.

A `View` is an array that holds entries of parameters, and knows how to bring statistics in its own
layout back into theirs. A kernel in PyTorch's layout is an example: in `x @ W.T` the parameter W
has the shape (out, in), and what x meets is the view W.T of shape (in, out), of which axis 0 runs
along W's axis 1 and axis 1 along W's axis 0. The mean of x comes in the layout of the view, as
(in, 1). The view's one step, a transposition, brings it into W's, as (1, in).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bnp_optax.capture.rows import Rows

Shape = tuple[int, ...]
Axes = tuple[frozenset[int], ...]
Read = Callable[[Any], Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Measure:
    """Statistics of inputs, in some layout; all arrays of as many axes, each full or of size 1.

    Attributes:
      mean: Mean of the inputs.
      var: Variance of the inputs.
      rest: What the mean lacks of the true one by rounding.
      count: Number of rows; 0 where nothing was measured.
    """

    mean: Any
    var: Any
    rest: Any
    count: Any

    @property
    def shape(self) -> Shape:
        """The layout."""
        return self.mean.shape

    def map(self, function: Callable[[Any], Any]) -> "Measure":
        """Apply a rearrangement to every array."""
        return jax.tree.map(function, self)


# What is brought from layout to layout.
Part = TypeVar("Part", Measure, Rows)
Step = Callable[[Any, Read], Any]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where a view holds entries of one parameter.

    Attributes:
      root: Index of the parameter among the inputs of a jaxpr.
      axes: For each axis of the view, the axes of the parameter that it runs along.
      steps: What brings a `Measure` in the view's layout into the parameter's, last one first.
      reads: Whether a step reads variables of the jaxpr.
      cuts: Axes of the parameter of which the view holds a single place, each with that place.
      varying: Axes of the parameter along which the steps make statistics vary.
      gathered: Mesh axes that the view was gathered over from the parameter's shards.
      partial: Axes of the parameter of which the view holds a part of several places.
      order: What put entries along the parameter's axes in another order or in other places, or
        left some out, one after the other: each axis with what was done along it.
    """

    root: int
    axes: Axes
    steps: tuple[Step, ...] = ()
    reads: bool = False
    cuts: frozenset[tuple[int, Any]] = frozenset()
    varying: frozenset[int] = frozenset()
    gathered: frozenset[str] = frozenset()
    partial: frozenset[int] = frozenset()
    order: tuple[tuple[int, Any], ...] = ()

    def order_along(self, axis: int) -> tuple[Any, ...]:
        """What was done along an axis of the parameter; equal where entries still lie alike."""
        return tuple(done for of, done in self.order if of == axis)

    def arranged(self, axis: int, *done: Any) -> "Piece":
        """The same with something done along an axis of the view, of those that run alike."""
        ours = self.axes[axis]
        place = sum(bool(axes & ours) for axes in self.axes[:axis])
        order = tuple((of, (place, *done)) for of in sorted(ours))
        return dataclasses.replace(self, order=self.order + order)

    def pull(self, measure: Part, read: Read) -> Part:
        """`measure` in the parameter's layout; `read` gives values of the jaxpr's variables."""
        for step in reversed(self.steps):
            measure = step(measure, read)
        return measure


@dataclasses.dataclass(frozen=True)
class View:
    """An array made of entries of parameters.

    Attributes:
      shape: Of the array.
      pieces: One for each parameter.
      altered: What changed the values on the way, if anything did.
      scale: The number that the entries were multiplied by on the way.
      scaled: What multiplied them, if anything did.
      data: Whether numbers that depend on data were among what changed the values. Then it may
        be a kernel divided by its norm, or as well an activation.
      before: The view that this one is a reshape of, if it is one.
    """

    shape: Shape
    pieces: tuple[Piece, ...]
    altered: str | None = None
    scale: float = 1.0
    scaled: str | None = None
    data: bool = False
    before: "View | None" = None

    def is_filled(self, axis: int) -> bool:
        """Whether entries along `axis` are copies of one another."""
        return not any(piece.axes[axis] for piece in self.pieces) and self.shape[axis] > 1


def root_view(root: int, shape: Shape) -> View:
    """An input of a jaxpr as it comes."""
    return View(shape, (Piece(root, tuple(frozenset({axis}) for axis in range(len(shape)))),))


def _through(
    view: View, shape: Shape, axes: Callable[[Axes], Axes], step: Step, reads: bool = False
) -> View:
    pieces = tuple(
        dataclasses.replace(
            piece, axes=axes(piece.axes), steps=(*piece.steps, step), reads=piece.reads or reads
        )
        for piece in view.pieces
    )
    return dataclasses.replace(view, shape=shape, pieces=pieces, before=None)


def transpose(view: View, permutation: tuple[int, ...]) -> View:
    """The axes in another order."""
    inverse = tuple(int(axis) for axis in np.argsort(permutation))
    new = _through(
        view,
        tuple(view.shape[axis] for axis in permutation),
        lambda axes: tuple(axes[axis] for axis in permutation),
        lambda measure, _: measure.map(lambda x: jnp.transpose(x, inverse)),
    )

    def arranged(old: Piece, new: Piece) -> Piece:
        """Axes that one of the parameter was cut into may have changed places."""
        for of in sorted(frozenset().union(*old.axes)):
            parts = [axis for axis in permutation if of in old.axes[axis] and view.shape[axis] > 1]
            if parts != sorted(parts):
                sizes = tuple(view.shape[axis] for axis in sorted(parts))
                done = ("transpose", sizes, _ranks(parts))
                new = dataclasses.replace(new, order=(*new.order, (of, done)))
        return new

    pairs = zip(view.pieces, new.pieces, strict=True)
    return dataclasses.replace(new, pieces=tuple(arranged(*pair) for pair in pairs))


def _ranks(values: Sequence[Any]) -> tuple[int, ...]:
    return tuple(sorted(values).index(value) for value in values)


def groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Which axes of `old` become which of `new` in a reshape, in the smallest groups."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        ours, theirs = [], []
        n_old = n_new = 1
        while True:
            if n_old == n_new and (ours or theirs):
                break
            if i < len(old) and (n_old < n_new or (n_old == n_new and not ours)):
                n_old *= old[i]
                ours.append(i)
                i += 1
            elif j < len(new):
                n_new *= new[j]
                theirs.append(j)
                j += 1
            else:
                n_old *= old[i]
                ours.append(i)
                i += 1
        result.append((ours, theirs))
    return result


def reshape(view: View, shape: Shape) -> View:
    """The entries in another shape."""
    if 0 in view.shape:
        return dataclasses.replace(view, shape=shape, pieces=())
    if view.before is not None and view.before.shape == shape:
        return view.before
    old = view.shape
    parts = groups(old, shape)

    def axes_of(axes: Axes) -> Axes:
        new: list[frozenset[int]] = [frozenset()] * len(shape)
        for ours, theirs in parts:
            union = frozenset().union(*(axes[i] for i in ours))
            for j in theirs:
                new[j] = union if shape[j] > 1 else frozenset()
        return tuple(new)

    def back(x: jax.Array) -> jax.Array:
        full, final = list(x.shape), list(old)
        for ours, theirs in parts:
            if all(x.shape[j] == 1 for j in theirs):
                for i in ours:
                    final[i] = 1
            else:
                for j in theirs:
                    full[j] = shape[j]
        return jnp.broadcast_to(x, full).reshape(final)

    def arranged(old: Piece, new: Piece) -> Piece:
        """Axes of the parameter that are merged are taken to be in order."""
        for ours, _ in parts:
            merged = list(dict.fromkeys(tuple(sorted(old.axes[i])) for i in ours if old.axes[i]))
            if merged != sorted(merged):
                done = ("merge", _ranks(merged))
                order = tuple((of, done) for axes in merged for of in axes)
                new = dataclasses.replace(new, order=new.order + order)
        return new

    new = _through(view, shape, axes_of, lambda measure, _: measure.map(back))
    pairs = zip(view.pieces, new.pieces, strict=True)
    pieces = tuple(arranged(*pair) for pair in pairs)
    return dataclasses.replace(new, pieces=pieces, before=view)


def broadcast(view: View, shape: Shape, dimensions: tuple[int, ...]) -> View:
    """Axis i as axis `dimensions[i]` of `shape`; the entries repeat along the others."""
    old = view.shape
    copied = tuple(
        axis
        for axis in range(len(shape))
        if axis not in dimensions or old[dimensions.index(axis)] != shape[axis]
    )
    dropped = tuple(axis for axis in range(len(shape)) if axis not in dimensions)

    def axes_of(axes: Axes) -> Axes:
        return tuple(
            frozenset() if axis in copied else axes[dimensions.index(axis)]
            for axis in range(len(shape))
        )

    def step(measure: Any, _: Read) -> Any:
        # A parameter that meets different inputs in its copies has the statistics of them all.
        varying = tuple(axis for axis in copied if measure.shape[axis] > 1)
        if varying:
            measure = average(measure, varying)
        return measure.map(lambda x: jnp.squeeze(x, dropped))

    return _through(view, shape, axes_of, step)


def squeeze(view: View, dimensions: tuple[int, ...]) -> View:
    """Without axes of size 1."""
    kept = [axis for axis in range(len(view.shape)) if axis not in dimensions]
    return _through(
        view,
        tuple(view.shape[axis] for axis in kept),
        lambda axes: tuple(axes[axis] for axis in kept),
        lambda measure, _: measure.map(lambda x: jnp.expand_dims(x, dimensions)),
    )


def reverse(view: View, dimensions: tuple[int, ...]) -> View:
    """Back to front along some axes."""
    new = _through(
        view,
        view.shape,
        lambda axes: axes,
        lambda measure, _: measure.map(lambda x: jnp.flip(x, dimensions)),
    )
    return _arranged(new, dict.fromkeys(dimensions, ("reverse",)))


def _arranged(view: View, done: Mapping[int, tuple[Any, ...]]) -> View:
    """The view with what was done along its axes."""
    pieces = list(view.pieces)
    for axis, what in done.items():
        pieces = [piece.arranged(axis, *what) for piece in pieces]
    return dataclasses.replace(view, pieces=tuple(pieces))


def sliced(
    view: View,
    shape: Shape,
    at: Callable[[Read], Any],
    strides: Shape | None,
    places: tuple[Any, ...],
) -> View:
    """A box of `shape` that starts at `at(read)`; with `strides`, `at` must not read.

    `places` are names for the starts, equal where the starts are known to be equal.
    """
    old = view.shape
    cut = tuple(axis for axis in range(len(shape)) if shape[axis] != old[axis])

    def step(measure: Any, read: Read) -> Any:
        start = at(read)

        def put(x: jax.Array) -> jax.Array:
            def cut_to(size: Shape) -> Shape:
                return tuple(
                    size[axis] if axis in cut else x.shape[axis] for axis in range(len(shape))
                )

            x = jnp.broadcast_to(x, cut_to(shape))
            whole = jnp.zeros(cut_to(old), x.dtype)
            if strides is None:
                # An axis that is not cut, or not full in `x`, starts at 0.
                starts = [start[axis] if axis in cut else 0 for axis in range(len(shape))]
                return jax.lax.dynamic_update_slice(whole, x, starts)
            index = tuple(
                slice(
                    start[axis], start[axis] + (shape[axis] - 1) * strides[axis] + 1, strides[axis]
                )
                if axis in cut
                else slice(None)
                for axis in range(len(shape))
            )
            return whole.at[index].set(x)

        # Where the slice is not, nothing was measured: there `count` is 0.
        return measure.map(put)

    new = _through(view, shape, lambda axes: axes, step, reads=strides is None)
    single = [axis for axis in cut if shape[axis] == 1]
    pieces = tuple(
        dataclasses.replace(
            piece,
            cuts=piece.cuts | {(k, places[axis]) for axis in single for k in piece.axes[axis]},
            varying=piece.varying.union(*(piece.axes[axis] for axis in cut)),
            partial=piece.partial.union(*(piece.axes[a] for a in cut if a not in single)),
        )
        for piece in new.pieces
    )
    steps = strides or (1,) * len(shape)
    done = {axis: ("slice", places[axis], shape[axis], steps[axis]) for axis in cut}
    return _arranged(dataclasses.replace(new, pieces=pieces), done)


def concatenate(operands: list[View], axis: int) -> View | None:
    """Views joined along an axis; None if they were scaled by different numbers."""
    pieces: list[Piece] = []
    offset, total = 0, sum(view.shape[axis] for view in operands)
    for view in operands:
        start, stop = offset, offset + view.shape[axis]

        def cut(measure: Any, _: Read, start: int = start, stop: int = stop) -> Any:
            return measure.map(
                lambda x: (
                    jax.lax.slice_in_dim(x, start, stop, axis=axis) if x.shape[axis] > 1 else x
                )
            )

        new = [dataclasses.replace(p, steps=(*p.steps, cut)) for p in view.pieces]
        # Shards gathered from devices are taken to be joined in the devices' order.
        pieces += [p if p.gathered else p.arranged(axis, "join", start, total) for p in new]
        offset = stop
    if len({view.scale for view in operands}) > 1:
        return None
    joined = list(operands[0].shape)
    joined[axis] = total
    altered = next((view.altered for view in operands if view.altered), None)
    data = any(view.data for view in operands)
    first = operands[0]
    return View(tuple(joined), tuple(pieces), altered, first.scale, first.scaled, data)


def gather(view: View, shape: Shape, mesh_axis: str, axis: int, tiled: bool) -> View:
    """The shards of all devices along a mesh axis, joined along `axis` or stacked on a new one."""
    size = view.shape[axis] if tiled else 1

    def step(measure: Any, _: Read) -> Any:
        # Every device has measured with the whole kernel. The union of what they have found is
        # cut into shards.
        every = measure.map(lambda x: jax.lax.all_gather(x, mesh_axis))
        whole = average(every, (0,)).map(lambda x: jnp.squeeze(x, 0))
        start = jax.lax.axis_index(mesh_axis) * size

        def cut(x: jax.Array) -> jax.Array:
            if x.shape[axis] > 1:
                x = jax.lax.dynamic_slice_in_dim(x, start, size, axis)
            return x if tiled else jnp.squeeze(x, axis)

        return whole.map(cut)

    def axes_of(axes: Axes) -> Axes:
        return axes if tiled else (*axes[:axis], frozenset(), *axes[axis:])

    new = _through(view, shape, axes_of, step)
    pieces = (dataclasses.replace(p, gathered=p.gathered | {mesh_axis}) for p in new.pieces)
    return dataclasses.replace(new, pieces=tuple(pieces))


def average(measure: Part, axes: tuple[int, ...]) -> Part:
    """The statistics of the union over `axes`, which keep their place with size 1.

    The variance of a union is the mean of its parts' variances and squared distances to the
    common mean (Chan's formula). A distance of two rounded means would be wrong by their rounding,
    which is as much as 1e-3 of a deviation where the mean is 1e4 of them: `rest` mends it.
    """
    if isinstance(measure, Rows):
        return measure.average(axes)
    shape = np.broadcast_shapes(measure.mean.shape, measure.count.shape)
    count = jnp.broadcast_to(
        measure.count,
        [shape[i] if i in axes else measure.count.shape[i] for i in range(len(shape))],
    )
    total = jnp.sum(count, axis=axes, keepdims=True)
    weight = count / jnp.where(total > 0.0, total, 1.0)

    def mean_of(x: jax.Array) -> jax.Array:
        return jnp.sum(weight * x, axis=axes, keepdims=True)

    mean = mean_of(measure.mean)
    distance = (measure.mean - mean) + measure.rest
    return Measure(mean, mean_of(measure.var + distance**2), mean_of(distance), total)


def union(measures: list[Measure]) -> Measure:
    """The statistics of several measurements of the same parameter."""
    if len(measures) == 1:
        return measures[0]
    expanded = [measure.map(lambda x: x[None]) for measure in measures]

    def join(*arrays: jax.Array) -> jax.Array:
        shape = np.broadcast_shapes(*(x.shape for x in arrays))
        return jnp.concatenate([jnp.broadcast_to(x, shape) for x in arrays])

    stacked = jax.tree.map(join, *expanded)
    return average(stacked, (0,)).map(functools.partial(jnp.squeeze, axis=0))
