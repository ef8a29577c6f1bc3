"""What every test runs under: checked shapes, strict broadcasting, eight CPU devices."""

import os
import pathlib

import jax
import pytest
from jaxtyping import install_import_hook

CACHE = pathlib.Path(
    os.environ.get("DIFFUSION_JAX_TEST_CACHE", pathlib.Path.home() / ".cache/diffusion_jax_tests")
)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

install_import_hook("diffusion_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    return pathlib.Path(__file__).parent.parent
