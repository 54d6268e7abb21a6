"""Subsampled plates."""

from itertools import combinations, product

import numpy as np

from .case import apart, case
from .oracle import bernoulli, bits, categorical, hermite, normal, sigmoid, softplus

# Subsampling: a global bit, and a local bit for each of four data points, two at a time.

DATA = np.array([-1.2, 0.3, 2.1, 1.7])
COVARIATE = np.array([0.5, -1.0, 1.5, -0.7])
HALVES = ((0, 3), (1, 2))


def subsample(ppl, init):
    def model():
        s = ppl.sample("z_global", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
        with ppl.plate("data", 4, subsample_size=2) as index:
            logits = ppl.param("u", init) + 0.8 * s
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=logits))
            x = ppl.array(DATA)[index]
            ppl.sample("x", ppl.dist.Normal(1.2 * z - s + 0.4 * z * s, 1.0), obs=x)

    def guide():
        s = ppl.sample("z_global", ppl.dist.Bernoulli(logits=ppl.param("a", init)))
        b, c, d = (ppl.param(name, init) for name in "bcd")
        with ppl.plate("data", 4, subsample_size=2) as index:
            logits = b + c * ppl.array(COVARIATE)[index] + d * s
            ppl.sample("z", ppl.dist.Bernoulli(logits=logits))

    return model, guide


@case(subsample, "L2 L9 B1 B3", {"a": 0.7, "t": -0.4, "b": -0.8, "c": 1.1, "d": 0.9, "u": 0.3}, minibatches=HALVES)
def subsample_elbo(p):
    total = 0.0
    for s in (0, 1):
        log_q = bernoulli(s, p["a"])
        f = bernoulli(s, p["t"]) - log_q
        for x, covariate in zip(DATA, COVARIATE, strict=True):
            for z in (0, 1):
                local = bernoulli(z, p["b"] + p["c"] * covariate + p["d"] * s)
                cost = bernoulli(z, p["u"] + 0.8 * s) - local
                cost = cost + normal(x, 1.2 * z - s + 0.4 * z * s)
                f = f + np.exp(local) * cost
        total = total + np.exp(log_q) * f
    return total


# A guide that looks at its data point: only the minibatch that it saw tells whether it is right.

AMORTISED_X = np.array([-1.2, 1.5, -0.9, 1.1])


def amortised(ppl, init, infer=None):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(0.3)), infer=infer or {})
            x = ppl.array(AMORTISED_X)[index]
            ppl.sample("x", ppl.dist.Normal(2.0 * z - 1.0, 0.7), obs=x)

    def guide():
        c = ppl.param("c", init)
        with ppl.plate("data", 4, subsample_size=2) as index:
            logits = c * ppl.array(AMORTISED_X)[index]
            ppl.sample("z", ppl.dist.Bernoulli(logits=logits), infer=infer or {})

    return model, guide


@apart(amortised, "L9 B3", {"c": 0.8}, 4, minibatches=HALVES)
def amortised_states(p, i):
    x = AMORTISED_X[i]
    for z in (0, 1):
        log_q = bernoulli(z, p["c"] * x)
        yield log_q, bernoulli(z, 0.3) + normal(x, 2 * z - 1.0, 0.7) - log_q


# Chains inside a subsampled plate: two bits; an integer categorical and a one-hot one.


def subsampled_bits(ppl, init):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            z = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
            k = ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.param("t", init) - 1.5 * z))
            x = ppl.array(DATA)[index]
            ppl.sample("x", ppl.dist.Normal(1.2 * z - k + 2.0 * z * k, 1.0), obs=x)

    def guide():
        a, b, c = (ppl.param(name, init) for name in "abc")
        with ppl.plate("data", 4, subsample_size=2) as index:
            covariate = ppl.array(COVARIATE)[index]
            z = ppl.sample("z1", ppl.dist.Bernoulli(logits=a + 0.8 * covariate))
            ppl.sample("z2", ppl.dist.Bernoulli(logits=b + c * z - 0.5 * covariate))

    return model, guide


