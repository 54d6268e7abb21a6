"""Laws 12 and 16 on Pyro programs as people write them: what a distribution says of itself is checked, guide and model
must speak of the same things, and errors name their site."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import transforms
from pyro.distributions.testing.rejection_gamma import RejectionGamma, ShapeAugmentedGamma
from pyro.infer import Trace_ELBO, config_enumerate
from torch.distributions import GeneralizedPareto

from ppl_estimators import Enumerate, EstimatorError, Pathwise, Reinforce, StickingTheLanding
from ppl_estimators.pyro import EstimatorELBO
from ppl_estimators.pyro.distributions import reparameterised, support_moves

Law = Callable[[torch.Tensor], Any]


# ---- claims of distributions -----------------------------------------------------------------------------------------


class Claims(dist.TorchDistribution):
    """A user's distribution that says it is reparameterised, on whatever its sampler returns."""

    has_rsample = True
    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, a: torch.Tensor, sampler: Callable[[torch.Tensor], torch.Tensor], support: Any = None):
        self.held, self.sampler = {"a": a}, sampler
        self.declared = dist.constraints.real if support is None else support
        super().__init__(a.shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.declared

    def rsample(self, sample_shape: torch.Size = torch.Size()) -> torch.Tensor:  # noqa: B008
        return self.sampler(self.held["a"].expand(sample_shape + self.batch_shape))

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return dist.Normal(self.held["a"], 1.0).log_prob(value)


WHOLE: dict[str, Law] = {
    "Normal": lambda a: dist.Normal(a, 1.0),
    "a user's": lambda a: Claims(a, lambda x: x + torch.randn_like(x)),
    "a user's, of constants": lambda a: Claims(torch.tensor(0.3), lambda x: x + torch.randn_like(x)),
    "transformed": lambda a: dist.TransformedDistribution(dist.Gamma(a, 1.0), [transforms.ExpTransform()]),
    "Delta": lambda a: dist.Delta(a),
    "straight-through": lambda a: dist.RelaxedBernoulliStraightThrough(torch.tensor(0.5), logits=a),
}
NOT: dict[str, Law] = {
    "Bernoulli": lambda a: dist.Bernoulli(logits=a),
    "RejectionGamma": lambda a: RejectionGamma(a, torch.tensor(1.0)),
    "one inside": lambda a: dist.TransformedDistribution(RejectionGamma(a, a).expand([2]), [transforms.ExpTransform()]),
    "ShapeAugmentedGamma": lambda a: ShapeAugmentedGamma(a, a).expand([2]).to_event(1).mask(True),
    "detached": lambda a: Claims(a, lambda x: x.detach() + torch.randn_like(x)),
    "a number": lambda a: Claims(a, lambda x: torch.full_like(x, 2.0 * x.item())),
    "integers": lambda a: Claims(a, lambda x: torch.poisson(x).long()),
    "a discrete support": lambda a: Claims(a, lambda x: x + 1, dist.constraints.nonnegative_integer),
}


@pytest.mark.parametrize(("laws", "expected"), [(WHOLE, True), (NOT, False)])
def test_what_is_reparameterised(laws: dict[str, Law], expected: bool) -> None:
    pyro.set_rng_seed(0)
    a = torch.tensor(1.3, requires_grad=True)
    found = {name: reparameterised(law(a), law(a)()) for name, law in laws.items()}
    assert found == dict.fromkeys(laws, expected)


class Unsaid(dist.TorchDistribution):
    """Declares the real line; has a density on an interval, or falls off doubly exponentially."""

    arg_constraints, support, has_rsample = {}, dist.constraints.real, False

    def __init__(self, scale: torch.Tensor, power: torch.Tensor, width: torch.Tensor | None):
        self.scale, self.power, self.width = scale, power, width
        super().__init__(torch.Size([2]), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> torch.Tensor:
        return (self.scale * torch.rand(*sample_shape, 2)).detach() * (1.0 if self.width is None else self.width)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        x = x / self.scale
        if self.width is None:
            return -x - (-self.power * x).exp()
        inside = (x > 0) & (x < self.width)
        return ((self.power + 1) * torch.where(inside, x, 1.0) ** self.power * inside / self.scale).log()


one = torch.tensor(1.0)
MOVING: dict[str, Law] = {
    "an unsaid interval": lambda a: Unsaid(a, one, one),
    "an unsaid end": lambda a: Unsaid(one, one, a),
    "mixture": lambda a: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Uniform(torch.zeros(2), a)),
    "Uniform": lambda a: dist.Uniform(-a, 2.0).expand([2]).to_event(1).mask(True),
    "Pareto": lambda a: dist.Pareto(a, 1.0),
    "scaled": lambda a: dist.TransformedDistribution(dist.Uniform(0.0, 1.0), [transforms.AffineTransform(0.0, a)]),
    "shifted": lambda a: dist.TransformedDistribution(dist.Exponential(1.0), [transforms.AffineTransform(a, 1.0)]),
    "inside": lambda a: dist.TransformedDistribution(dist.Uniform(0.0, a), [transforms.ExpTransform()]),
    "AffineBeta": lambda a: dist.AffineBeta(1.0, 1.0, a, 2.0),
    "GeneralizedPareto": lambda a: GeneralizedPareto(0.0, a, torch.tensor(-0.5)),
    "a user's": lambda a: Claims(a, torch.clone, dist.constraints.less_than(a)),
}
STAYING: dict[str, Law] = {
    "an unsaid interval": lambda a: Unsaid(one, a, one),
    "an unsaid tail": lambda a: Unsaid(a, one, None),
    "Normal": lambda a: dist.Normal(a, 1.0),
    "Uniform": lambda a: dist.Uniform(0.0, 2.0),
    "Gamma": lambda a: dist.Gamma(a, a),
    "HalfNormal": lambda a: dist.HalfNormal(a),
    "Weibull": lambda a: dist.Weibull(a, a),
    "Kumaraswamy": lambda a: dist.Kumaraswamy(a, a),
    "Dirichlet": lambda a: dist.Dirichlet(torch.stack([a, a])),
    "scaled at zero": lambda a: dist.TransformedDistribution(dist.Gamma(a, 1.0), [transforms.AffineTransform(0.0, a)]),
    "AffineBeta": lambda a: dist.AffineBeta(a, a, torch.tensor(1.0), 2.0),
    "GeneralizedPareto": lambda a: GeneralizedPareto(0.0, a, torch.tensor(0.5)),
    "Poisson": lambda a: dist.Poisson(a),
    "flow": lambda a: dist.TransformedDistribution(
        dist.Uniform(torch.zeros(2), 1.0).to_event(1), [transforms.permute(2)]
    ),
    "no support": lambda a: Claims(a, torch.clone, dist.constraints.dependent),
}


@pytest.mark.parametrize(("laws", "expected"), [(MOVING, True), (STAYING, False)])
def test_which_supports_move(laws: dict[str, Law], expected: bool) -> None:
    a = torch.tensor(1.3, requires_grad=True)
    pyro.set_rng_seed(0)
    found = {name: support_moves(law(a), law(a).sample()) for name, law in laws.items()}
    assert found == dict.fromkeys(laws, expected)
    with torch.no_grad():  # nothing is differentiated
        assert not any(support_moves(law(a), law(a).sample()) for law in laws.values())


def one_site(law: Law, start: float = 1.3) -> tuple[Callable[[], None], Callable[[], None]]:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(0.5))

    return model, lambda: pyro.sample("z", law(pyro.param("a", torch.tensor(start))))


