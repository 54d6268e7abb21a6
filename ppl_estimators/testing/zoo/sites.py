"""One site, two, three: chains, scales, a point estimate, a site of the guide's own."""

import numpy as np

from .case import case, finite
from .oracle import bernoulli, bits, expectation, hermite, normal

# One Bernoulli site.


def single(ppl, init):
    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z - 0.5, 1.0), obs=ppl.array(0.8))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


@finite(single, "L1 L6 L8", {"a": 0.7, "t": -0.4})
@finite(single, "B5", {"a": 0.0, "t": -0.4}, name="single_zero")
@finite(single, "B5", {"a": 0.7, "t": 0.0}, name="single_zero_model")
def single_states(p):
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        yield log_q, bernoulli(z, p["t"]) + normal(0.8, 1.5 * z - 0.5) - log_q


# Two dependent Bernoulli sites: a counterfactual z1 must draw z2 afresh.


def chain(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        u, v = ppl.param("u", init), ppl.param("v", init)
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=u + v * z1))
        ppl.sample("x", ppl.dist.Normal(1.5 * z1 - z2 + 2.0 * z1 * z2, 1.0), obs=ppl.array(2.6))

    def guide():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b, c = ppl.param("b", init), ppl.param("c", init)
        ppl.sample("z2", ppl.dist.Bernoulli(logits=b + c * z1))

    return model, guide


CHAIN = {"a": 0.7, "b": 0.6, "c": -1.9, "t": -0.4, "u": 0.3, "v": -0.8}


@finite(chain, "L1 L4 L5 L8", CHAIN)
def chain_states(p):
    for z1, z2 in bits(2):
        log_q = bernoulli(z1, p["a"]) + bernoulli(z2, p["b"] + p["c"] * z1)
        log_p = bernoulli(z1, p["t"]) + bernoulli(z2, p["u"] + p["v"] * z1)
        yield log_q, log_p + normal(2.6, 1.5 * z1 - z2 + 2 * z1 * z2) - log_q


# The same under handlers.scale: the cost is scaled, the score is not.


def scaled(ppl, init):
    model, guide = chain(ppl, init)

    def scaled_model():
        with ppl.scale(0.1):
            model()

    def scaled_guide():
        with ppl.scale(0.1):
            guide()

    return scaled_model, scaled_guide


@finite(scaled, "L2 B1", CHAIN)
def scaled_states(p):
    for log_q, f in chain_states(p):
        yield log_q, 0.1 * f


# Three dependent Bernoulli sites.


def chain3(ppl, init):
    def run(a, b, c, obs):
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=a))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=b[0] + b[1] * z1))
        z3 = ppl.sample("z3", ppl.dist.Bernoulli(logits=c[0] + c[1] * z2 + c[2] * z1 * z2))
        if obs is not None:
            loc = z1 - 1.5 * z2 + 2.0 * z3 - 0.5 * z1 * z3
            ppl.sample("x", ppl.dist.Normal(loc, 0.8), obs=ppl.array(obs))

    def model():
        run(*[ppl.array(v) for v in (-0.4, [0.3, -0.8], [0.2, 0.5, 0.0])], 1.3)

    def guide():
        run(*[ppl.param(name, init) for name in "abc"], None)

    return model, guide


@finite(chain3, "L4 L5", {"a": 0.7, "b": [-1.1, 2.3], "c": [0.6, -1.4, 1.9]})
def chain3_states(p):
    for z1, z2, z3 in bits(3):

        def log_density(a, b, c, z1=z1, z2=z2, z3=z3):
            return bernoulli(z1, a) + bernoulli(z2, b[0] + b[1] * z1) + bernoulli(z3, c[0] + c[1] * z2 + c[2] * z1 * z2)

        log_q = log_density(p["a"], p["b"], p["c"])
        log_p = log_density(-0.4, [0.3, -0.8], [0.2, 0.5, 0.0])
        yield log_q, log_p + normal(1.3, z1 - 1.5 * z2 + 2 * z3 - 0.5 * z1 * z3, 0.8) - log_q


