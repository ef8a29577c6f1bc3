"""Settings of every test: jaxtyping checks, strict broadcasting, eight CPU devices."""

import os
import pathlib

# Without XLA's optimisation the suite takes half the time, because tiny shapes run no slower. The
# processes that tests start inherit the flag. It must be set before jax starts.
# DIFFUSION_JAX_TEST_OPTIMISED=1 leaves it out: programs are then compiled as users compile them.
if os.environ.get("DIFFUSION_JAX_TEST_OPTIMISED") != "1":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"

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

# The test files that take longest: the processes of the test runner begin with them.
LONGEST = (
    *("ablate", "samplers", "sampling", "evaluate", "main", "devices", "likelihood", "train"),
    *("solvers", "schedules", "models", "stored_folders", "structure", "cost", "report", "data"),
    *("editing", "losses", "quality", "conv", "notebook", "checkpoint", "installed", "pure"),
)

install_import_hook("diffusion_jax", "beartype.beartype")


@pytest.fixture(scope="session")
def repository() -> pathlib.Path:
    """The root of the checkout."""
    return pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of prepared data sets, shared by all processes of the test runner."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first: one that starts last would leave other processes idle."""
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
