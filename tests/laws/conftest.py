"""Double precision in both libraries for the tests of this folder."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def double_precision_on_one_thread() -> Iterator[None]:
    import jax
    import torch

    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)  # these tensors are tiny
    with jax.enable_x64(True):
        yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