@apart(subsampled_bits, "L2 L4 L9", {"a": 0.9, "b": -0.7, "c": 1.6, "t": 0.5}, 4, minibatches=HALVES)
def subsampled_bits_states(p, i):
    for z, k in bits(2):
        log_q = bernoulli(z, p["a"] + 0.8 * COVARIATE[i]) + bernoulli(k, p["b"] + p["c"] * z - 0.5 * COVARIATE[i])
        log_p = bernoulli(z, -0.4) + bernoulli(k, p["t"] - 1.5 * z) + normal(DATA[i], 1.2 * z - k + 2.0 * z * k)
        yield log_q, log_p - log_q


# A bit, and a Normal whose mean it moves.


def subsampled_mix(ppl, init):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("t", init)))
            w = ppl.sample("w", ppl.dist.Normal(0.8 * z, 1.0))
            ppl.sample("x", ppl.dist.Normal(w + 0.5 * z * w, 1.0), obs=ppl.array(DATA)[index])

    def guide():
        a, m, c = (ppl.param(name, init) for name in "amc")
        with ppl.plate("data", 4, subsample_size=2) as index:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=a + 0.8 * ppl.array(COVARIATE)[index]))
            ppl.sample("w", ppl.dist.Normal(m + c * z, 0.7))

    return model, guide


@apart(subsampled_mix, "L2 L4 L9", {"a": 0.9, "m": -1.1, "c": 1.6, "t": -0.7}, 4, minibatches=HALVES)
def subsampled_mix_states(p, i):
    for z in (0, 1):
        log_q, loc = bernoulli(z, p["a"] + 0.8 * COVARIATE[i]), p["m"] + p["c"] * z
        w, weight = hermite(loc, 0.7)
        log_p = bernoulli(z, p["t"]) + normal(w, 0.8 * z) + normal(DATA[i], w + 0.5 * z * w)
        yield log_q, (weight * (log_p - log_q - normal(w, loc, 0.7))).sum()


# Two dependent counts; the sum over the Poisson stops where nothing is left.


def subsampled_counts(ppl, init):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            z = ppl.sample("z1", ppl.dist.Poisson(ppl.array(1.4)))
            k = ppl.sample("z2", ppl.dist.Binomial(3, logits=ppl.param("t", init) - 0.5 * z))
            ppl.sample("x", ppl.dist.Normal(0.9 * z - k, 1.0), obs=ppl.array(DATA)[index])

    def guide():
        a, b, c = (ppl.param(name, init) for name in "abc")
        with ppl.plate("data", 4, subsample_size=2) as index:
            covariate = ppl.array(COVARIATE)[index]
            z = ppl.sample("z1", ppl.dist.Poisson(ppl.exp(a + 0.4 * covariate)))
            ppl.sample("z2", ppl.dist.Binomial(3, logits=b + c * z))

    return model, guide


@apart(subsampled_counts, "L2 L4 L9", {"a": 0.9, "b": 0.6, "c": -0.4, "t": 0.8}, 4, minibatches=HALVES)
def subsampled_counts_states(p, i):
    z, k = np.arange(40.0)[:, None], np.arange(4.0)
    factorials = np.cumsum(np.log(np.maximum(np.arange(40.0), 1)))[:, None]
    choices = np.log(np.array([1.0, 3.0, 3.0, 1.0]))

    def log_law(log_rate, logits):
        return z * log_rate - np.exp(log_rate) - factorials + choices + k * logits - 3 * softplus(logits)

    log_q = log_law(p["a"] + 0.4 * COVARIATE[i], p["b"] + p["c"] * z)
    log_p = log_law(np.log(1.4), p["t"] - 0.5 * z) + normal(DATA[i], 0.9 * z - k)
    yield log_q, log_p - log_q


PRIOR_K = [0.2, -0.3, 0.4, 0.0]
PRIOR_Z = [[0.5, -0.2, 0.1, 0.4], [-0.4, 0.6, 0.0, 0.3], [0.3, 0.3, -0.9, 0.0], [0.1, -0.5, 0.7, 0.2]]
LOC_K, LOC_Z = [-1.0, 0.5, 2.0, -0.3], [1.2, -0.7, 0.4, 2.1]