def test_refusals_of_false_claims() -> None:
    pyro.set_rng_seed(0)
    for law in (NOT["RejectionGamma"], NOT["detached"]):
        with pytest.raises(EstimatorError, match=r"site 'z': Pathwise needs a reparameterisable distribution"):
            EstimatorELBO(Pathwise()).loss_and_grads(*one_site(law))
        pyro.clear_param_store()
    for estimator in (Reinforce(), StickingTheLanding()):  # the score has a mean: neither to be used nor to be left out
        with pytest.raises(EstimatorError, match=r"site 'z': the support of Uniform moves.*Use Pathwise\(\)"):
            EstimatorELBO(estimator).loss_and_grads(*one_site(lambda a: dist.Uniform(-a, 2.0)))
    EstimatorELBO(Pathwise()).loss_and_grads(*one_site(lambda a: dist.Uniform(-a, 2.0)))
    with pytest.raises(EstimatorError, match=r"site 'z': the support of Unsaid moves.*Draw it in fixed bounds"):
        EstimatorELBO(num_particles=2).loss_and_grads(*one_site(lambda a: Unsaid(a, one, one)))


def test_a_hand_made_score_in_the_guide() -> None:
    def guide(has_rsample: bool) -> None:
        z = pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.3)), 1.0))
        pyro.factor("extra", -0.1 * z, has_rsample=has_rsample)

    model, _ = one_site(WHOLE["Normal"])
    with pytest.raises(EstimatorError, match=r"site 'extra': a factor of the guide with has_rsample=False.*=True"):
        EstimatorELBO().loss(model, lambda: guide(False))
    EstimatorELBO().loss(model, lambda: guide(True))


