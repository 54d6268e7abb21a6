"""Control flow and time."""

import numpy as np

from .case import finite
from .oracle import bernoulli, bits, categorical, normal

# Control flow that turns a sampled value into a branch. `ppl.branch` is a Python `if` on a number
# taken out of the tensor in Pyro, and lax.cond in NumPyro.


def branching(ppl, init):
    """y comes after the branch and does not use z's tensor; still it depends on it."""

    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        loc = ppl.branch(z, 1.7, -1.9)
        ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(0.8))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


@finite(branching, "L10 B16", {"a": 0.7})
def branching_states(p):
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        yield log_q, bernoulli(z, -0.4) + normal(0.8, 1.7 if z else -1.9) - log_q


SWITCH = [1.7, -0.6, 0.4]


def switching(ppl, init):
    """Three branches: several counterfactual values, each its own way."""

    def model():
        k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array([0.2, -0.3, 0.4])))
        loc = ppl.switch(k, SWITCH)
        ppl.sample("x", ppl.dist.Normal(loc, 0.7), obs=ppl.array(0.8))

    def guide():
        ppl.sample("k", ppl.dist.Categorical(logits=ppl.param("a", init)))

    return model, guide


@finite(switching, "L10 B16", {"a": [0.6, -0.4, 0.1]})
def switching_states(p):
    log_q, log_p = categorical(p["a"]), categorical(np.array([0.2, -0.3, 0.4]))
    for k in range(3):
        yield log_q[k], log_p[k] + normal(0.8, SWITCH[k], 0.7) - log_q[k]


def branching_guide(ppl, init):
    """The branch is in the guide: z2's parameters are chosen by z1's value."""

    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        ppl.sample("x", ppl.dist.Normal(2.5 * z1 - 0.6 * z2, 0.7), obs=ppl.array(1.9))

    def guide():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b = ppl.param("b", init)
        ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.branch(z1, b[1], b[0])))

    return model, guide


@finite(branching_guide, "L10 B16", {"a": 0.7, "b": [-1.1, 1.2]})
def branching_guide_states(p):
    for z1, z2 in bits(2):
        log_q = bernoulli(z1, p["a"]) + bernoulli(z2, p["b"][z1])
        log_p = bernoulli(z1, -0.4) + bernoulli(z2, 0.3)
        yield log_q, log_p + normal(1.9, 2.5 * z1 - 0.6 * z2, 0.7) - log_q


# A site that is there in one branch only. Pyro alone can say this.


def dynamic(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        loc = -0.9
        if z1.item():
            loc = 2.1 - 0.8 * ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        ppl.sample("x", ppl.dist.Normal(loc, 0.8), obs=ppl.array(1.2))

    def guide():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b = ppl.param("b", init)
        if z1.item():
            ppl.sample("z2", ppl.dist.Bernoulli(logits=b))

    return model, guide


@finite(dynamic, "L10 B16", {"a": 0.7, "b": -1.1})
def dynamic_states(p):
    log_q = bernoulli(0, p["a"])
    yield log_q, bernoulli(0, -0.4) + normal(1.2, -0.9, 0.8) - log_q
    for z2 in (0, 1):
        log_q = bernoulli(1, p["a"]) + bernoulli(z2, p["b"])
        log_p = bernoulli(1, -0.4) + bernoulli(z2, 0.3)
        yield log_q, log_p + normal(1.2, 2.1 - 0.8 * z2, 0.8) - log_q


# Time: a Markov guide, as `scan` in NumPyro and as a loop in Pyro.

TIME_X = np.array([1.2, -0.9, 0.7])


def over_time(ppl, init):
    def model():
        def step(z, x):
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=0.9 * z - 0.3))
            ppl.sample("x", ppl.dist.Normal(1.8 * z - 0.4, 0.8), obs=x)
            return z

        ppl.scan(step, ppl.array(0.0), ppl.array(TIME_X))

    def guide():
        c = ppl.param("c", init)

        def step(z, logit):
            return ppl.sample("z", ppl.dist.Bernoulli(logits=logit + c * z))

        ppl.scan(step, ppl.array(0.0), ppl.param("a", init))

    return model, guide


@finite(over_time, "L3 B2", {"a": [0.7, -0.6, 0.9], "c": 1.6})
def over_time_states(p):
    for state in bits(3):
        log_q = log_p = before = 0.0
        for t, z in enumerate(state):
            log_q = log_q + bernoulli(z, p["a"][t] + p["c"] * before)
            log_p = log_p + bernoulli(z, 0.9 * before - 0.3) + normal(TIME_X[t], 1.8 * z - 0.4, 0.8)
            before = z
        yield log_q, log_p - log_q
