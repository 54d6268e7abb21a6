"""Programs of the kinds that the libraries' examples enumerate: loss and gradient are those of Pyro's `TraceEnum_ELBO`,
in both libraries. They are small programs of our own; docs/enumeration.md says which examples have which kind.

Continuous sites of a guide are points, or reparameterised draws of one noise, so that all losses are the same numbers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch
from numpyro.contrib.control_flow import scan
from numpyro.ops.indexing import Vindex as VindexJax
from pyro.infer import TraceEnum_ELBO
from pyro.ops.indexing import Vindex as VindexTorch

from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.pyro import EstimatorELBO as TorchELBO

MARK = {"enumerate": "parallel"}
GENERATOR = np.random.default_rng(0)


class Torch:
    sample, plate, dist, math = staticmethod(pyro.sample), staticmethod(pyro.plate), tdist, torch
    param, handlers = staticmethod(pyro.param), pyro.poutine

    @staticmethod
    def array(x):
        return torch.as_tensor(x) if np.asarray(x).dtype.kind in "bi" else torch.as_tensor(x, dtype=torch.float64)

    @staticmethod
    def at(table, *index):
        return VindexTorch(table)[index]

    @staticmethod
    def whole(x):
        return x.long()


class Jax:
    sample, plate, dist, math = staticmethod(numpyro.sample), staticmethod(numpyro.plate), jdist, jnp
    handlers = numpyro.handlers

    @staticmethod
    def param(name):
        return numpyro.param(name, jnp.zeros(()))

    @staticmethod
    def array(x):
        return jnp.asarray(x)

    @staticmethod
    def at(table, *index):
        return VindexJax(table)[index]

    @staticmethod
    def whole(x):
        return x.astype(int)


def normal(*shape):
    return GENERATOR.normal(size=shape)


def point(lib, name, value, events=0):
    """A site of the guide that is a point."""
    return lib.sample(name, lib.dist.Delta(value, event_dim=events))


def drawn(lib, name, loc, log_scale, noise):
    """A normal site of the guide, reparameterised, from one noise."""
    value = loc + lib.math.exp(log_scale) * lib.array(noise)
    log_q = lib.dist.Normal(loc, lib.math.exp(log_scale)).log_prob(value)
    return lib.sample(name, lib.dist.Delta(value, log_density=log_q))


def softmax(lib, x):
    return torch.softmax(x, -1) if lib is Torch else jax.nn.softmax(x)


# ---- mixtures -------------------------------------------------------------------------------------------------------

X = normal(7)


def gaussian_mixture(lib):
    d, sample = lib.dist, lib.sample

    def model():
        weights = sample("weights", d.Dirichlet(lib.array([1.5, 2.0, 0.5])))
        scale = sample("scale", d.LogNormal(lib.array(0.0), 2.0))
        with lib.plate("components", 3):
            places = sample("places", d.Normal(lib.array(0.0), 10.0))
        with lib.plate("data", 7):
            z = sample("z", d.Categorical(weights), infer=MARK)
            sample("x", d.Normal(lib.at(places, z), scale), obs=lib.array(X))

    def guide():
        point(lib, "weights", softmax(lib, lib.param("w")), 1)
        point(lib, "scale", lib.math.exp(lib.param("s")))
        with lib.plate("components", 3):
            drawn(lib, "places", lib.param("m"), lib.param("l"), [0.3, -0.8, 1.2])

    return model, guide, {"w": normal(3), "s": normal(), "m": normal(3), "l": normal(3)}


def switches(lib):
    """Latent values that depend on each other in guide and model, all enumerated in the guide."""
    d, sample = lib.dist, lib.sample

    def model():
        with lib.plate("data", 7):
            a = sample("a", d.Bernoulli(logits=lib.array(0.4)))
            b = sample("b", d.Bernoulli(logits=0.3 - a))
            c = sample("c", d.Bernoulli(logits=0.8 * a * b - 0.2))
            sample("x", d.Normal(lib.param("m") * a - b + 0.5 * c, 1.0), obs=lib.array(X))

    def guide():
        with lib.plate("data", 7):
            a = sample("a", d.Bernoulli(logits=lib.param("a0")), infer=MARK)
            b = sample("b", d.Bernoulli(logits=lib.param("b0") + a), infer=MARK)
            sample("c", d.Bernoulli(logits=lib.param("c0") - b), infer=MARK)

    return model, guide, {"m": normal(), "a0": normal(7), "b0": normal(), "c0": normal(7)}


# ---- annotators: which of 3 classes each of 5 items has, from what 4 annotators say of it ---------------------------

SAID = GENERATOR.integers(0, 3, size=(4, 5))
WHO = np.arange(4)[:, None]


def annotated(lib, likelihood, sites=lambda lib: None, guide=lambda lib: None, **params):
    d, sample = lib.dist, lib.sample

    def model():
        more = sites(lib)
        with lib.plate("item", 5, dim=-1):
            c = sample("c", d.Categorical(logits=lib.param("pi")), infer=MARK)
            likelihood(lib, c, more)

    return model, lambda: guide(lib), {"pi": normal(3), **{n: normal(*s) for n, s in params.items()}}


def said(lib, logits):
    lib.sample("y", lib.dist.Categorical(logits=logits), obs=lib.array(SAID))


def multinomial(lib):
    def likelihood(lib, c, _):
        with lib.plate("position", 4, dim=-2):
            said(lib, lib.param("zeta")[c])

    return annotated(lib, likelihood, zeta=(3, 3))


def dawid_skene(lib):
    def likelihood(lib, c, _):
        with lib.plate("position", 4, dim=-2):
            said(lib, lib.param("beta")[lib.array(WHO), c])

    return annotated(lib, likelihood, beta=(4, 3, 3))


def mace(lib):
    """An annotator may answer without looking."""

    def likelihood(lib, c, _):
        with lib.plate("position", 4, dim=-2):
            s = lib.sample("s", lib.dist.Bernoulli(logits=lib.param("theta")[lib.array(WHO)]), infer=MARK)
            honest = 5.0 * (lib.array(np.arange(3)) == c[..., None])
            said(lib, lib.math.where(s[..., None] == 0, honest, lib.param("epsilon")[lib.array(WHO)]))

    return annotated(lib, likelihood, theta=(4,), epsilon=(4, 3))


def hierarchical_dawid_skene(lib):
    """Each annotator's confusion is drawn about a common one."""

    def sites(lib):
        with lib.plate("annotator", 4, dim=-2), lib.plate("class", 3, dim=-1):
            return lib.sample("beta", lib.dist.Normal(lib.param("zeta"), 1.0).to_event(1))

    def guide(lib):
        with lib.plate("annotator", 4, dim=-2), lib.plate("class", 3, dim=-1):
            value = lib.param("m") + lib.math.exp(lib.param("l")) * lib.array(np.linspace(-1, 1, 36).reshape(4, 3, 3))
            log_q = lib.dist.Normal(lib.param("m"), lib.math.exp(lib.param("l"))).log_prob(value).sum(-1)
            lib.sample("beta", lib.dist.Delta(value, log_density=log_q, event_dim=1))

    def likelihood(lib, c, beta):
        with lib.plate("position", 4, dim=-2):
            said(lib, beta[lib.array(WHO), c])

    return annotated(lib, likelihood, sites, guide, zeta=(3, 3), m=(4, 3, 3), l=(4, 3, 3))


