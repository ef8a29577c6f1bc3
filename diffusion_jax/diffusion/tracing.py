"""Traced values of jax, whose numbers are not known while a function is compiled."""

import jax


def is_known(*values: object) -> bool:
    """Whether no value is traced by jit, vmap or grad, so that all numbers are known."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
