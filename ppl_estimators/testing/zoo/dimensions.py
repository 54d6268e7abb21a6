"""Masks, batches, events and plates: which elements depend on each other."""

import numpy as np

from .case import apart, finite
from .oracle import bernoulli, bits, normal

# Masks: the log-probabilities of masked latents are gone, their influence on others is not.

MASK = np.array([True, False, True])
SEEN = np.array([True, True, False])
MASKED_X = np.array([1.1, -0.7, 0.4])


def masked(ppl, init, mask_latents, mask_observed):
    """z_0 and z_2 have a prior; all three act on x; the last x is not seen."""

    def model():
        with ppl.plate("plate", 3):
            z = mask_latents("z", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
            mask_observed("x", ppl.dist.Normal(2.0 * z - 0.3, 1.0), obs=ppl.array(MASKED_X))

    def guide():
        with ppl.plate("plate", 3):
            mask_latents("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def masked_by_handler(ppl, init):
    def under(mask):
        def sample(name, fn, **kwargs):
            with ppl.mask(ppl.array(mask)):
                return ppl.sample(name, fn, **kwargs)

        return sample

    return masked(ppl, init, under(MASK), under(SEEN))


def masked_by_distribution(ppl, init):
    def under(mask):
        return lambda name, fn, **kwargs: ppl.sample(name, fn.mask(ppl.array(mask)), **kwargs)

    return masked(ppl, init, under(MASK), under(SEEN))


MASKED = {"a": [0.7, -0.9, 1.4], "t": -0.4}


@finite(masked_by_handler, "L2 B4", MASKED)
@finite(masked_by_distribution, "L2 B4", MASKED)
def masked_states(p):
    for state in bits(3):
        z = np.array(state)
        log_q = bernoulli(z, p["a"])
        prior = (bernoulli(z, p["t"]) - log_q)[MASK].sum()
        yield log_q.sum(), prior + normal(MASKED_X, 2 * z - 0.3)[SEEN].sum()


# Three bits that no plate declares independent, each acting on everything.

JOINT_X = np.array([1.2, -0.6, 0.9])
JOINT_MATRIX = np.array([[1.0, 2.0, -1.5], [-0.5, 1.5, 1.0], [2.0, -1.0, 0.7]])


def undeclared(ppl, init):
    """A batch dimension without a plate, in the guide, the prior and the likelihood."""

    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array([0.4, -0.5, 0.3])))
        loc = ppl.mix(ppl.array(JOINT_MATRIX), z)
        ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(JOINT_X))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def event(ppl, init):
    """The same, declared as events."""

    def model():
        prior = ppl.dist.Bernoulli(logits=ppl.array([0.4, -0.5, 0.3])).to_event(1)
        z = ppl.sample("z", prior)
        loc = ppl.mix(ppl.array(JOINT_MATRIX), z)
        ppl.sample("x", ppl.dist.Normal(loc, 1.0).to_event(1), obs=ppl.array(JOINT_X))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)).to_event(1))

    return model, guide


JOINT = {"a": [0.7, -0.9, 1.4]}


@finite(undeclared, "L3 B15", JOINT, nesting=1, strict=False)
@finite(event, "L3", JOINT)
def joint_states(p):
    for state in bits(3):
        z = np.array(state)
        log_q = bernoulli(z, p["a"]).sum()
        log_p = bernoulli(z, np.array([0.4, -0.5, 0.3])).sum()
        yield log_q, log_p + normal(JOINT_X, JOINT_MATRIX @ z).sum() - log_q


# Two plates that cross.

CROSSED_X = np.array([[1.0, -0.5], [0.3, 1.8], [-1.1, 0.6]])


