"""A Pyro step on a device: no tensor of ours is made elsewhere, and nothing waits for the device but ``.item()`` of the
loss. Here the processor plays the device, and torch's default is a device without data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_estimators import RELAX, DisARM, Enumerate, LeaveOneOut, MovingAverage, Reinforce
from ppl_estimators.pyro import EstimatorELBO, with_estimators

HERE = torch.device("cpu")
X = (torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def model(x):
    w = pyro.param("w", lambda: torch.full((3, 5), 0.3, device=HERE))
    with pyro.plate("batch", len(x), device=HERE):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(3, device=HERE)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)


def guide(x):
    v = pyro.param("v", lambda: torch.full((5, 3), 0.2, device=HERE))
    with pyro.plate("batch", len(x), device=HERE):
        pyro.sample("z", dist.Bernoulli(logits=x @ v).to_event(1))


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        (DisARM(), {}),
        (Enumerate(), {}),
        (Enumerate(), {"vectorize_particles": True, "max_plate_nesting": 1}),
        (Reinforce(LeaveOneOut()), {"num_particles": 3}),
        (Reinforce(MovingAverage()), {}),
        (RELAX(), {}),
        (None, {}),
    ],
    ids=lambda x: None if isinstance(x, dict) else repr(x),
)
def test_steps_read_one_number_and_make_no_tensor_elsewhere(estimator, settings):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    wrapped = guide if estimator is None else with_estimators(guide, {"z": estimator})
    elbo = EstimatorELBO(**settings)
    svi = SVI(model, wrapped, Adam({"lr": 0.01}), elbo)
    with pyro.validation_enabled(False):  # validation reads values
        for _ in range(3):
            svi.step(X)
        with torch.device("meta"), Reads() as reads:
            loss = elbo.loss_and_grads(model, wrapped, X)  # Adam itself reads how many steps it has made
    assert loss > 0
    assert reads.count == 1
    assert all(x.device == HERE for x in pyro.get_param_store().values())
