"""Law 10: which earlier sites a site depends on, through values and through control flow, in Pyro.

Each guide draws `z` first. A later site must name it if and only if it was made from it.
"""

from __future__ import annotations

import copy
import io
import pickle
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.distribution import COERCIONS
from pyro.nn import PyroModule, PyroSample
from torch.overrides import _get_current_function_mode

from ppl_estimators.pyro import EstimatorELBO, dependencies
from ppl_estimators.pyro.dependencies import Provenance, reachable
from ppl_estimators.pyro.run import execute

Guide = Callable[[], object]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ONCE_TRACED = torch.jit.trace(lambda x: 2 * x, torch.tensor(1.0))


def plain(msg: Any) -> torch.Tensor:
    value: torch.Tensor = msg["fn"](*msg["args"], **msg["kwargs"])
    return value


def depends_on(guide: Guide, model: Guide | None = None) -> dict[str, set[str]]:
    """For each site of the guide, and each observed one of the model, the other sites it depends on."""
    follow = Provenance()
    with follow:
        traces = execute(model, guide, (), {}, draw=plain, subsamples={}, provenance=follow)
    assert _get_current_function_mode() is None
    assert COERCIONS == []
    seen = {n: m for n, m in traces.model.items() if m["is_observed"]}
    return {name: set(follow.names(msg["behind"])) - {name} for name, msg in (traces.guide | seen).items()}


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


def written_into_fresh_zeros() -> None:
    """What was written counts, not all that was drawn."""
    a = pyro.param("a", torch.tensor(0.3))
    draw("u", a)
    z = pyro.sample("z", dist.Normal(a, 1.0))
    x = torch.zeros(3)
    x[1:] = z
    draw("w", x.sum())


def another_view_of_the_same_memory() -> None:
    a, z = start()
    x, y = torch.zeros(4), torch.zeros(4)
    left, right, mine = x[:2], x[2:], y[:2]
    left.data.copy_(z)
    mine.fill_(1.0)  # changes its version, with nothing
    draw("w", a + x.sum() + right.sum())
    draw("u", a + y.sum())


def the_data_of_a_weight() -> None:
    layer, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    a, z = start()
    layer.weight.data = z.expand(2, 2)
    other.weight.data = a.detach().expand(2, 2)
    draw("w", layer(torch.ones(2)).sum())
    draw("u", a + other(torch.ones(2)).sum())


def running_statistics() -> None:
    a, z = start()
    norm = torch.nn.BatchNorm1d(1)
    norm(z.expand(2, 1) * torch.tensor([[1.0], [2.0]]))
    draw("w", a + norm.running_mean.sum())
    draw("u", a)


def a_distribution_that_holds_an_object() -> None:
    a, z = start()
    pyro.sample("w", Held(Box(types.SimpleNamespace(logits=a * z))))
    pyro.sample("u", Held(Box(types.SimpleNamespace(logits=a))))


def a_distribution_that_reads_a_global() -> None:
    a, z = start()
    for name, x in (("w", a * z), ("u", a)):
        STATE["logits"] = x
        pyro.sample(name, Global(logits=torch.zeros(())))


def wrapped_and_transformed() -> None:
    a, z = start()
    pyro.sample("w", Held(Box(types.SimpleNamespace(logits=a * z))).expand([2]).mask(True).to_event(1))
    shift = [ShiftBy({"by": [a]})]
    pyro.sample("u", dist.TransformedDistribution(dist.Normal(0.0, 1.0), shift))


STATE: dict[str, torch.Tensor] = {}


class Global(dist.Bernoulli):
    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return dist.Bernoulli(logits=STATE["logits"]).log_prob(value)


@dataclass
class Box:
    inner: Any


class Held(dist.Bernoulli):
    """A user's subclass, which reads its logits out of the objects that it was given."""

    def __init__(self, box: Box):
        self.box = box
        super().__init__(logits=torch.zeros(()))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = Held(self.box)
        super().expand(batch_shape, _instance=new)
        return new

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return dist.Bernoulli(logits=self.box.inner.logits.expand(self.batch_shape)).log_prob(value)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008
        return dist.Bernoulli(logits=self.box.inner.logits.expand(self.batch_shape)).sample(sample_shape)