def crossed(ppl, init):
    def model():
        columns, rows = ppl.plate("columns", 2, dim=-1), ppl.plate("rows", 3, dim=-2)
        with columns:
            z = ppl.sample("z_column", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        with rows:
            k = ppl.sample("z_row", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        with columns, rows:
            loc = 1.5 * z * k + 0.7 * z - k
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(CROSSED_X))

    def guide():
        columns, rows = ppl.plate("columns", 2, dim=-1), ppl.plate("rows", 3, dim=-2)
        with columns:
            ppl.sample("z_column", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        with rows:
            ppl.sample("z_row", ppl.dist.Bernoulli(logits=ppl.param("b", init)))

    return model, guide


@finite(crossed, "L3", {"a": [0.7, -0.9], "b": [[0.5], [-1.2], [0.9]]})
def crossed_states(p):
    for state in bits(5):
        z, k = np.array(state[:2]), np.array(state[2:])[:, None]
        log_q = bernoulli(z, p["a"]).sum() + bernoulli(k, p["b"]).sum()
        log_p = bernoulli(z, -0.4).sum() + bernoulli(k, 0.3).sum()
        yield log_q, log_p + normal(CROSSED_X, 1.5 * z * k + 0.7 * z - k).sum() - log_q


# Nested plates, with a cost of the outer plate that sees all of the inner one.

NESTED_X = np.array([[1.0, -0.5, 0.4], [0.3, 1.8, -0.9]])
NESTED_Y = np.array([[1.4], [0.2]])


def nested(ppl, init):
    def model():
        with ppl.plate("outer", 2, dim=-2):
            z = ppl.sample("z_outer", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            with ppl.plate("inner", 3, dim=-1):
                k = ppl.sample("z_inner", ppl.dist.Bernoulli(logits=0.5 - 0.9 * z))
                ppl.sample("x", ppl.dist.Normal(k - 1.2 * z * k, 1.0), obs=ppl.array(NESTED_X))
            loc = 0.8 * ppl.total(k) - z
            ppl.sample("y", ppl.dist.Normal(loc, 1.0), obs=ppl.array(NESTED_Y))

    def guide():
        with ppl.plate("outer", 2, dim=-2):
            z = ppl.sample("z_outer", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
            with ppl.plate("inner", 3, dim=-1):
                logits = ppl.param("b", init) + ppl.param("c", init) * z
                ppl.sample("z_inner", ppl.dist.Bernoulli(logits=logits))

    return model, guide


@apart(nested, "L3", {"a": [[0.7], [-0.9]], "b": [[0.5, -1.2, 0.9], [-0.6, 0.8, 1.3]], "c": 0.7}, 2)
def nested_states(p, o):
    for state in bits(4):
        z, k = state[0], np.array(state[1:])
        log_q = bernoulli(z, p["a"][o, 0]) + bernoulli(k, p["b"][o] + p["c"] * z).sum()
        log_p = bernoulli(z, -0.4) + bernoulli(k, 0.5 - 0.9 * z).sum()
        log_p = log_p + normal(NESTED_X[o], k - 1.2 * z * k).sum()
        yield log_q, log_p + normal(NESTED_Y[o, 0], 0.8 * k.sum() - z) - log_q


# Out of a plate and in again: z_e reaches x_e' through w.

REENTERED_X = np.array([1.5, -0.4, 0.7])


def reentered(ppl, init, same_plate=False):
    weights = ppl.array([1.5, -2.0, 1.0])

    def plates():
        plate = ppl.plate("plate", 3, dim=-1)
        return plate, plate if same_plate else ppl.plate("again", 3, dim=-1)

    def model():
        plate, again = plates()
        with plate:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.3)))
        w = ppl.sample("z_total", ppl.dist.Bernoulli(logits=ppl.total(0.4 * z)))
        with again:
            k = ppl.sample("z_again", ppl.dist.Bernoulli(logits=0.5 * w - 0.2))
            ppl.sample("x", ppl.dist.Normal(2.0 * w * k - k + w, 0.7), obs=ppl.array(REENTERED_X))

    def guide():
        plate, again = plates()
        b, c = ppl.param("b", init), ppl.param("c", init)
        with plate:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        w = ppl.sample("z_total", ppl.dist.Bernoulli(logits=b + ppl.total(weights * z)))
        with again:
            ppl.sample("z_again", ppl.dist.Bernoulli(logits=c[0] + c[1] * z + c[2] * w))

    return model, guide


def reentered_same_plate(ppl, init):
    """The same with one plate, entered twice."""
    return reentered(ppl, init, same_plate=True)


REENTERED = {"a": [0.7, -0.9, 1.1], "b": 0.4, "c": [-0.6, 1.3, 0.8]}


@finite(reentered, "L3", REENTERED)
@finite(reentered_same_plate, "L3", REENTERED)
def reentered_states(p):
    c = p["c"]
    for state in bits(7):
        z, w, k = np.array(state[:3]), state[3], np.array(state[4:])
        log_q = bernoulli(z, p["a"]).sum()
        log_q = log_q + bernoulli(w, p["b"] + (np.array([1.5, -2.0, 1.0]) * z).sum())
        log_q = log_q + bernoulli(k, c[0] + c[1] * z + c[2] * w).sum()
        log_p = bernoulli(z, -0.3).sum() + bernoulli(w, 0.4 * z.sum())
        log_p = log_p + bernoulli(k, 0.5 * w - 0.2).sum()
        yield log_q, log_p + normal(REENTERED_X, 2 * w * k - k + w, 0.7).sum() - log_q


# The same influence without a site on the way: the total is taken by plain arithmetic.


def summed(ppl, init):
    def model():
        plate = ppl.plate("plate", 3, dim=-1)
        with plate:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.3)))
        total = ppl.total(ppl.array([1.5, -2.0, 1.0]) * z)
        with plate:
            ppl.sample("x", ppl.dist.Normal(total - z, 0.7), obs=ppl.array(REENTERED_X))

    def guide():
        with ppl.plate("plate", 3, dim=-1):
            ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