def item_difficulty(lib):
    """A drawn site's law depends on the summed class."""

    def guide(lib):
        with lib.plate("item", 5, dim=-1):
            point(lib, "theta", lib.param("t"), 1)

    def likelihood(lib, c, _):
        eta = lib.param("eta")[c]
        theta = lib.sample("theta", lib.dist.Normal(eta, 0.7).to_event(1))
        with lib.plate("position", 4, dim=-2):
            said(lib, theta + 0 * eta)

    return annotated(lib, likelihood, guide=guide, eta=(3, 3), t=(5, 3))


def logistic_random_effects(lib):
    def guide(lib):
        with lib.plate("annotator", 4, dim=-2), lib.plate("class", 3, dim=-1):
            point(lib, "beta", lib.param("b"), 1)
        with lib.plate("item", 5, dim=-1):
            point(lib, "theta", lib.param("t"), 1)

    def sites(lib):
        with lib.plate("annotator", 4, dim=-2), lib.plate("class", 3, dim=-1):
            return lib.sample("beta", lib.dist.Normal(lib.param("zeta"), 1.0).to_event(1))

    def likelihood(lib, c, beta):
        theta = lib.sample("theta", lib.dist.Normal(0.0, lib.math.exp(lib.param("chi")[c])).to_event(1))
        with lib.plate("position", 4, dim=-2):
            said(lib, beta[lib.array(WHO), c] - theta)

    return annotated(lib, likelihood, sites, guide, zeta=(3, 3), b=(4, 3, 3), chi=(3, 3), t=(5, 3))


