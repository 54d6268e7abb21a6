"""Compiled steps as CUDA graphs. What a graph asks of us (tensors that stay where they are, results of one's own) is
tested everywhere, with a card that is pretended; what the card does, where there is one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import SGD
from test_pyro_compiled import SPECS, bits, bits_guide, data, deep, flat, same, train, uses
from torch._subclasses.fake_tensor import FakeTensorMode

from ppl_estimators import DisARM, EstimatorWarning, MovingAverage, Reinforce
from ppl_estimators.pyro import EstimatorELBO, tape
from ppl_estimators.pyro.graphs import Card, Draws, Graph, card_of

Replay = Callable[[], list[torch.Tensor]]


class Pretended:
    """A card whose graph is the operations, run where they were captured."""

    device = torch.device("cpu")

    def __init__(self, draws: Draws | None = Draws(0, ()), fails: bool = False, errs: bool = False):  # noqa: B008
        self.draws, self.fails, self.errs = draws, fails, errs

    def watched(self, run: Replay, names: dict[str, Any]) -> tuple[list[torch.Tensor], Draws | None]:
        return run(), self.draws

    def captured(self, run: Replay, names: dict[str, Any], draws: Draws) -> Replay:
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        places: list[torch.Tensor] = []

        def replay() -> list[torch.Tensor]:
            for place, x in zip(places, found := run(), strict=bool(places)):
                place.copy_(x)
            places.extend(found[len(places) :])
            places[0] += self.errs
            return places

        return replay


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Pretended], None]]:
    def use(card: Pretended) -> None:
        monkeypatch.setattr(tape, "card_of", lambda *_: card)

    return use


def graphs(elbo: EstimatorELBO) -> list[Graph]:
    found = [s.noted.program.run for s in elbo.compiler._known.values() if s.noted is not None]
    assert all(isinstance(run, Graph) for run in found)
    return found


@pytest.mark.parametrize("name", ["networks", "state", "pairs", "side by side"])
def test_steps_by_graphs_are_the_same_steps(name, pretend):
    pretend(Pretended())
    estimators, settings = SPECS[name]
    elbo = same(deep, [data(i) for i in range(6)], estimators, **settings, verify=False)
    (graph,) = graphs(elbo)
    assert (graph.captures, graph.refused, uses(elbo)) == (1, False, [4])


@pytest.mark.parametrize("card", [Pretended(draws=None), Pretended(fails=True)], ids=["waits", "fails"])
def test_what_no_graph_can_do_runs_as_noted(card, pretend):
    pretend(card)
    elbo = same(lambda: (bits, bits_guide), flat(5, 5, 5, 5, 5, 5), default=DisARM())
    (graph,) = graphs(elbo)
    assert graph.refused
    assert uses(elbo) == [4]


def test_the_first_step_by_a_graph_is_compared(pretend):
    pretend(Pretended(errs=True))
    with pytest.warns(EstimatorWarning, match="is not what a later step does"):
        elbo = same(lambda: (bits, bits_guide), flat(5, 5, 5, 5, 5, 5), default=DisARM())
    assert uses(elbo) == []


def test_arguments_of_every_shape_and_numbers_as_tensors(pretend):
    pretend(Pretended())
    rows = [data(i, 5)[:, 0] for i in range(5)]  # not contiguous
    batches: list[Any] = [(x, torch.tensor(1.0 + i)) for i, x in enumerate(rows)] + flat(4, 4, 4, 4)
    elbo = same(lambda: (bits, bits_guide), batches, default=DisARM())
    assert [g.captures for g in graphs(elbo)] == [1, 1]


def test_results_are_ones_own(pretend):
    """A gradient that becomes a parameter's own, kept over later steps, or added to."""
    pretend(Pretended())
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        elbo = EstimatorELBO(default=Reinforce(MovingAverage()), compile=compile, verify=False)
        gradients = []
        for i, x in enumerate(flat(*[5] * 8)):
            elbo.loss_and_grads(bits, bits_guide, x)
            a = pyro.get_param_store()._params["a"]
            gradients.append(a.grad)
            if i != 6:  # then it adds up
                a.grad = None
        found.append(torch.stack(gradients))
    assert torch.equal(*found)
    assert graphs(elbo)[0].captures == 1


@pytest.mark.parametrize("moves", [3, 12])
def test_a_tensor_that_moves_calls_for_another_graph(moves, pretend):
    """Now and then, or at every step: then no graph pays."""
    pretend(Pretended())
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        elbo = EstimatorELBO(default=Reinforce(MovingAverage()), compile=compile, verify=False)
        svi = SVI(bits, bits_guide, SGD({"lr": 1e-2}), elbo)
        losses, kept = [], []
        for i, x in enumerate(flat(*[5] * 16)):
            losses.append(svi.step(x))
            if 3 < i < 4 + moves:
                a = pyro.get_param_store()._params["a"]
                kept.append(a.data)  # nothing else comes to lie there
                a.data = a.data.clone()
        found.append(losses)
    assert found[0] == found[1]
    (graph,) = graphs(elbo)
    assert graph.refused is (moves == 12)
    assert graph.captures == (9 if moves == 12 else 4)


