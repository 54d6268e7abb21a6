"""What ``default="auto"`` does with a program: each row of the table in docs/default.md, read off the plan."""

from __future__ import annotations

import random
import re
from pathlib import Path

import jax
import pyro
import pytest

from ppl_estimators import Constant, DisARM, Enumerate, LeaveOneOut, Reinforce, UnorderedSet
from ppl_estimators import numpyro as ours_jax
from ppl_estimators import pyro as ours_torch
from ppl_estimators.core.estimator import Control
from ppl_estimators.testing.zoo.languages import language

PAGE = Path(__file__).parent.parent / "docs" / "default.md"


def plan_of(ppl, model, guide, seed=0, **settings):
    """Which estimator runs where, for the default of a fresh ELBO."""
    if ppl.name == "numpyro":
        elbo = ours_jax.EstimatorELBO(**settings)
        return elbo.step(jax.random.key(seed), {}, model, guide, (), {}).library.plan()
    pyro.set_rng_seed(seed)
    pyro.clear_param_store()
    elbo = ours_torch.EstimatorELBO(**settings)
    elbo.loss_and_grads(model, guide)
    return elbo.memory.last


def evaluations(plan):
    """Runs of the program a step, all particles together."""
    return plan.particles * (1 + sum(g.alternatives + g.relaxations for g in plan.groups))


# ---- the programs ----------------------------------------------------------------------------------------------------


def observed(ppl, loc, at=0.4):
    ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(at))


def bits(count):
    """Sites b0, b1, ... that do not depend on each other; one cost sees them all."""

    def build(ppl):
        def draw():
            return [ppl.sample(f"b{i}", ppl.dist.Bernoulli(logits=ppl.array(0.3))) for i in range(count)]

        return lambda: observed(ppl, sum(draw())), draw

    return build


def chain(length):
    """Each bit depends on the one before it."""

    def build(ppl):
        def draw():
            z = ppl.array(0.0)
            for i in range(length):
                z = ppl.sample(f"b{i}", ppl.dist.Bernoulli(logits=0.3 + z))
            return z

        return lambda: observed(ppl, draw()), draw

    return build


def plate_of_bits(ppl, size=4, coupled=False):
    def draw():
        with ppl.plate("data", size):
            return ppl.sample("b", ppl.dist.Bernoulli(logits=ppl.array([0.3] * size)))

    def model():
        b = draw()
        if coupled:
            return observed(ppl, b.sum())
        with ppl.plate("data", size):
            observed(ppl, 1.0 * b, [0.4] * size)

    return model, draw


def coupled_plate(ppl, size=4):
    return plate_of_bits(ppl, size, coupled=True)


def coupled_plate_and_bit(ppl, size=4):
    _, plate = coupled_plate(ppl, size)

    def draw():
        return plate().sum() + ppl.sample("b0", ppl.dist.Bernoulli(logits=ppl.array(0.3)))

    return lambda: observed(ppl, draw()), draw


def vector_of_bits(ppl, size=4):
    def draw():
        return ppl.sample("b", ppl.dist.Bernoulli(logits=ppl.array([0.3] * size)).to_event(1))

    return lambda: observed(ppl, draw().sum()), draw


def bit_and_vector(ppl):
    def draw():
        b = ppl.sample("b0", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        return ppl.sample("b", ppl.dist.Bernoulli(logits=ppl.array([0.3] * 4) + b).to_event(1))

    return lambda: observed(ppl, draw().sum()), draw


def layers(count):
    """Vectors of bits, each drawn given the one before: a deep belief network."""

    def build(ppl):
        def draw():
            z = ppl.array([0.0] * 5)
            for i in range(count):
                z = ppl.sample(f"b{i}", ppl.dist.Bernoulli(logits=0.3 + z).to_event(1))
            return z

        return lambda: observed(ppl, draw().sum()), draw

    return build


def labels(categories, count=1):
    def build(ppl):
        def draw():
            return [
                ppl.sample(f"k{i}", ppl.dist.Categorical(logits=ppl.array([0.1] * categories))) for i in range(count)
            ]

        return lambda: observed(ppl, 1.0 * sum(draw())), draw

    return build


def plate_of_labels(ppl, size=4, beside=False):
    def draw():
        with ppl.plate("data", size):
            k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array([[0.1] * 10] * size)))
            return k + (ppl.sample("w", ppl.dist.Normal(ppl.array([0.1] * size), 1.0)) if beside else 0.0)

    def model():
        z = draw()
        with ppl.plate("data", size):
            observed(ppl, 1.0 * z, [0.4] * size)

    return model, draw