# ---- topics: words of documents, some of whose topics are amortised -------------------------------------------------

WORDS = GENERATOR.integers(0, 6, size=(5, 4))  # [word, document]


def topics(lib):
    d, sample = lib.dist, lib.sample

    def model():
        with lib.plate("topics", 3):
            weights = sample("weights", d.Gamma(lib.array(1.0 / 3), 1.0))
            of_topic = sample("of_topic", d.Dirichlet(lib.array(np.full(6, 0.5))))
        with lib.plate("documents", 4, dim=-1):
            of_document = sample("of_document", d.Dirichlet(weights))
            with lib.plate("words", 5, dim=-2):
                topic = sample("topic", d.Categorical(of_document), infer=MARK)
                sample("word", d.Categorical(of_topic[topic]), obs=lib.array(WORDS))

    def guide():
        with lib.plate("topics", 3):
            point(lib, "weights", lib.math.exp(lib.param("w")))
            point(lib, "of_topic", softmax(lib, lib.param("t")), 1)
        counts = (lib.array(WORDS)[..., None] == lib.array(np.arange(6))).sum(0) * 1.0
        with lib.plate("documents", 4, dim=-1):
            point(lib, "of_document", softmax(lib, lib.math.matmul(lib.array(1.0) * counts, lib.param("net"))), 1)

    return model, guide, {"w": normal(3), "t": normal(3, 6), "net": normal(6, 3)}


# ---- autoencoders with a label that some data lack ------------------------------------------------------------------

PIXELS, LABELS = normal(4, 3), np.array([2, 0])
NOISE = np.random.default_rng(1).normal(size=(4, 2))


def semi_supervised(lib):
    d, sample = lib.dist, lib.sample

    def decoded(z, y):
        return lib.math.tanh(lib.math.matmul(z, lib.param("u")) + lib.param("v")[y])

    def model():
        for part, count, seen in (("seen", 2, True), ("unseen", 4, False)):
            with lib.plate(part, count):
                y = sample(
                    f"y {part}", d.Categorical(lib.array(np.full(3, 1 / 3))), obs=lib.array(LABELS) if seen else None
                )
                z = sample(f"z {part}", d.Normal(lib.array(np.zeros(2)), 1.0).to_event(1))
                sample(f"x {part}", d.Normal(decoded(z, y), 0.5).to_event(1), obs=lib.array(PIXELS[:count]))

    def guide():
        for part, count, seen in (("seen", 2, True), ("unseen", 4, False)):
            x = lib.array(PIXELS[:count])
            with lib.plate(part, count):
                if seen:
                    y = lib.array(LABELS)
                else:
                    y = sample(f"y {part}", d.Categorical(logits=lib.math.matmul(x, lib.param("label"))), infer=MARK)
                place = lib.math.matmul(x, lib.param("m")) + lib.param("n")[y]
                scale = lib.math.exp(lib.param("s"))[y]
                value = place + scale * lib.array(NOISE[:count])
                log_q = d.Normal(place, scale).log_prob(value).sum(-1)
                sample(f"z {part}", d.Delta(value, log_density=log_q, event_dim=1))

    shapes = {"u": (2, 3), "v": (3, 3), "label": (3, 3), "m": (3, 2), "n": (3, 2), "s": (3, 2)}
    return model, guide, {n: normal(*s) for n, s in shapes.items()}


