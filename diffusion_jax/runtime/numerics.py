"""Options of jax that change the results of a run beside its config; they are fixed here."""

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

from diffusion_jax.diffusion.streams import GENERATOR

LOG = logging.getLogger("diffusion_jax")

P = ParamSpec("P")
R = TypeVar("R")

# Users can set these in the environment (JAX_ENABLE_X64). Other values change the noise of a seed,
# make noise depend on the batch, or make arrays and checkpoints 64-bit.
FIXED = {
    "jax_default_prng_impl": GENERATOR,
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
}

# Precisions of float32 products, from the least exact. "default" is TF32 on GPUs and bfloat16 on
# TPUs, "highest" is float32. CPUs compute float32 products with all of them.
HIGHEST = "highest"
PRECISIONS = {"default": None, "high": "high", HIGHEST: HIGHEST}


def in_precision(precision: str, function: Callable[P, R]) -> Callable[P, R]:
    """A function that jax traces with a precision of PRECISIONS for its products."""

    @functools.wraps(function)
    def traced(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.default_matmul_precision(PRECISIONS[precision]):
            return function(*args, **kwargs)

    return traced


def fix() -> None:
    """Set the options to FIXED, with a warning for each that had another value.

    The config sets the precision of products, so jax's own option for it is unset too.
    """
    for name, value in FIXED.items():
        if name not in jax.config.values:  # an option that this version of jax does not have
            continue
        before = jax.config.values[name]
        if getattr(before, "value", before) != value:
            LOG.warning("%s = %s: set to %s, because results depend on it", name, before, value)
            jax.config.update(name, value)
    precision = jax.config.values["jax_default_matmul_precision"]
    if precision is not None:
        LOG.warning("jax_default_matmul_precision = %s: unset, config.precision says it", precision)
        jax.config.update("jax_default_matmul_precision", None)
