"""Pytrees by their type, which ``jax.tree.map`` forgets."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

Tree = TypeVar("Tree")


def map_leaves(function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """``jax.tree.map`` of trees of one type: the result is of this type too."""
    mapped: Tree = jax.tree.map(function, tree, *others)
    return mapped