def annotated_cells(lib):
    """scANVI: a code of a code, whose label is enumerated in the guide, below a drawn one."""
    d, sample = lib.dist, lib.sample

    def model():
        with lib.plate("batch", 4):
            z1 = sample("z1", d.Normal(lib.array(np.zeros(2)), 1.0).to_event(1))
            y = sample("y", d.Categorical(logits=lib.array(np.zeros(3))))
            z2 = sample("z2", d.Normal(lib.math.matmul(z1, lib.param("a")) + lib.param("b")[y], 1.0).to_event(1))
            size = sample("size", d.LogNormal(lib.array(0.1), 0.4))
            rate = lib.math.exp(lib.math.matmul(z2, lib.param("r")) * 0.2) * size[..., None]
            sample("x", d.Poisson(rate).to_event(1), obs=lib.array(np.abs(np.round(PIXELS))))

    def code(name, place, log_scale):
        value = place + lib.math.exp(log_scale) * lib.array(NOISE)
        log_q = d.Normal(place, lib.math.exp(log_scale)).log_prob(value).sum(-1)
        return sample(name, d.Delta(value, log_density=log_q, event_dim=1))

    def guide():
        x = lib.array(PIXELS)
        with lib.plate("batch", 4):
            point(lib, "size", lib.math.exp(lib.param("l")))
            z2 = code("z2", lib.math.matmul(x, lib.param("e")), lib.param("s"))
            y = sample("y", d.Categorical(logits=lib.math.matmul(z2, lib.param("label"))), infer=MARK)
            code("z1", lib.math.matmul(z2, lib.param("f")) + lib.param("g")[y], lib.param("h"))

    shapes = {"a": (2, 2), "b": (3, 2), "r": (2, 3), "l": (4,), "e": (3, 2), "s": (2,), "label": (2, 3), "f": (2, 2),
              "g": (3, 2), "h": (2,)}  # fmt: skip
    return model, guide, {n: normal(*s) for n, s in shapes.items()}


# ---- along time: two sequences, of five and three steps, of two tones -----------------------------------------------

TONES, LENGTHS = GENERATOR.integers(0, 2, size=(5, 2, 2)), np.array([5, 3])  # [step, sequence, tone]


def along(lib, step, start, steps=5, history=1):
    """``step(carry, t, name)``; in Pyro every site has a name for each step."""
    if lib is Torch:
        carry = start
        for t in pyro.markov(range(steps), history=history):
            carry = step(carry, t, lambda name, t=t: f"{name} {t}")
        return carry
    return scan(lambda c, t: (step(c, t, lambda name: name), None), start, jnp.arange(steps), history=history)[0]


def state(lib, name, *table):
    return lib.sample(name, lib.dist.Categorical(logits=lib.at(*table, slice(None))), infer=MARK)


def sequences(lib, start, step, history=1, end=None, **shapes):
    """``step(p, carry, t, name, hear)`` in a plate of sequences, whose ends are masked; ``hear`` makes tones of logits,
    or of a table and states."""

    def model():
        p = {n: lib.param(n) for n in shapes}
        plate, tones = lib.plate("sequences", 2, dim=-2), lib.plate("tones", 2, dim=-1)

        def one(carry, t, name):
            def hear(logits, *states):
                with tones:
                    if states:
                        logits = lib.at(logits, *states, lib.array(np.arange(2)))
                    return lib.sample(name("y"), lib.dist.Bernoulli(logits=logits), obs=1.0 * lib.array(TONES)[t])

            with plate, lib.handlers.mask(mask=(lib.array(LENGTHS) > t)[:, None]):
                carry = step(p, carry, t, name, hear)
            return finish(carry) if end and lib is Torch and t == 4 else carry  # its last values are not seen outside

        def finish(carry):
            with plate:
                end(p, carry)
            return carry

        last = along(lib, one, start, history=history)
        if end and lib is Jax:
            finish(last)

    return model, lambda: None, {n: normal(*shape) for n, shape in shapes.items()}


def hidden_markov(lib):
    def step(p, x, t, name, hear):
        x = state(lib, name("x"), p["table"], x)
        hear(p["tone"], x)
        return x

    return sequences(lib, 0, step, table=(3, 3), tone=(3, 2))


def one_sequence_after_another(lib):
    """Pyro's sequential plate."""

    def model():
        table, tone, tones = lib.param("table"), lib.param("tone"), lib.plate("tones", 2)
        for i in pyro.plate("sequences", 2):
            x = 0
            for t in pyro.markov(range(LENGTHS[i])):
                x = state(lib, f"x {i} {t}", table, x)
                with tones:
                    logits = lib.at(tone, x, lib.array(np.arange(2)))
                    pyro.sample(f"y {i} {t}", tdist.Bernoulli(logits=logits), obs=1.0 * lib.array(TONES)[t, i])

    return model, lambda: None, {"table": normal(3, 3), "tone": normal(3, 2)}


