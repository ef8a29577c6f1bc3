"""A Flax module as two pure functions of its parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key


def pure(create: Callable[[], nnx.Module]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """init(key) -> params, nested dicts of arrays, and apply(params, *inputs); allocates nothing.

    Kernels must be built holding the half-width of their uniform distribution (``mlp.glorot``):
    all are drawn at once, for a draw for each layer would take the compiler ten times as long.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(create))

    @jax.jit
    def init(key: Key[Array, ""]) -> dict[str, Any]:
        built = nnx.to_pure_dict(nnx.state(create(), nnx.Param))
        built = _rename(built, str)  # checkpoints would make strings of a list's integers
        flat, unravel = ravel_pytree(built)
        draws = unravel(jax.random.uniform(key, flat.shape, minval=-1, maxval=1))
        return jax.tree.map(lambda leaf, u: leaf * u if leaf.ndim > 1 else leaf, built, draws)

    def apply(params: Mapping[str, Any], *inputs: Any) -> Any:
        return nnx.merge(graphdef, _rename(params, _number))(*inputs)

    return init, apply


def _rename(tree: Mapping[Any, Any], rename: Callable[[Any], Any]) -> dict[Any, Any]:
    return {
        rename(key): _rename(value, rename) if isinstance(value, Mapping) else value
        for key, value in tree.items()
    }


def _number(key: str) -> int | str:
    return int(key) if key.isdigit() else key