@finite(summed, "L3", {"a": [0.7, -0.9, 1.1]})
def summed_states(p):
    for state in bits(3):
        z = np.array(state)
        log_q = bernoulli(z, p["a"]).sum()
        log_p = bernoulli(z, -0.3).sum()
        total = (np.array([1.5, -2.0, 1.0]) * z).sum()
        yield log_q, log_p + normal(REENTERED_X, total - z, 0.7).sum() - log_q


# Independent elements in a plate: Rao-Blackwellisation leaves each its own cost.

LOCAL_X = np.array([1.1, -0.7, 0.4])


def local(ppl, init):
    def model():
        with ppl.plate("plate", 3):
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            ppl.sample("x", ppl.dist.Normal(2.0 * z - 0.3, 1.0), obs=ppl.array(LOCAL_X))

    def guide():
        with ppl.plate("plate", 3):
            ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def local_costs(z, a):
    """The downstream cost of each element at z [3]."""
    return bernoulli(z, -0.4) + normal(LOCAL_X, 2 * z - 0.3) - bernoulli(z, a)


@finite(local, "L3 B11", {"a": [0.7, -0.9, 1.4]})
def local_states(p):
    for state in bits(3):
        z = np.array(state)
        yield bernoulli(z, p["a"]).sum(), local_costs(z, p["a"]).sum()


# Forty sites that have nothing to do with each other.


def many_local(ppl, init):
    def model():
        for i in range(40):
            z = ppl.sample(f"z_{i}", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            ppl.sample(f"x_{i}", ppl.dist.Normal(2.0 * z - 0.3, 1.0), obs=ppl.array(0.9))

    def guide():
        a = ppl.param("a", init)
        for i in range(40):
            ppl.sample(f"z_{i}", ppl.dist.Bernoulli(logits=a[i]))

    return model, guide


@apart(many_local, "B11", {"a": np.full(40, 0.7)}, 40)
def many_local_states(p, i):
    for z in (0, 1):
        log_q = bernoulli(z, p["a"][i])
        yield log_q, bernoulli(z, -0.4) + normal(0.9, 2 * z - 0.3) - log_q