class ShiftBy(torch.distributions.Transform):
    domain = codomain = dist.constraints.real
    bijective = True

    def __init__(self, held: dict[str, list[torch.Tensor]]):
        super().__init__()
        self.held = held

    def _call(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.held["by"][0]

    def _inverse(self, y: torch.Tensor) -> torch.Tensor:
        return y - self.held["by"][0]

    def log_abs_det_jacobian(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


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
        written_into_fresh_zeros,
        another_view_of_the_same_memory,
        the_data_of_a_weight,
        running_statistics,
        a_distribution_that_holds_an_object,
        a_distribution_that_reads_a_global,
        wrapped_and_transformed,
    ],
)
def test_values(guide: Guide) -> None:
    assert depends_on(guide) == {"z": set(), "w": {"z"}, "u": set()}


# ---- held from before the first draw: depends on nothing -------------------------------------------------------------

CONSTANT = torch.tensor(0.5)
SETTINGS = {"offsets": [torch.tensor(0.1)]}


def helper() -> torch.Tensor:
    return max(x + CONSTANT for x in SETTINGS["offsets"])


class Program:
    """A user's plain object, with networks and data in its attributes."""

    slope = torch.tensor(2.0)

    def __init__(self) -> None:
        self.networks = {"a": torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Softplus())}
        self.data = np.float32(1.0), torch.tensor([0.7])
        self.prior = dist.Normal(torch.tensor(0.5), 2.0)

    def guide(self) -> None:
        start()
        pyro.sample("w", dist.Normal(self.networks["a"](self.data[1]).sum() + helper() + self.slope, 1.0))
        pyro.sample("u", self.prior)
        pyro.sample("v", dist.Bernoulli(logits=pyro.param("b", torch.tensor(0.3), dist.constraints.positive)))
        with pyro.plate("rows", 4, subsample_size=2) as rows:
            pyro.sample("t", dist.Normal(self.weights()[rows] + torch.as_tensor(self.data[0]), 1.0))

    def weights(self) -> torch.Tensor:
        return torch.cat([CONSTANT.expand(3), torch.full((1,), 2.0)])


def test_what_a_program_holds_from_before() -> None:
    for _ in range(2):  # the store is empty at first
        assert depends_on(Program().guide) == {"z": set(), "w": set(), "u": set(), "v": set(), "t": set()}


def test_what_a_program_holds_is_known_after_some_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked for any more then; and a tensor that is new depends on nothing all the same, unless it was made
    from what was drawn by a way that nobody sees."""
    walks = []

    def counted(*roots: Any, **kinds: Any) -> list[Any]:
        walks.append(roots)
        return reachable(*roots, **kinds)

    held = {"offset": torch.tensor(0.5), "z": torch.tensor(0.0)}

    def guide() -> None:
        a, z = start()
        if way is not None:
            held["z"] = way(z)
        draw("w", a + (z if way is None else held["z"]))
        draw("u", a + held["offset"])

    def found(elbo: EstimatorELBO) -> tuple[dict[str, set[str]], int]:
        del walks[:]
        with monkeypatch.context() as patch:
            patch.setattr(dependencies, "reachable", counted)
            elbo.loss_and_grads(guide, guide)
        plan = elbo.memory.last
        assert plan is not None
        return {n: set(plan.depends_on["guide", n]) - {n} for n in "uw"}, len(walks)

    right = {"u": set(), "w": {"z"}}
    way: Callable[[torch.Tensor], torch.Tensor] | None = None
    elbo = EstimatorELBO(num_particles=2)
    counts = [found(elbo) for _ in range(6)]
    assert [f for f, _ in counts] == [right] * 6
    assert counts[-1][1] == 2 < counts[0][1]  # the arguments, for each particle
    held["offset"] = torch.tensor(0.7)
    assert [found(elbo)[0] for _ in range(3)] == [right] * 3
    assert len(elbo.memory.plans) == 1
    for seen in (ONCE_TRACED, torch.clone, ONCE_TRACED):  # at first with an ELBO that knows what the program holds
        way = seen
        assert [found(elbo)[0] for _ in range(6)] == [right] * 6
        elbo = EstimatorELBO(num_particles=2)


def test_equal_steps_have_equal_dependencies() -> None:
    """No id of a tensor that is gone is taken for another's."""

    def guide() -> None:
        a, z = start()
        for i in range(5):
            x = torch.zeros(3)
            for t in range(3):
                x[t] = float(i)
            y = torch.zeros(3)
            y[:2] = z
            draw(f"u{i}", a + x.sum())
            draw(f"w{i}", a + y[1:].sum())

    found = [depends_on(guide) for _ in range(20)]
    assert found[0]["u4"] == set()
    assert found[0]["w4"] == {"z"}
    assert all(f == found[0] for f in found)