def subsampled_categories(ppl, init):
    def model():
        with ppl.plate("data", 4, subsample_size=2) as index:
            k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array(PRIOR_K)))
            z = ppl.sample("z", ppl.one_hot(ppl.array(PRIOR_Z)[k]))
            loc = ppl.array(LOC_K)[k] * ppl.dot(z, ppl.array(LOC_Z))
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(DATA)[index])

    def guide():
        a, b = ppl.param("a", init), ppl.param("b", init)
        with ppl.plate("data", 4, subsample_size=2) as index:
            k = ppl.sample("k", ppl.dist.Categorical(logits=a * (1.0 + 0.3 * ppl.array(COVARIATE)[index][:, None])))
            ppl.sample("z", ppl.one_hot(b[k]))

    return model, guide


SUBSAMPLED_CATEGORIES = {
    "a": [0.6, -0.9, 0.2, 1.1],
    "b": [[0.8, -0.6, 0.3, 0.0], [-0.2, 0.9, -0.5, 0.4], [0.4, 0.1, -1.0, 0.7], [-0.3, 0.2, 1.2, -0.8]],
}


@apart(subsampled_categories, "L2 L4 L9", SUBSAMPLED_CATEGORIES, 4, minibatches=HALVES)
def subsampled_categories_states(p, i):
    prior, rows = categorical(np.array(PRIOR_K)), categorical(np.array(PRIOR_Z))
    for k, z in product(range(4), repeat=2):
        log_q = categorical(p["a"] * (1 + 0.3 * COVARIATE[i]))[k] + categorical(p["b"][k])[z]
        yield log_q, prior[k] + rows[k, z] + normal(DATA[i], LOC_K[k] * LOC_Z[z]) - log_q


# Minibatches told apart by what they cost: no two pairs of BATCH_X have the same sum.

BATCH_X = np.array([0.3, 1.1, -2.3, 4.6, -8.2, 13.7])
BATCH_LOGIT = 0.8


def minibatch_local(ppl, init, slope=1.0):
    """Subsampling in model and guide. The guide is at the prior: only the data costs."""

    def model():
        with ppl.plate("data", 6, subsample_size=2) as index:
            z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(BATCH_LOGIT)))
            x = ppl.array(BATCH_X)[index]
            ppl.sample("x", ppl.dist.Normal(slope * z, 1.0), obs=x)

    def guide():
        with ppl.plate("data", 6, subsample_size=2):
            ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


def minibatch_global(ppl, init, slope=1.0):
    """Subsampling in the model only."""

    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(BATCH_LOGIT)))
        with ppl.plate("data", 6, subsample_size=2) as index:
            x = ppl.array(BATCH_X)[index]
            ppl.sample("x", ppl.dist.Normal(slope * z, 1.0), obs=x)

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


# At a = BATCH_LOGIT the six priors and entropies of the local one cancel one by one, as the single one does.


@apart(minibatch_global, "L9", {"a": BATCH_LOGIT}, 1)
@apart(minibatch_local, "L9", {"a": BATCH_LOGIT}, 1)
def minibatch_states(p, _):
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        yield log_q, bernoulli(z, BATCH_LOGIT) - log_q + normal(BATCH_X, z).sum()


def minibatch_sums(of):
    """3 (of_i + of_j) for every pair of data points."""
    return np.array([3.0 * (of[i] + of[j]) for i, j in combinations(range(6), 2)])


def minibatch_gradients():
    """∂loss/∂a by enumeration, for every minibatch: −p (1 − p) (f(1) − f(0))."""
    p = sigmoid(BATCH_LOGIT)
    return minibatch_sums(-p * (1 - p) * (BATCH_X - 0.5))


def minibatch_losses():
    """The loss for every minibatch where z does not act (slope 0)."""
    return minibatch_sums(-normal(BATCH_X, 0.0))
