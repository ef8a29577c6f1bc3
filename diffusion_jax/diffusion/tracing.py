"""Values that jax traces: they stand for numbers which are not known yet."""

import jax


def is_known(*values: object) -> bool:
    """Whether all values are known numbers; those that jit, vmap or grad trace are not."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
