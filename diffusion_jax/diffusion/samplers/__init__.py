"""Samplers of the reverse chain, and ``sample``, which runs one of them.

To add a sampler, write a subclass of ``Sampler`` and a function that returns an instance of it, and
add the function's line to SAMPLERS.
"""

from collections.abc import Callable

from diffusion_jax.diffusion.samplers.ancestral import ancestral, predictor_corrector
from diffusion_jax.diffusion.samplers.base import (
    STATIC,
    Batch,
    Keys,
    Number,
    Sampler,
    Step,
    fold,
    normal,
)
from diffusion_jax.diffusion.samplers.chain import (
    INVERSION_ROUNDS,
    Trajectory,
    invert,
    sample,
    trajectory,
)
from diffusion_jax.diffusion.samplers.ddim import ddim, dpmpp_1s, euler, euler_ancestral
from diffusion_jax.diffusion.samplers.dpmpp import dpmpp_2m, dpmpp_2m_sde, dpmpp_2s, dpmpp_3m
from diffusion_jax.diffusion.samplers.edm import edm, heun
from diffusion_jax.diffusion.samplers.pndm import plms, pndm
from diffusion_jax.diffusion.samplers.unipc import unipc

__all__ = [
    "INVERSION_ROUNDS",
    "SAMPLERS",
    "STATIC",
    "Batch",
    "Keys",
    "Number",
    "Sampler",
    "Step",
    "Trajectory",
    "ancestral",
    "ddim",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "edm",
    "euler",
    "euler_ancestral",
    "fold",
    "heun",
    "invert",
    "normal",
    "plms",
    "pndm",
    "predictor_corrector",
    "sample",
    "trajectory",
    "unipc",
]

SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "edm": edm,
    "dpmpp_1s": dpmpp_1s,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m": dpmpp_3m,
    "unipc": unipc,
    "plms": plms,
    "pndm": pndm,
    "predictor_corrector": predictor_corrector,
}