# ---- a run is the same program ------------------------------------------------------------------------------


def test_a_compiled_function_runs_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a module, in the first step, where modules are watched: no warning, nothing compiled, nothing assumed."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # which `torch.compile` switches off
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net = torch.compile(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5)), backend=backend)

    def model() -> None:
        b, z = pyro.sample("b", dist.Bernoulli(0.5)), pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(net(z[None])[0], 1.0), obs=torch.tensor(0.5))
        pyro.sample("y", dist.Normal(b, 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        for name in ("b", "z"):
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"{name}_logit", torch.tensor(0.3))))

    elbo = EstimatorELBO(Enumerate())
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert not graphs
    assert elbo.memory.last is not None
    assert elbo.memory.last.depends_on["model", "x"] == {"z"}
    net(torch.ones(1))
    assert graphs  # outside it compiles as before


OWN: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch": (lambda: torch.Generator().manual_seed(3), lambda g: float(torch.rand((), generator=g))),
    "numpy": (lambda: np.random.default_rng(3), lambda g: g.random()),
    "numpy, of old": (lambda: np.random.RandomState(3), lambda g: g.random_sample()),
    "Python": (lambda: random.Random(3), lambda g: g.random()),
}


@pytest.mark.parametrize("name", OWN)
def test_a_generator_that_the_program_holds(name: str) -> None:
    """Every run of a step sees the same number, and a step uses as many as one run."""
    make, draw = OWN[name]
    held, plain = make(), make()
    seen: list[Any] = [object()]  # a list of nothing but numbers would be put back

    def guide() -> None:
        number = draw(held)
        seen.append(number)
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3)) + number))

    def model() -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=torch.tensor(0.5))

    elbo = EstimatorELBO(Enumerate())
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert len(seen) > 4
    assert list(dict.fromkeys(seen[1:])) == [draw(plain) for _ in range(3)]