def tones_lead_to_tones(lib):
    def step(p, carry, t, name, hear):
        x, y = carry
        x = state(lib, name("x"), p["table"], x)
        return x, hear(p["tone"], x, lib.whole(y))

    return sequences(lib, (0, lib.array(np.zeros((2, 2)))), step, table=(3, 3), tone=(3, 2, 2))


def two_chains(lib):
    def step(p, carry, t, name, hear):
        w, x = state(lib, name("w"), p["of w"], carry[0]), state(lib, name("x"), p["of x"], carry[1])
        hear(p["tone"], w, x)
        return w, x

    return sequences(lib, (0, 0), step, **{"of w": (3, 3), "of x": (2, 2), "tone": (3, 2, 2)})


def one_chain_leads_the_other(lib):
    def step(p, carry, t, name, hear):
        w = state(lib, name("w"), p["of w"], carry[0])
        x = state(lib, name("x"), p["of x"], w, carry[1])
        hear(p["tone"], w, x)
        return w, x

    return sequences(lib, (0, 0), step, **{"of w": (3, 3), "of x": (3, 2, 2), "tone": (3, 2, 2)})


def network(lib):
    """The tones' law is a network of the state and of the tones before."""

    def step(p, carry, t, name, hear):
        x, y = carry
        x = state(lib, name("x"), p["table"], x)
        hidden = lib.at(p["in"], x, slice(None)) + lib.math.matmul(y, p["recur"])[..., None, :]
        return x, hear(lib.math.matmul(lib.math.tanh(hidden), p["out"])[..., 0, :])

    shapes = {"table": (3, 3), "in": (3, 4), "recur": (2, 4), "out": (4, 2)}
    return sequences(lib, (0, lib.array(np.zeros((2, 2)))), step, **shapes)


def second_order(lib):
    def step(p, carry, t, name, hear):
        before, last = carry
        x = state(lib, name("x"), p["table"], before, last)
        hear(p["tone"], x)
        return last, x

    def end(p, carry):  # the last two states are of use after the steps
        lib.sample("end", lib.dist.Normal(lib.at(p["place"], *carry), 1.0), obs=lib.array([[0.3], [-0.8]]))

    return sequences(lib, (0, 0), step, 2, end, table=(3, 3, 3), tone=(3, 2), place=(3, 3))


STEPS, SEEN = normal(4, 3, 2), np.array([[True, True], [True, False], [True, True]])  # [step, individual, group]


def mixed_effects(lib):
    """Groups of individuals, each with a discrete effect, move through states; of some nothing is known."""
    d = lib.dist
    shapes = {"of": (2,), "each": (3,), "table": (3, 3), "a": (2, 3), "b": (3, 3), "place": (3,)}

    def model():
        p = {n: lib.param(n) for n in shapes}
        groups, individuals = lib.plate("groups", 2, dim=-1), lib.plate("individuals", 3, dim=-2)
        with groups:
            of_group = state(lib, "of group", p["of"])
            with individuals:
                of_one = state(lib, "of one", p["each"])

        def step(y, t, name):
            with groups, individuals, lib.handlers.mask(mask=lib.array(SEEN)):
                y = state(lib, name("y"), p["table"][y] + p["a"][of_group] + p["b"][of_one])
                lib.sample(name("x"), d.Normal(p["place"][y], 1.0), obs=lib.array(STEPS)[t])
            return y

        along(lib, step, 0, 4)

    return model, lambda: None, {n: normal(*shape) for n, shape in shapes.items()}


CAUGHT = np.array([[1, 1, 0, 0, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]]).T  # [year, animal]
NEW = 1.0 * (CAUGHT.argmax(0) == np.arange(5)[:, None])


