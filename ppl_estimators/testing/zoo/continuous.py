"""Continuous sites that are hard to reparameterise."""

import numpy as np

from .case import case
from .oracle import categorical, hermite, normal

# A continuous site that can't be reparameterised.


def mixture(ppl, init):
    def model():
        w = ppl.sample("w", ppl.dist.Normal(0.5, 1.2))
        ppl.sample("x", ppl.dist.Normal(0.5 * w**2, 1.0), obs=ppl.array(1.4))

    def guide():
        a, m, s = (ppl.param(name, init) for name in "ams")
        parts = ppl.dist.Normal(m, ppl.exp(s))
        ppl.sample("w", ppl.dist.MixtureSameFamily(ppl.dist.Categorical(logits=a), parts))

    return model, guide


@case(mixture, "B14", {"a": [0.4, -0.3], "m": [-0.9, 1.3], "s": [-0.4, -0.7]})
def mixture_elbo(p):
    log_a, scale = categorical(p["a"]), np.exp(p["s"])
    total = 0.0
    for j in range(2):
        w, weight = hermite(p["m"][j], scale[j], order=120)
        density = sum(np.exp(log_a[i] + normal(w, p["m"][i], scale[i])) for i in range(2))
        f = normal(w, 0.5, 1.2) + normal(1.4, 0.5 * w**2) - np.log(density)
        total = total + np.exp(log_a[j]) * (weight * f).sum()
    return total


# Score functions through expand, to_event, mask and a transformed distribution.


def wrapped(ppl, init):
    def model():
        u = ppl.sample("u", ppl.dist.LogNormal(0.0, 0.7))
        v = ppl.sample("v", ppl.dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        k = ppl.sample("k", ppl.dist.Normal(0.0, 1.0).mask(False))
        loc = u * v[..., 0] + v[..., 1] + k
        ppl.sample("x", ppl.dist.Normal(loc, 2.0), obs=ppl.array(0.9))

    def guide():
        m, n, r = (ppl.param(name, init) for name in "mnr")
        ppl.sample("u", ppl.dist.LogNormal(m, 0.5))
        ppl.sample("v", ppl.dist.Normal(n, 0.8).expand([2]).to_event(1))
        ppl.sample("k", ppl.dist.Normal(r, 0.6).mask(False))

    return model, guide


@case(wrapped, "B10 L2", {"m": -0.3, "n": 0.8, "r": -0.7})
def wrapped_elbo(p):
    """All moments are in closed form: the log-likelihood is quadratic, u is LogNormal."""
    m, n, r = p["m"], p["n"], p["r"]
    u1, u2 = np.exp(m + 0.125), np.exp(2 * m + 0.5)  # E u, E u²
    kl_u = np.log(0.7 / 0.5) + (0.25 + m**2) / 0.98 - 0.5
    kl_v = 2 * (-np.log(0.8) + (0.64 + n**2) / 2 - 0.5)
    mean = u1 * n + n + r
    variance = u2 * (0.64 + n**2) - (u1 * n) ** 2 + 0.64 + 0.36
    residual = (0.9 - mean) ** 2 + variance
    return -0.5 * residual / 4 - np.log(2.0) - 0.5 * np.log(2 * np.pi) - kl_u - kl_v