def test_tensors_that_are_swapped() -> None:
    """Torch refuses to swap tensors that somebody refers to weakly: the program's parameters are none of these."""
    net = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)

    def swapped(new: torch.Tensor) -> None:
        torch.utils.swap_tensors(net.weight, torch.nn.Parameter(new.reshape(1, 1), requires_grad=False))

    def model(inside: bool) -> None:
        z = pyro.sample("z", dist.Bernoulli(0.4))
        if inside:
            swapped(z)
        pyro.sample("x", dist.Normal(net(torch.ones(1)) * (1.0 if inside else z), 1.0), obs=torch.ones(1))

    def guide(inside: bool) -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

    for inside in (False, True):
        elbo = EstimatorELBO()
        for _ in range(3):
            elbo.loss_and_grads(model, guide, inside)
            assert elbo.memory.last is not None and "z" in elbo.memory.last.depends_on["model", "x"]
            swapped(torch.ones(1))


# ---- what cannot be followed: depends on all that was drawn before ---------------------------------------------------


def in_a_thread(z: torch.Tensor) -> torch.Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: 2 * z).result()


def written_by_a_thread(z: torch.Tensor) -> torch.Tensor:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(BUFFER.copy_, z).result()
    return BUFFER.clone()


def written_by_a_thread_under_cover(z: torch.Tensor) -> torch.Tensor:
    """A write that is seen follows one that was not."""
    buffer = torch.zeros(())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(buffer.copy_, z).result()
    buffer.add_(1.0)
    return buffer


def through_a_file(z: torch.Tensor) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(z, file)
    file.seek(0)
    return torch.load(file)


def by_a_c_pointer(z: torch.Tensor) -> torch.Tensor:
    import ctypes

    buffer = torch.zeros(())
    ctypes.memmove(buffer.data_ptr(), z.data_ptr(), 4)
    return buffer


def by_its_gradient(z: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda x: z.detach() * x**2)(torch.tensor(1.0))


def by_a_backward_pass(z: torch.Tensor) -> torch.Tensor:
    x = torch.tensor(1.0, requires_grad=True)
    with torch.enable_grad():
        torch.autograd.backward(x * z)
    return x.grad


BUFFER = torch.zeros(())
UNSEEN: list[Callable[[torch.Tensor], torch.Tensor]] = [
    in_a_thread,
    written_by_a_thread,
    written_by_a_thread_under_cover,
    through_a_file,
    by_a_c_pointer,
    by_its_gradient,
    by_a_backward_pass,
    torch.vmap(lambda x: 2 * x),
    lambda z: ONCE_TRACED(z),
    lambda z: torch.nn.Parameter(z),
    lambda z: copy.copy(z),
    lambda z: pickle.loads(pickle.dumps(z)),
    lambda z: torch.from_numpy(z.numpy()),
    lambda z: torch.nested.nested_tensor([z.reshape(1)]).to_padded_tensor(0.0),
]


@pytest.mark.parametrize("unseen", UNSEEN)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_followed(unseen: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def guide() -> None:
        a = pyro.param("a", torch.tensor(0.3))
        z = draw("z", a.expand(1) if unseen is UNSEEN[7] else a)
        with torch.no_grad():
            draw("w", a + unseen(z).sum())

    assert depends_on(guide) == {"z": set(), "w": {"z"}}


def test_a_likelihood_of_the_users_own() -> None:
    """The term depends on what its log_prob returned, not on all that was drawn."""

    def guide() -> None:
        start()
        draw("y", torch.tensor(0.1))

    def model() -> None:
        z, y = (pyro.sample(n, dist.Bernoulli(0.5)) for n in "zy")
        pyro.sample("of_z", Held(Box(types.SimpleNamespace(logits=2 * z))), obs=torch.tensor(1.0))
        pyro.sample("of_y", Held(Box(types.SimpleNamespace(logits=y - 1))), obs=torch.tensor(1.0))

    found = depends_on(guide, model)
    assert found["of_z"] == {"z"}
    assert found["of_y"] == {"y"}


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
