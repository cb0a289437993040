"""Names of leaves: boxes leave no trace, and no two leaves share a name."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from bnp_optax._tree import named_leaves, replace_leaves


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("policy", "value"), meta_fields=()
)
@dataclasses.dataclass
class Heads:
    """A dataclass with a field `value` that is no box."""

    policy: Any
    value: Any


def test_boxes_leave_no_trace():
    state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    assert list(named_leaves(state)) == list(named_leaves(nnx.to_pure_dict(state)))
    assert set(named_leaves(state)) == {"kernel", "bias"}


@pytest.mark.parametrize("policy", [1.0, {"a": 1.0, "b": 2.0}, None, optax.MaskedNode()])
def test_a_field_called_value_beside_others_keeps_its_name(policy):
    tree = {"h": Heads(policy, 3.0)}
    assert named_leaves(tree)["h/value"] == 3.0
    assert replace_leaves(tree, {"h/value": 4.0, "h": 5.0})["h"] == Heads(policy, 4.0)


def test_leaves_are_replaced_by_name_and_masks_stay():
    tree = {"a": jnp.ones(2), "b": optax.MaskedNode(), "c": None, "d": [1.0, 2.0]}
    new = replace_leaves(tree, {"a": 0.0, "d/1": 3.0})
    assert new == {"a": 0.0, "b": optax.MaskedNode(), "c": None, "d": [1.0, 3.0]}


def test_two_leaves_of_one_name():
    tree = {"h": Heads(1.0, 2.0), "h/policy": 3.0}
    for function in (named_leaves, lambda tree: replace_leaves(tree, {})):
        with pytest.raises(ValueError, match="Two leaves of the tree are called `h/policy`"):
            function(tree)