def test_an_argument_that_the_program_writes_gets_no_graph(pretend):
    pretend(Pretended())

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        seen.add_(1)
        bits(x)

    x, elbo = flat(5)[0], EstimatorELBO(default=DisARM(), compile=True)
    svi = SVI(model, lambda x, _: bits_guide(x), SGD({"lr": 1e-2}), elbo)
    counts, seen = [], torch.zeros(())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(6):
            before = seen.clone()
            svi.step(x, seen)
            counts.append(float(seen - before))
    assert counts[-1] == 1
    assert not any(isinstance(s.noted.program.run, Graph) for s in elbo.compiler._known.values() if s.noted)


def test_a_backend_compiles_before_a_graph_is_captured(pretend):
    pretend(Pretended())
    elbo = EstimatorELBO(default=DisARM(), compile="eager", verify=False)
    plain = train(lambda: (bits, bits_guide), EstimatorELBO(default=DisARM(), verify=False), flat(*[5] * 7))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        found = train(lambda: (bits, bits_guide), elbo, flat(*[5] * 7))
    assert found[0] == plain[0]
    assert graphs(elbo)[0].captures == 1


def test_a_copy_starts_afresh(pretend):
    pretend(Pretended())
    elbo = same(lambda: (bits, bits_guide), flat(5, 5, 5, 5, 5), default=DisARM())
    assert not copy.deepcopy(elbo).compiler._known


def test_where_a_step_is():
    """All on one card; numbers may be elsewhere if they are arguments, or the same at every step."""
    with FakeTensorMode():
        on, number, vector = torch.empty(3, device="cuda"), torch.empty(()), torch.empty(3)
        assert card_of([on], [on, number], [on, number]).device == on.device
        for made, given, fixed in (
            ([on, number], [], []),
            ([on], [vector], []),
            ([on], [], [vector]),
            ([vector], [vector], []),
            ([on], [torch.empty_strided((3,), (0,), device="cuda")], []),
        ):
            assert card_of(made, given, fixed) is None


# ---- on a card -------------------------------------------------------------------------------------------------------

card = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def there() -> Iterator[None]:
    """What is made is made on the card."""
    with torch.device("cuda"):
        yield


@card
@pytest.mark.parametrize("name", SPECS)
def test_on_a_card(name, there):
    estimators, settings = SPECS[name]
    elbo = same(deep, [data(i) for i in range(6)], estimators, **settings, verify=False)
    (graph,) = graphs(elbo)
    assert (graph.captures, graph.refused, uses(elbo)) == (1, False, [4])


@card
def test_a_card_draws_again_what_is_evaluated_again(there):
    """Sites below one whose other value is evaluated keep their random numbers: the generator is put back, in the
    graph. Draws are fresh at every step, and follow the seed."""

    def model(x: torch.Tensor) -> None:
        z = torch.zeros(())
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=2 * z - 1))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    def guide(x: torch.Tensor) -> None:
        a = pyro.param("a", lambda: torch.linspace(-1, 1, len(x)))
        z = torch.zeros(())
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=a[t] + z))

    x = flat(6)[0]
    first = {"z_0": DisARM()}  # whose other value the draws of the other sites, by torch, hear
    elbo = same(lambda: (model, guide), [x] * 8, first, default=Reinforce(MovingAverage()), verify=False)
    (graph,) = graphs(elbo)
    assert len(graph._draws.rewinds) > 2
    svi = SVI(model, guide, SGD({"lr": 0.0}), elbo)
    for _ in range(3):
        svi.step(x)
    pyro.set_rng_seed(5)
    first = [svi.step(x) for _ in range(6)]
    pyro.set_rng_seed(5)
    assert [svi.step(x) for _ in range(6)] == first
    assert len(set(first)) > 2


@card
@pytest.mark.filterwarnings("ignore")
def test_a_compiler_on_a_card(there):
    found = []
    for compile in (False, "inductor"):
        elbo = EstimatorELBO(default=DisARM(), compile=compile, verify=False)
        found.append(train(lambda: (bits, bits_guide), elbo, flat(*[5] * 8)))
    assert graphs(elbo)[0].captures == 1
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert torch.equal(found[1][1]["random state"], found[0][1]["random state"])


@card
def test_what_waits_for_the_card_is_not_captured_and_what_fails_leaves_the_generator_as_it_was(there):
    state = torch.cuda.get_rng_state()
    on = Card(torch.device("cuda", 0))

    def waits() -> list[torch.Tensor]:
        return [torch.rand(3).nonzero()]

    names = {"save": lambda: None, "restore": lambda _: None}
    torch.cuda.set_rng_state(state)
    _, draws = on.watched(waits, names)
    assert draws is None
    stream = torch.cuda.current_stream()
    torch.cuda.set_rng_state(state)
    with pytest.raises(RuntimeError):
        on.captured(waits, names, Draws(4, ()))
    assert torch.cuda.current_stream() == stream
    found = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), found)
    replay = on.captured(lambda: [torch.rand(3)], names, Draws(4, ()))
    torch.cuda.set_rng_state(state)
    assert torch.equal(replay()[0], found)
    torch.cuda.set_rng_state(state)
    torch.rand(3)
    after = torch.rand(3)
    torch.cuda.set_rng_state(state)
    replay()
    assert torch.equal(torch.rand(3), after)