def recapture(lib, survival, capture, guide=None, **shapes):
    """Cormack, Jolly & Seber: an animal lives from its first capture on, until it does not."""

    def model():
        p = {n: lib.param(n) for n in shapes}
        animals = lib.plate("animals", 3)

        def step(alive, t, name):
            phi, rho = survival(p, t, name), capture(p, t, name)
            with animals, lib.handlers.mask(mask=lib.array(CAUGHT.argmax(0)) <= t):
                new = lib.array(NEW)[t]
                z = lib.sample(name("z"), lib.dist.Bernoulli(new + (1 - new) * alive * phi), infer=MARK)
                lib.sample(name("y"), lib.dist.Bernoulli(z * rho), obs=1.0 * lib.array(CAUGHT)[t])
            return z

        along(lib, step, lib.array(np.ones(3, int)))

    return model, guide or (lambda: None), {n: normal(*shape) for n, shape in shapes.items()}


def chance(lib, logits):
    return 1 / (1 + lib.math.exp(-logits))


def constant_recapture(lib):
    return recapture(
        lib, lambda p, *_: chance(lib, p["phi"]), lambda p, *_: chance(lib, p["rho"]), phi=(), rho=()
    )  # fmt: skip


def recapture_by_year(lib):
    """Survival of each year is a site of its own, about a common place."""

    def survival(p, t, name):
        return chance(lib, lib.sample(name("phi"), lib.dist.Normal(p["place"], 0.8)))

    def guide():
        years = lib.param("years")

        def step(carry, t, name):
            point(lib, name("phi"), years[t])
            return carry

        along(lib, step, 0)

    return recapture(lib, survival, lambda p, *_: chance(lib, p["rho"]), guide, place=(), years=(5,), rho=())


def recapture_by_group(lib):
    """And of each group of animals, as their capture."""
    group = np.array([0, 1, 1])
    return recapture(
        lib, lambda p, *_: chance(lib, p["phi"][group]), lambda p, *_: chance(lib, p["rho"][group]), phi=(2,), rho=(2,)
    )


PROGRAMS = [
    gaussian_mixture, switches, multinomial, dawid_skene, mace, hierarchical_dawid_skene, item_difficulty,
    logistic_random_effects, topics, semi_supervised, annotated_cells, hidden_markov, one_sequence_after_another,
    tones_lead_to_tones, two_chains, one_chain_leads_the_other, network, second_order, mixed_effects,
    constant_recapture, recapture_by_year, recapture_by_group,
]  # fmt: skip


def in_pyro(elbo, model, guide, params):
    pyro.clear_param_store()
    for name, value in params.items():
        pyro.param(name, torch.tensor(value, dtype=torch.float64))
    loss = elbo.loss_and_grads(model, guide)
    grads = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
    pyro.clear_param_store()
    return loss, {n: torch.zeros(()) if g is None else g for n, g in grads.items()}


@pytest.fixture(autouse=True)
def doubles(double_precision):
    pass


def nesting_of(program):
    one = (gaussian_mixture, switches, semi_supervised, annotated_cells, one_sequence_after_another, constant_recapture,
           recapture_by_year, recapture_by_group)  # fmt: skip
    return 1 if program in one else 2


def _agree(ours, theirs):
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-9)
    for name, gradient in theirs[1].items():
        np.testing.assert_allclose(ours[1][name], gradient, rtol=1e-8, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_pyro(program):
    model, guide, params = program(Torch)
    nesting = nesting_of(program)
    ours, theirs = TorchELBO(max_plate_nesting=nesting, verify=False), TraceEnum_ELBO(max_plate_nesting=nesting)
    _agree(in_pyro(ours, model, guide, params), in_pyro(theirs, model, guide, params))


QUICK = (mace, annotated_cells, second_order)  # plates, values of the guide beside draws, steps
IN_NUMPYRO = [p for p in PROGRAMS if p is not one_sequence_after_another]


@pytest.mark.parametrize(
    "program", [pytest.param(p, marks=[pytest.mark.slow] * (p not in QUICK), id=p.__name__) for p in IN_NUMPYRO]
)
def test_numpyro(program):
    *twin, params = program(Torch)
    theirs = in_pyro(TraceEnum_ELBO(max_plate_nesting=nesting_of(program)), *twin, params)
    model, guide, _ = program(Jax)
    elbo, point = JaxELBO(), {n: jnp.asarray(v) for n, v in params.items()}
    ours = jax.jit(jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide)))(point)
    _agree(ours, theirs)