def code_and_label(ppl, size=4):
    return plate_of_labels(ppl, size, beside=True)


def counts(size):
    def build(ppl):
        def draw():
            return ppl.sample("n", ppl.dist.Poisson(ppl.array([2.0] * size)).to_event(1))

        return lambda: observed(ppl, draw().sum()), draw

    return build


def plate_of_counts(ppl, size=4):
    def draw():
        with ppl.plate("data", size):
            return ppl.sample("n", ppl.dist.Poisson(ppl.array([2.0] * size)))

    def model():
        n = draw()
        with ppl.plate("data", size):
            observed(ppl, n, [0.4] * size)

    return model, draw


def count_and_bit(ppl):
    def draw():
        n = ppl.sample("n", ppl.dist.Poisson(ppl.array(2.0)))
        return n + ppl.sample("b", ppl.dist.Bernoulli(logits=ppl.array(0.3)))

    return lambda: observed(ppl, draw()), draw


def branchy(ppl):
    """A drawn value that becomes a Python number in Pyro; in NumPyro it stays an array."""

    def draw():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        return ppl.sample("y", ppl.dist.Bernoulli(logits=ppl.branch(z, 1.1, -0.7)))

    return lambda: observed(ppl, draw()), draw


def over_time(ppl):
    def draw():
        def step(z, x):
            return ppl.sample("z", ppl.dist.Bernoulli(logits=0.3 * x + z))

        ppl.scan(step, ppl.array(0.0), ppl.array([0.4, -0.2, 0.9]))

    return draw, draw


def over_time_forgetful(ppl, count=3, model_forgets=False, categories=2):
    """The guide's steps know nothing of each other."""

    def draw(forgets):
        def step(z, x):
            logit = 0.3 * x if forgets else 0.3 * x + z
            if categories == 2:
                return ppl.sample("z", ppl.dist.Bernoulli(logits=logit))
            return ppl.sample("z", ppl.dist.Categorical(logits=logit * ppl.array([0.1] * categories)))

        ppl.scan(step, ppl.array(0.0), ppl.array([0.4, -0.2, 0.9] * count)[:count])

    return lambda: draw(model_forgets), lambda: draw(True)


def continuous(ppl):
    def draw():
        return ppl.sample("w", ppl.dist.Normal(ppl.array(0.1), 1.0))

    return lambda: observed(ppl, draw()), draw


