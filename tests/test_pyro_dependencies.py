"""Law 10: which earlier sites a site depends on, through values and through control flow, in Pyro.

Each guide draws `z` first. A later site must name it if and only if it was made from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.nn import PyroModule, PyroSample
from torch.overrides import _get_current_function_mode

from ppl_estimators import LeaveOneOut, Reinforce
from ppl_estimators.pyro import EstimatorELBO

Guide = Callable[[], object]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ONCE_TRACED = torch.jit.trace(lambda x: 2 * x, torch.tensor(1.0))


def depends_on(guide: Guide) -> dict[str, set[str]]:
    """For each site of the guide, the sites it depends on, as the ELBO sees it."""
    sites = [
        (name, site["fn"]) for name, site in poutine.trace(guide).get_trace().nodes.items() if site["type"] == "sample"
    ]

    def model() -> None:
        for name, fn in sites:
            prior = dist.Normal(0.0, 1.0) if fn.has_rsample else dist.Bernoulli(0.5)
            pyro.sample(name, prior.expand(fn.batch_shape + fn.event_shape).to_event())

    elbo = EstimatorELBO(default=Reinforce(LeaveOneOut()), num_particles=2)
    elbo.loss_and_grads(model, guide)
    assert _get_current_function_mode() is None
    assert COERCIONS == []
    return {name: set(up) for name, up in elbo._plan.graph.ancestors.items()}


def draw(name: str, logits: torch.Tensor) -> torch.Tensor:
    return pyro.sample(name, dist.Bernoulli(logits=logits))


def start() -> tuple[torch.Tensor, torch.Tensor]:
    a = pyro.param("a", torch.tensor(0.3))
    return a, draw("z", a)


# ---- made from z: "w" depends on it, "u" does not --------------------------------------------------------------------


def in_place() -> None:
    a, z = start()
    x = torch.zeros(3)
    x[1] = z
    draw("w", a + x[:2].sum())
    draw("u", a)


def a_view_written_to() -> None:
    a, z = start()
    x = torch.zeros(3)
    view = x[1:]
    view[0] = z
    draw("w", a + x[2])
    draw("u", a)


def nested_results() -> None:
    a, z = start()
    network = torch.nn.LSTM(1, 1).requires_grad_(False)
    _, (_, cell) = network(z.reshape(1, 1, 1))
    draw("w", a + cell.sum())
    draw("u", a)


def index_and_where() -> None:
    a, z = start()
    draw("w", torch.where(torch.tensor([1.0, 2.0])[z.long()] > 1, a, -a))
    draw("u", a)


def an_attribute_of_a_distribution() -> None:
    _, z = start()
    draw("w", dist.OneHotCategorical(logits=torch.stack([z, 2 * z]).detach()).probs[0])
    draw("u", torch.tensor(0.5))


def a_closure_inside_a_distribution() -> None:
    a, z = start()
    pyro.sample("w", Lazy(lambda: a * z))
    draw("u", a)


class Lazy(dist.TorchDistribution):
    """A user's distribution, which computes its logits when it is asked to."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = dist.constraints.boolean

    def __init__(self, logits: Callable[[], torch.Tensor]):
        self.logits = logits
        super().__init__(validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008
        return dist.Bernoulli(logits=self.logits()).sample(sample_shape)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return dist.Bernoulli(logits=self.logits()).log_prob(value)


def a_mode_of_the_users() -> None:
    a, z = start()
    with torch.device("cpu"):
        draw("w", a * z + torch.zeros(()))
    draw("u", a)


def only_its_shape() -> None:
    a, z = start()
    draw("w", a * z)
    draw("u", a + torch.zeros_like(z) + torch.ones(()).to(z))


def parameters_shared_with_another_site() -> None:
    a, z = start()
    scale, mask = torch.tensor(1.0), torch.tensor(True)
    pyro.sample("w", dist.Normal(z, scale).mask(mask))
    pyro.sample("u", dist.Normal(a, scale).mask(mask))


def computed_before_the_first_draw() -> None:
    h = 2 * pyro.param("a", torch.tensor(0.3)).exp()
    z = draw("z", h)
    draw("w", h * z)
    draw("u", h)


def one_distribution_for_two_sites() -> None:
    d = dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3)))
    z = pyro.sample("z", d)
    draw("w", z * d.probs)
    pyro.sample("u", d)


@pytest.mark.parametrize(
    "guide",
    [
        in_place,
        a_view_written_to,
        nested_results,
        index_and_where,
        an_attribute_of_a_distribution,
        a_closure_inside_a_distribution,
        a_mode_of_the_users,
        only_its_shape,
        parameters_shared_with_another_site,
        computed_before_the_first_draw,
        one_distribution_for_two_sites,
    ],
)
def test_values(guide: Guide) -> None:
    assert depends_on(guide) == {"z": set(), "w": {"z"}, "u": set()}


# ---- control flow: everything after depends on z ---------------------------------------------------------------------


def branch() -> None:
    a, z = start()
    draw("w", a if z else -a)


def number() -> None:
    a, z = start()
    draw("w", a * z.item())


def elements() -> None:
    a, z = start()
    draw("w", a * z.reshape(1).tolist()[0])


def numpy_array() -> None:
    a, z = start()
    draw("w", a * float(z.numpy()))


def number_of_ones() -> None:
    a, z = start()
    draw("w", a * len(torch.nonzero(z.reshape(1))))


def masked_elements() -> None:
    a, z = start()
    draw("w", a * len(torch.ones(1)[z.reshape(1) > 0]))


def an_unseen_operation() -> None:
    a, z = start()
    draw("w", ONCE_TRACED(a + z))


class Branching(PyroModule):
    def forward(self) -> None:
        branch()


@pytest.mark.parametrize(
    "guide",
    [
        branch,
        number,
        elements,
        numpy_array,
        number_of_ones,
        masked_elements,
        an_unseen_operation,
        poutine.scale(branch, scale=1.0),  # called by Pyro's own code
        Branching(),
        poutine.scale(Branching().forward, scale=1.0),
    ],
)
def test_control_flow(guide: Guide) -> None:
    assert depends_on(guide) == {"z": set(), "w": {"z"}}


def test_a_distribution_that_draws() -> None:
    """A network with random weights inside a transform: the weight is drawn while the site is."""

    class Shift(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = PyroSample(dist.Normal(0.0, 1.0))

        def forward(self) -> torch.Tensor:
            return self.weight

    shift = Shift()

    def guide() -> None:
        pyro.sample("w", Lazy(shift))
        draw("u", torch.tensor(0.3))

    assert depends_on(guide)["w"] == {"weight"}
    assert depends_on(guide)["u"] == set()


def test_an_error_leaves_nothing_behind() -> None:
    def guide() -> None:
        _, z = start()
        pyro.sample("w", dist.Normal(z, -1.0))

    with pytest.raises(ValueError, match="scale"):
        EstimatorELBO().loss_and_grads(guide, guide)
    assert _get_current_function_mode() is None
    assert COERCIONS == []