# Discrete, continuous, discrete: λ of the last site depends on a pathwise sample.


def mixed(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        w = ppl.sample("w", ppl.dist.Normal(0.5 * z1, 1.0))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=0.3 * w - 0.2))
        ppl.sample("x", ppl.dist.Normal(w + 1.3 * z2 - z1, 1.0), obs=ppl.array(1.1))

    def guide():
        p = {name: ppl.param(name, init) for name in "amnsbc"}
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=p["a"]))
        w = ppl.sample("w", ppl.dist.Normal(p["m"] + p["n"] * z1, ppl.exp(p["s"])))
        ppl.sample("z2", ppl.dist.Bernoulli(logits=p["b"] + p["c"] * w))

    return model, guide


def mixed_grid(p):
    """A (log weight, f) for each z1, Gauss-Hermite node of w, and z2."""
    weights, values = [], []
    for z1, z2 in bits(2):
        loc, scale = p["m"] + p["n"] * z1, np.exp(p["s"])
        w, weight = hermite(loc, scale, order=40)
        log_q2 = bernoulli(z2, p["b"] + p["c"] * w)
        log_q = bernoulli(z1, p["a"]) + normal(w, loc, scale) + log_q2
        log_p = bernoulli(z1, p["t"]) + normal(w, 0.5 * z1) + bernoulli(z2, 0.3 * w - 0.2)
        weights.append(np.log(weight) + bernoulli(z1, p["a"]) + log_q2)
        values.append(log_p + normal(1.1, w + 1.3 * z2 - z1) - log_q)
    return np.concatenate(weights), np.concatenate(values)


@case(mixed, "L4 L8", {"a": 0.7, "m": 0.4, "n": -0.9, "s": -0.5, "b": -0.6, "c": 1.2, "t": -0.4})
def mixed_elbo(p):
    return expectation(*mixed_grid(p))


# A point estimate of a continuous site above a discrete one.


def delta(ppl, init):
    def model():
        w = ppl.sample("w", ppl.dist.Normal(0.5, 1.0))
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=0.3 * w - 0.2))
        ppl.sample("x", ppl.dist.Normal(w * (1 + z), 1.0), obs=ppl.array(1.1))

    def guide():
        m, b, c = (ppl.param(name, init) for name in "mbc")
        w = ppl.sample("w", ppl.dist.Delta(m))
        ppl.sample("z", ppl.dist.Bernoulli(logits=b + c * w))

    return model, guide


@finite(delta, "L8", {"m": 0.8, "b": -0.6, "c": 1.2})
def delta_states(p):
    w = p["m"]
    for z in (0, 1):
        log_q = bernoulli(z, p["b"] + p["c"] * w)
        log_p = normal(w, 0.5) + bernoulli(z, 0.3 * w - 0.2) + normal(1.1, w * (1 + z))
        yield log_q, log_p - log_q


# A guide-only site.


def auxiliary(ppl, init):
    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z - 0.5, 1.0), obs=ppl.array(0.8))

    def guide():
        fn = ppl.dist.Bernoulli(logits=ppl.param("a", init))
        aux = ppl.sample("z_aux", fn, infer={"is_auxiliary": True})
        logits = ppl.param("b", init) + ppl.param("c", init) * aux
        ppl.sample("z", ppl.dist.Bernoulli(logits=logits))

    return model, guide


@finite(auxiliary, "L12 B7", {"a": 0.9, "b": -1.1, "c": 2.3})
def auxiliary_states(p):
    for aux, z in bits(2):
        log_q = bernoulli(aux, p["a"]) + bernoulli(z, p["b"] + p["c"] * aux)
        yield log_q, bernoulli(z, -0.4) + normal(0.8, 1.5 * z - 0.5) - log_q
