"""Names for the leaves of a pytree, the same wherever a library puts its boxes."""

from collections.abc import Iterable
from typing import Any

import jax
import optax
from jax.tree_util import GetAttrKey, KeyPath

KERNEL = "kernel"
BIAS = "bias"


def path_name(path: KeyPath) -> str:
    """Slash-separated name of a leaf, without the `value` that boxed variables append."""
    if len(path) > 1 and isinstance(path[-1], GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def sibling(name: str, leaf: str) -> str:
    """The name of `leaf` in the same parent as the leaf called `name`."""
    parent, slash, _ = name.rpartition("/")
    return f"{parent}{slash}{leaf}"


def is_named(name: str, leaf: str) -> bool:
    """Whether the last part of `name` is `leaf`."""
    return name.rpartition("/")[2] == leaf


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by name, in flattening order."""
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def replace_leaves(tree: Any, new: dict[str, Any]) -> Any:
    """`tree` with the leaves named in `new` replaced."""
    return jax.tree.map_with_path(lambda path, leaf: new.get(path_name(path), leaf), tree)


def absent(names: Iterable[str], tree: Any) -> list[str]:
    """Those of `names` that `tree` has not, nor may have where it is masked or None."""

    def is_hidden(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    nodes = {path_name(p): n for p, n in jax.tree.leaves_with_path(tree, is_leaf=is_hidden)}
    hidden = [part for part, node in nodes.items() if is_hidden(node)]

    def may_be_hidden(name: str) -> bool:
        return any(not part or name.startswith(f"{part}/") for part in hidden)

    return [name for name in names if name not in nodes and not may_be_hidden(name)]


def quoted(names: Iterable[str], limit: int = 8) -> str:
    """Names for an error message, the first few of many."""
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:limit]) or "none"
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
