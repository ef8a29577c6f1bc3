"""A Flax module as two pure functions of its parameters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.nn.initializers import Initializer
from jaxtyping import Array, Key

DRAWN_AT_ONCE = "drawn_at_once"  # metadata key of parameters with an initialiser of ``uniform``


def uniform(half_width: Callable[..., Array]) -> Initializer:
    """An initialiser of U(-w, w), where ``half_width(key, shape, dtype)`` returns w.

    The parameter gets the value w, and ``pure`` multiplies all such parameters by a single draw of
    U(-1, 1): with one draw per layer, init takes ten times as long to compile. Other initialisers
    work as in Flax, but compile slowly.
    """
    metadata: dict[str, Any] = {DRAWN_AT_ONCE: True}
    return nnx.with_metadata(half_width, **metadata)


def pure(
    create: Callable[[nnx.Rngs], nnx.Module],
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Turn a Flax module into init(key) -> params and apply(params, *inputs).

    params are nested dicts of arrays. Nothing is allocated before init is called. Every initialiser
    of Flax works; those of ``uniform`` compile faster.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: create(nnx.Rngs(0))))

    @jax.jit
    def init(key: Key[Array, ""]) -> dict[str, Any]:
        state = nnx.state(create(nnx.Rngs(key)), nnx.Param)
        is_drawn = jax.tree.map(
            lambda leaf: leaf.get_metadata().get(DRAWN_AT_ONCE, False),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        # String keys, because a checkpoint would turn the integer keys of a list into strings.
        params, is_drawn = (_rename(nnx.to_pure_dict(tree), str) for tree in (state, is_drawn))
        flat, unravel = ravel_pytree(params)
        draws = unravel(jax.random.uniform(key, flat.shape, minval=-1, maxval=1))
        return jax.tree.map(lambda w, u, drawn: w * u if drawn else w, params, draws, is_drawn)

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
