"""The examples of one device, and the keys of their random numbers."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int, Key


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
    """Examples of one device. ``indices`` are their positions in the global batch of batch_size."""

    x_0: Float[Array, "batch ..."]
    label: Int[Array, " batch"] | None
    indices: Int[Array, " batch"]
    batch_size: int  # static

    def tree_flatten(self) -> tuple[tuple[Any, ...], int]:
        """The leaves, and the static batch size."""
        return (self.x_0, self.label, self.indices), self.batch_size

    @classmethod
    def tree_unflatten(cls, batch_size: int, leaves: tuple[Any, ...]) -> "Examples":
        """Without ``__init__``, whose shapes are checked: jax also has placeholders for leaves."""
        examples = object.__new__(cls)
        names = ("x_0", "label", "indices", "batch_size")
        vars(examples).update(zip(names, (*leaves, batch_size)))
        return examples


class ExampleKeys(NamedTuple):
    """The keys of a step: one ``common`` to the batch, and of each other kind one per example."""

    common: Key[Array, ""]
    first: Key[Array, " batch"]  # for what the objective draws
    second: Key[Array, " batch"]
    dropout: Key[Array, " batch"]
    label: Key[Array, " batch"]


def example_keys(key: Key[Array, ""], indices: Int[Array, " batch"]) -> ExampleKeys:
    """The keys of a step, which depend on its key and on the indices alone."""
    common, of_examples = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(of_examples, indices)
    first, second, dropout = jax.vmap(lambda k: jax.random.split(k, 3))(keys).T
    # a fourth child, so that dropping labels leaves the other three as they are
    label = jax.vmap(jax.random.fold_in, (0, None))(keys, 3)
    return ExampleKeys(common, first, second, dropout, label)
