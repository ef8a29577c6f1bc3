"""The examples of one device, and their PRNG keys."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """One device's examples; ``indices`` are their positions in the global batch of batch_size."""

    x_0: Float[Array, "batch ..."]
    label: Int[Array, " batch"] | None
    indices: Int[Array, " batch"]
    batch_size: int  # static

    def tree_flatten(self) -> tuple[tuple[Any, ...], int]:
        """The leaves, and the batch size as static data."""
        return (self.x_0, self.label, self.indices), self.batch_size

    @classmethod
    def tree_unflatten(cls, batch_size: int, leaves: tuple[Any, ...]) -> "Examples":
        """Rebuild without ``__init__``, which checks shapes: jax also passes placeholder leaves."""
        examples = object.__new__(cls)
        names = ("x_0", "label", "indices", "batch_size")
        vars(examples).update(zip(names, (*leaves, batch_size)))
        return examples


class ExampleKeys(NamedTuple):
    """The PRNG keys of a training step: ``common`` for the whole batch, the others per example."""

    common: Key[Array, ""]
    first: Key[Array, " batch"]  # first and second: for the two draws of an objective
    second: Key[Array, " batch"]
    dropout: Key[Array, " batch"]
    label: Key[Array, " batch"]


def example_keys(key: Key[Array, ""], indices: Int[Array, " batch"]) -> ExampleKeys:
    """The PRNG keys of a step, functions of the step's key and of the global indices alone."""
    common, of_examples = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(of_examples, indices)
    first, second, dropout = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    # fold_in, not a fourth split: label dropout must not change the other three keys
    label = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
    return ExampleKeys(common, first, second, dropout, label)
