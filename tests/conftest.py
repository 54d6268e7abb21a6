"""Fixtures for the whole suite, and quick compilation in JAX."""

import gc
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from xla import compile_quickly

compile_quickly()  # before any test

#: `make versions` runs the tests of NumPyro where there is no Pyro
PYRO = find_spec("pyro") is not None

# Tracing makes many small objects, and a tenth of the time went into looking for garbage among them.
gc.set_threshold(100_000, 50, 100)


#: cases that take long, and whose like are quick: in the other library, or by the same estimator in another program
LIKE_OTHERS = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They are marked slow."""
    for item in items:
        if item.nodeid.removeprefix("tests/") in LIKE_OTHERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def double_precision() -> Iterator[None]:
    """float64 in both libraries, for one test."""
    import jax

    with jax.enable_x64(True):
        if not PYRO:
            yield
            return
        import torch

        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """Every test compiles much and runs little."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """No test sees another's parameters, and none draws otherwise than yesterday (NumPyro's keys are explicit)."""
    if not PYRO:
        yield
        return
    import pyro

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped() -> Iterator[None]:
    """Hundreds of compiled programs would fill the memory of a small machine."""
    yield
    import jax

    jax.clear_caches()
