"""Double precision in both libraries, and quick compilation, for the tests of this folder only."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def double_precision_and_quick_compilation() -> Iterator[None]:
    import jax
    import torch

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # these tensors are tiny
    unoptimised = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)  # every program is run once or twice
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", unoptimised)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
