"""Names for the leaves of a pytree, the same wherever a library puts its boxes."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import optax
from jax.tree_util import GetAttrKey, KeyPath

KERNEL = "kernel"
BIAS = "bias"


def is_hidden(node: Any) -> bool:
    """Whether `node` stands for a leaf that is not there: None, or a mask."""
    return node is None or isinstance(node, optax.MaskedNode)


def path_name(path: KeyPath) -> str:
    """Slash-separated name of a path, without the `value` that boxed variables append."""
    return _joined(path[:-1] if _ends_in_value(path) else path)


def sibling(name: str, leaf: str) -> str:
    """The name of `leaf` in the same parent as the leaf called `name`."""
    parent, slash, _ = name.rpartition("/")
    return f"{parent}{slash}{leaf}"


def is_named(name: str, leaf: str) -> bool:
    """Whether the last part of `name` is `leaf`."""
    return name.rpartition("/")[2] == leaf


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by name, in flattening order.

    A leaf has the same name whether its neighbours are masked or not.

    Raises:
      ValueError: If two leaves have one name, as `{"a": {"b": x}, "a/b": y}`.
    """
    return {name: node for name, node in _named_nodes(tree)[0].items() if not is_hidden(node)}


def replace_leaves(tree: Any, new: dict[str, Any]) -> Any:
    """`tree` with the leaves named in `new` replaced."""
    nodes, treedef = _named_nodes(tree)
    return treedef.unflatten([new.get(name, node) for name, node in nodes.items()])


def mask_leaves(tree: Any) -> Any:
    """`tree` with a mask for each leaf, without the boxes that leaves of a library are in.

    A box may say by what axes of a mesh its value is sharded, which is true of that value only.
    """
    return jax.tree.map(lambda _: optax.MaskedNode(), tree, is_leaf=_is_box)


def absent(names: Iterable[str], tree: Any) -> list[str]:
    """Those of `names` that `tree` has not, nor may have where it is masked or None."""
    nodes = _named_nodes(tree)[0]
    hidden = [part for part, node in nodes.items() if is_hidden(node)]

    def may_be_hidden(name: str) -> bool:
        return any(not part or name.startswith(f"{part}/") for part in hidden)

    return [name for name in names if name not in nodes and not may_be_hidden(name)]


def quoted(names: Iterable[str], limit: int = 8) -> str:
    """Names for an error message, the first few of many."""
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _named_nodes(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves and the hidden nodes of `tree` by name, and its structure with these as leaves."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_hidden)
    sizes: collections.Counter[KeyPath] = collections.Counter()
    if any(_ends_in_value(path) for path, _ in flat):
        sizes.update(path[:i] for path, _ in flat for i in range(1, len(path)))
    # A box holds nothing beside its `value`; a dataclass with more fields is no box.
    names = [
        _joined(path[:-1] if _ends_in_value(path) and sizes[path[:-1]] == 1 else path)
        for path, _ in flat
    ]
    nodes = dict(zip(names, (node for _, node in flat), strict=True))
    if len(nodes) < len(names):
        twice = (name for name, count in collections.Counter(names).items() if count > 1)
        msg = (
            f"Two leaves of the tree are called {quoted(twice)}: keys with slashes and nested keys "
            "make one name. Rename one of the keys."
        )
        raise ValueError(msg)
    return nodes, treedef


def _is_box(node: Any) -> bool:
    """Whether `node` holds nothing but its `value`."""
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [path for path, _ in children] == [(GetAttrKey("value"),)]


def _ends_in_value(path: KeyPath) -> bool:
    return len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value"


def _joined(path: KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The JAX arrays of `tree`, and a function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [isinstance(x, jax.Array | jax.ShapeDtypeStruct) for x in leaves]

    def rebuild(arrays: Sequence[Any]) -> Any:
        rest: Iterator[Any] = iter(arrays)
        return treedef.unflatten(
            [next(rest) if array else x for x, array in zip(leaves, is_array, strict=True)]
        )

    return [x for x, array in zip(leaves, is_array, strict=True) if array], rebuild


def is_concrete(*values: Any) -> bool:
    """Whether none of the arrays in `values` is traced."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