@pytest.mark.parametrize(
    ("mean", "broadcasts"),
    [
        (lambda z: (z * torch.arange(3.0)).sum(-1, keepdim=True), True),
        (lambda z: (z * torch.arange(3.0)).sum(), False),  # over the alternatives, too
        (lambda z: torch.dot(z, torch.arange(3.0)), False),  # raises
    ],
)
def test_alternatives_side_by_side_where_a_program_does_not_broadcast(
    mean: Callable[[torch.Tensor], torch.Tensor], broadcasts: bool
) -> None:
    """They run one after another, with a warning that names the site: the same gradient either way."""

    def model() -> None:
        with pyro.plate("rows", 3):
            z = pyro.sample("z", dist.Bernoulli(0.3 * torch.ones(3)))
        pyro.sample("x", dist.Normal(mean(z), 1.0), obs=torch.tensor(0.5))

    def guide() -> None:
        with pyro.plate("rows", 3):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor([0.3, -0.4, 0.1]))))

    found = []
    for side_by_side in (False, True):
        pyro.clear_param_store()
        elbo = EstimatorELBO(Enumerate(), vectorize_particles=side_by_side, max_plate_nesting=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                pyro.set_rng_seed(0)
                elbo.loss_and_grads(model, guide)
        expected = side_by_side and not broadcasts
        assert [str(w.message).partition(" side by side")[0] for w in seen] == ["site 'z': 3 other values"] * expected
        found.append(pyro.param("a").grad)
    torch.testing.assert_close(*found)


class Noisy(torch.nn.Module):
    """Noise in the shape of its input, of which nothing is an alternative."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("rows", [4, 6])  # Enumerate() of four categories: three other values
def test_noise_that_has_as_many_rows_as_there_are_alternatives(rows: int) -> None:
    def model(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            pyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x[:, 0])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(logits=pyro.param("a", torch.ones(4)) * Noisy()(x)))

    found = []
    for side_by_side in (False, True):
        pyro.clear_param_store()
        elbo = EstimatorELBO(Enumerate(), vectorize_particles=side_by_side, max_plate_nesting=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for count in (4, rows):
                pyro.set_rng_seed(0)
                elbo.loss_and_grads(model, guide, torch.ones(count, 4))
        found.append(pyro.param("a").grad)
    torch.testing.assert_close(*found)


# ---- guide and model ------------------------------------------------------------------------------------------------


def rows(name: str, count: int = 3, size: int = 6) -> Callable[[], None]:
    def program() -> None:
        with pyro.plate(name, size, subsample_size=count) as i:
            pyro.sample("w", dist.Normal(pyro.param("m", torch.zeros(6))[i], 1.0))

    return program


def test_plates_of_other_names() -> None:
    with pytest.raises(EstimatorError, match=r"site 'w'.*plate 'lines', a random 3 of 6.*plate 'rows'.*same name"):
        EstimatorELBO().loss(rows("rows"), rows("lines"))
    with pytest.raises(EstimatorError, match="site 'w': plate 'rows' has 5 elements in the guide and 6 in the model"):
        EstimatorELBO().loss(rows("rows"), rows("rows", size=5))
    with pytest.raises(EstimatorError, match="site 'w': plate 'rows' has 3 elements in the guide and 6 in the model"):
        EstimatorELBO().loss(rows("rows"), rows("rows", size=3))  # the model's would always be the first three

    def named() -> None:
        with pyro.plate("rows", 6, subsample=torch.tensor([4, 1, 2])):
            pyro.sample("w", dist.Normal(0.0, 1.0))

    EstimatorELBO().loss(named, rows("rows", size=3))
    EstimatorELBO().loss(rows("rows"), rows("rows"))
    EstimatorELBO().loss(rows("rows", 6), rows("lines", 6))  # all of them: the same elements


def test_names_used_twice() -> None:
    def normal(name: str) -> torch.Tensor:
        value: torch.Tensor = pyro.sample(name, dist.Normal(0.0, 1.0))
        return value

    def twice() -> None:
        normal("u")
        normal("u")

    def parameter_first() -> None:
        pyro.param("u", torch.tensor(1.0))
        normal("u")

    def parameter_last() -> None:
        normal("u")
        pyro.param("u", torch.tensor(1.0))

    for program in (twice, parameter_first, parameter_last):
        for model, guide in ((program, lambda: normal("u")), (lambda: normal("u"), program)):
            with pytest.raises(RuntimeError):
                Trace_ELBO().loss(model, guide)
            with pytest.raises(RuntimeError, match=r"site 'u'") as raised:
                EstimatorELBO().loss(model, guide)
            assert isinstance(raised.value, EstimatorError)


# ---- messages --------------------------------------------------------------------------------------------------------


class Raises(dist.Normal):
    def __init__(self, error: Exception):
        self.error = error
        super().__init__(torch.zeros(()), 1.0)

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        raise self.error


def likelihood(law: Any, obs: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("seen", law, obs=obs)

    return model, lambda: pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))


@pytest.mark.parametrize(
    ("law", "obs"),
    [
        (dist.Normal(torch.zeros(4), 1.0).to_event(1), torch.zeros(3)),
        (dist.Normal(torch.zeros(4), 1.0, validate_args=False).to_event(1), torch.zeros(3)),
        (dist.Poisson(1.0), torch.tensor(-1.0)),
        (Raises(ValueError("of mine")), torch.tensor(-1.0)),
    ],
)
def test_an_error_in_log_prob(law: Any, obs: torch.Tensor) -> None:
    for evaluate in (EstimatorELBO().loss, EstimatorELBO().loss_and_grads):
        with pytest.raises(EstimatorError, match=r"(?s)site 'seen'.*Trace Shapes.*seen dist") as raised:
            evaluate(*likelihood(law, obs))
        assert isinstance(raised.value, RuntimeError)


def test_an_error_of_another_kind_in_log_prob() -> None:
    with pytest.raises(KeyError, match="of mine") as raised:
        EstimatorELBO().loss(*likelihood(Raises(KeyError("of mine")), torch.tensor(0.0)))
    (note,) = raised.value.__notes__
    assert "site 'seen'" in note
    assert "Trace Shapes" in note


def test_an_error_in_the_program() -> None:
    def model() -> None:
        pyro.param("p", torch.zeros(2))
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        torch.ones(2) + z

    def guide() -> None:
        pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(3)), 1.0).to_event(1))

    with pytest.raises(RuntimeError, match=r"(?s)size of tensor.*Raised in the model, after site 'z'") as raised:
        EstimatorELBO().loss(model, guide)
    assert "p 2" in str(raised.value)  # the parameters, too
    assert "z dist | 3" in str(raised.value)
    with pytest.raises(KeyError, match="mine") as other:
        EstimatorELBO().loss(model, lambda: {}["mine"])
    assert other.value.__notes__[0].startswith("Raised in the guide, before its first site.")


def test_an_error_of_a_program_that_was_written_for_one_particle() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(1.0 if z else 0.0, 1.0), obs=torch.tensor(1.4))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.0))))

    side_by_side = {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}
    with pytest.raises(RuntimeError, match=r"ambiguous(?s:.*)All particles run at once.*torch\.where\(z > 0"):
        EstimatorELBO(**side_by_side).loss(model, guide)
    EstimatorELBO(num_particles=2).loss(model, guide)


def test_programs_written_for_enumeration() -> None:
    def coin(expected: int) -> None:
        k = pyro.sample("k", dist.Categorical(torch.ones(3)))
        assert k.dim() == expected, "wrong shape"

    elbo = EstimatorELBO(max_plate_nesting=0)  # or it looks, without enumeration, how deep plates are nested
    assert abs(elbo.loss(config_enumerate(lambda: coin(1)), lambda: None)) < 1e-6
    assert abs(elbo.loss(lambda: coin(1), config_enumerate(lambda: coin(1)))) < 1e-6
    assert abs(elbo.loss(config_enumerate(lambda: coin(0)), lambda: coin(0))) < 1e-6  # the guide's own mark counts
    assert abs(elbo.loss(lambda: coin(0), config_enumerate(lambda: coin(0), default="sequential"))) < 1e-6
    with pytest.raises(EstimatorError, match=r"site 'k': marked .*another only for a site of the guide"):
        elbo.loss(config_enumerate(lambda: coin(0), default="sequential"), lambda: None)
    assert abs(EstimatorELBO({"k": Enumerate()}).loss(lambda: coin(0), lambda: coin(0))) < 1e-6


def test_what_an_intervention_cuts_off() -> None:
    """The site that `poutine.do` has put another value in the place of is none of the cost, if the guide lacks it."""

    def model(z: torch.Tensor | None = None) -> None:
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(0.5)) if z is None else z
            k = pyro.sample("k", dist.Bernoulli(0.2 + 0.5 * z))
            pyro.sample("x", dist.Normal(k + z, 1.0), obs=torch.tensor([1.2, 0.3]))

    def guide(z: torch.Tensor | None = None) -> None:
        with pyro.plate("data", 2):
            pyro.sample("k", dist.Bernoulli(logits=pyro.param("a", torch.tensor([0.3, -0.4]))))

    found = []
    for program, args in ((pyro.poutine.do(model, data={"z": torch.ones(2)}), ()), (model, (torch.ones(2),))):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss = EstimatorELBO({"k": Enumerate()}).loss_and_grads(program, guide, *args)
        found.append((loss, *pyro.param("a").grad.tolist()))
    assert found[0][1:] == pytest.approx(found[1][1:])
    assert EstimatorELBO().loss(pyro.poutine.do(model, data={"z": torch.ones(2)}), guide) > 0
