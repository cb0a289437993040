"""The small arrays of many layers in a few operations: layers of one shape at once."""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any


def at_once(
    function: Callable[[Tree, Tree], tuple[Tree, Tree]], trees: Sequence[Tree], vectors: Tree
) -> tuple[list[Tree], Tree]:
    """`function` of every layer's arrays and numbers; of layers that are alike it is one call.

    A network has many layers and few shapes. A step that looks at each layer's statistics starts
    tens of tiny kernels a layer; stacked, they are as many for all layers of one shape.

    Args:
      function: Takes a tree of arrays and a tree of scalars, and returns two such trees. It is
        vectorized by `jax.vmap`.
      trees: For each layer, a tree of arrays. Those of equal structures and types are stacked.
      vectors: A tree of vectors with an entry for each layer.

    Returns:
      For each layer the first of the function's results; and the second, as vectors.
    """
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for i, tree in enumerate(trees):
        leaves, treedef = jax.tree.flatten(tree)
        groups[treedef, tuple(map(jax.typeof, leaves))].append(i)
    if not trees:
        return [], vectors
    results: list[Tree] = [None] * len(trees)
    entries = []
    for group in groups.values():
        members = [trees[i] for i in group]
        whole = len(groups) == 1
        numbers = vectors if whole else jax.tree.map(lambda v, g=group: v[np.array(g)], vectors)
        if len(group) == 1:
            numbers = jax.tree.map(lambda v: v.reshape(()), numbers)
            results[group[0]], new = function(members[0], numbers)
            entries.append(jax.tree.map(lambda x: jnp.reshape(x, 1), new))
            continue
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *members)
        outs, new = jax.vmap(function)(stacked, numbers)
        entries.append(new)
        leaves, treedef = jax.tree.flatten(outs)
        parts = zip(*map(jnp.unstack, leaves), strict=True)
        for i, part in zip(group, parts, strict=True):
            results[i] = treedef.unflatten(part)
    if len(entries) == 1:
        return results, entries[0]
    order = np.argsort(np.concatenate(list(groups.values())))
    return results, jax.tree.map(lambda *parts: jnp.concatenate(parts)[order], *entries)