def bit_and_continuous(ppl):
    def draw():
        b = ppl.sample("b", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        return ppl.sample("w", ppl.dist.Normal(0.1 + b, 1.0))

    return lambda: observed(ppl, draw()), draw


def die(ppl):
    """A law that the user has written: the libraries know nothing of it."""
    base = ppl.dist.Distribution if ppl.name == "numpyro" else ppl.dist.TorchDistribution

    class Die(base):
        support = ppl.dist.constraints.integer_interval(0, 2)
        arg_constraints = {"logits": ppl.dist.constraints.real_vector}  # noqa: RUF012

        def __init__(self, logits):
            self.logits = logits
            self.law = ppl.dist.Categorical(logits=logits)
            args = {"validate_args": False}
            super().__init__(batch_shape=(), event_shape=(), **args)

        def sample(self, key=None, sample_shape=()):
            return self.law.sample(key, sample_shape) if ppl.name == "numpyro" else self.law.sample(sample_shape)

        def log_prob(self, value):
            return self.law.log_prob(value)

    def draw():
        return ppl.sample("d", Die(ppl.array([0.1, 0.4, -0.3])))

    return lambda: observed(ppl, 1.0 * draw()), draw


def die_and_bit(ppl):
    _, first = die(ppl)

    def draw():
        return first() + ppl.sample("b", ppl.dist.Bernoulli(logits=ppl.array(0.3)))

    return lambda: observed(ppl, 1.0 * draw()), draw


def mixture(ppl):
    """Continuous, and not reparameterisable: the library cannot differentiate the choice of a component."""

    def draw():
        which = ppl.dist.Categorical(logits=ppl.array([0.2, -0.3]))
        loc, scale = ppl.array([-1.0, 1.0]), ppl.array([1.0, 1.0])
        return ppl.sample("w", ppl.dist.MixtureSameFamily(which, ppl.dist.Normal(loc, scale)))

    return lambda: observed(ppl, draw()), draw


OTHER = {"pyro": "NumPyro", "numpyro": "Pyro"}
SHAPES = {
    "continuous": (continuous, {}),
    "one bit": (bits(1), {}),
    "a bit, then a continuous site": (bit_and_continuous, {}),
    "a plate of bits": (plate_of_bits, {}),
    "a plate of bits that one cost adds up": (coupled_plate, {}),
    "such a plate and a bit": (coupled_plate_and_bit, {}),
    "a bit, and a vector of bits given it": (bit_and_vector, {}),
    "two bits": (bits(2), {}),
    "two bits, the second given the first": (chain(2), {}),
    "six independent bits": (bits(6), {}),
    "a vector of four dependent bits": (vector_of_bits, {}),
    "two layers of bits": (layers(2), {}),
    "three layers of bits": (layers(3), {}),
    "a chain of 20 bits": (chain(20), {}),
    "one label of 3 categories": (labels(3), {}),
    "one label of 10 categories": (labels(10), {}),
    "a plate of labels of 10 categories": (plate_of_labels, {}),
    "the same beside a continuous code": (code_and_label, {}),
    "three labels of 10 categories": (labels(10, 3), {}),
    "a plate of counts": (plate_of_counts, {}),
    "a vector of counts": (counts(4), {}),
    "a count and a bit": (count_and_bit, {}),
    "a bit that decides a branch, Pyro: `if z:`": (branchy, {}),
    "a bit that decides a branch, NumPyro: `lax.cond`": (branchy, {}),
    "bits over time": (over_time, {}),
    "bits over time, a guide that does not remember": (over_time_forgetful, {}),
    "a law of your own": (die, {}),
    "a law of your own and a bit": (die_and_bit, {}),
    "a continuous mixture": (mixture, {}),
    "one bit, four particles": (bits(1), {"num_particles": 4}),
}


def rows():
    """``{shape: (estimators, evaluations)}`` of the page."""
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- shapes:start -->\n.*\n.*\n((?:\|.*\n)+)<!-- shapes:end -->", text)[1]
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {shape: (estimators.replace("`", ""), int(runs)) for shape, estimators, runs in found}


LIBRARIES = ("pyro", "numpyro")
CASES = [(lib, shape) for shape in SHAPES for lib in LIBRARIES if f", {OTHER[lib]}" not in shape]


@pytest.mark.parametrize(("library", "shape"), CASES)
def test_a_shape_gets_what_the_page_says(library, shape):
    build, settings = SHAPES[shape]
    ppl = language(library)
    plan = plan_of(ppl, *build(ppl), **settings)
    chosen = ", ".join(dict.fromkeys(repr(e) for e in plan.estimators.values()))
    assert (chosen, evaluations(plan)) == rows()[shape]


def test_every_row_of_the_page_is_a_shape():
    assert list(rows()) == list(SHAPES)


@pytest.fixture(params=LIBRARIES)
def ppl(request):
    return language(request.param)


def test_no_site_is_left_without_a_control_variate(ppl):
    for shape, (build, settings) in SHAPES.items():
        plan = plan_of(ppl, *build(ppl), **settings)
        assert not any(e.control is Control.NOTHING for e in plan.estimators.values()), shape
        assert plan.particles == settings.get("num_particles", 1) or plan.particles == 3, shape


def test_alike_sites_get_the_same(ppl):
    for build in (bits(6), chain(20), labels(10, 3), labels(3, 2), chain(2), layers(2), layers(3)):
        plan = plan_of(ppl, *build(ppl))
        assert len(plan.estimators) > 1
        assert len(set(plan.estimators.values())) == 1


def test_neither_order_nor_seed_decides(ppl):
    """Seven sites of five kinds, of which not all can have what is best."""
    dist, array = ppl.dist, ppl.array
    laws = {
        "b": dist.Bernoulli(logits=array(0.3)),
        "c": dist.Categorical(logits=array([0.1, 0.4])),
        "o": ppl.one_hot(array([0.1, 0.4])),
        "k": dist.Categorical(logits=array([0.1] * 10)),
        "v": dist.Bernoulli(logits=array([0.3] * 3)).to_event(1),
    }
    for names in (["b", "c", "o"], ["k", "b"], ["k", "v", "b"], ["c", "o", "v"]):
        found = set()
        for seed, order in enumerate((names, names[::-1], random.Random(0).sample(names, len(names)))):

            def draw(order=order):
                z = {name: 1.0 * ppl.sample(name, laws[name]) for name in order}
                return sum(z[name].sum() for name in sorted(z))

            plan = plan_of(ppl, lambda draw=draw: observed(ppl, draw()), draw, seed=seed)
            found.add(tuple(sorted((n, repr(e)) for n, e in plan.estimators.items())))
        assert len(found) == 1, found


@pytest.mark.parametrize(
    "build", [plate_of_bits, coupled_plate, coupled_plate_and_bit, plate_of_labels, code_and_label]
)
def test_the_size_of_a_plate_does_not_matter(ppl, build):
    plans = [plan_of(ppl, *build(ppl, size)) for size in (1, 2, 5, 40)]
    assert len({tuple(sorted((n, repr(e)) for n, e in plan.estimators.items())) for plan in plans}) == 1
    assert len(set(map(evaluations, plans))) == 1


@pytest.mark.parametrize(
    ("forgets", "categories", "expected", "runs"),
    [
        (False, 2, DisARM(), 2),
        (True, 2, Enumerate(), 2),
        (True, 3, Enumerate(), 3),
        (True, 10, UnorderedSet(3), 3),
        (False, 3, Reinforce(LeaveOneOut()), 3),
    ],
)
def test_steps_that_no_cost_sees_together_are_a_plate(forgets, categories, expected, runs):
    ppl = language("numpyro")
    for count in (2, 7):
        plan = plan_of(ppl, *over_time_forgetful(ppl, count, forgets, categories))
        assert (plan.estimators["z"], evaluations(plan)) == (expected, runs)


def test_what_is_named_is_left_alone_and_not_counted(ppl):
    model, guide = bits(3)(ppl)
    asked = {"b0": Reinforce(Constant(1.0))}
    plan = plan_of(ppl, model, guide, estimators=asked)
    assert plan.estimators == {**asked, "b1": Enumerate(), "b2": Enumerate()}
    assert evaluations(plan) == 3


def test_shadows_are_drawn_for_sites_that_are_named_too(ppl):
    model, guide = chain(4)(ppl)
    plan = plan_of(ppl, model, guide, estimators={"b0": DisARM()})
    assert plan.particles == 3 and evaluations(plan) == 6
    assert set(plan.estimators.values()) == {DisARM(), Reinforce(LeaveOneOut())}
