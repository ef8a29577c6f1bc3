"""Whether values are numbers already, or stand for numbers in a function that jax traces."""

import jax


def is_known(*values: object) -> bool:
    """Whether all values can be checked: traced ones (of jit, vmap, grad) have no number yet."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))
