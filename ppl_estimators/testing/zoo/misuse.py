"""What users do by mistake, or for another ELBO."""

import numpy as np

from .case import finite
from .oracle import bernoulli, bits, normal
from .sites import single_states

# One site and an argument that spoils the cost of a step.


def spoiled(ppl, init):
    def model(shift):
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z - 0.5 + shift, 1.0), obs=ppl.array(0.8))

    def guide(shift):
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


@finite(spoiled, "L11", {"a": 0.7})
def spoiled_states(p):
    yield from single_states({**p, "t": -0.4})


# A latent of the model that the guide forgets.


def forgotten(ppl, init, infer=None):
    def model():
        z = ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        k = ppl.sample("z_forgotten", ppl.dist.Bernoulli(logits=0.6 - z), infer=infer or {})
        ppl.sample("x", ppl.dist.Normal(1.5 * z - k, 1.0), obs=ppl.array(0.8))

    def guide():
        ppl.sample("z", ppl.dist.Bernoulli(logits=ppl.param("a", init)))

    return model, guide


@finite(forgotten, "L12 B17", {"a": 0.7})
def forgotten_states(p):
    """With the forgotten site summed out."""
    for z in (0, 1):
        log_q = bernoulli(z, p["a"])
        likelihood = sum(np.exp(bernoulli(k, 0.6 - z) + normal(0.8, 1.5 * z - k)) for k in (0, 1))
        yield log_q, bernoulli(z, -0.4) + np.log(likelihood) - log_q


# A guide site that asks to be enumerated, above one that is sampled.


def enumerated(ppl, init):
    def model():
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=ppl.array(-0.4)))
        z2 = ppl.sample("z2", ppl.dist.Bernoulli(logits=ppl.array(0.3)))
        ppl.sample("x", ppl.dist.Normal(1.5 * z1 - z2, 1.0), obs=ppl.array(0.8))

    def guide():
        a, b = ppl.param("a", init), ppl.param("b", init)
        z1 = ppl.sample("z1", ppl.dist.Bernoulli(logits=a), infer={"enumerate": "parallel"})
        ppl.sample("z2", ppl.dist.Bernoulli(logits=b[0] + b[1] * z1))

    return model, guide


@finite(enumerated, "L12", {"a": 0.7, "b": [-1.1, 2.3]})
def enumerated_states(p):
    for z1, z2 in bits(2):
        log_q = bernoulli(z1, p["a"]) + bernoulli(z2, p["b"][0] + p["b"][1] * z1)
        log_p = bernoulli(z1, -0.4) + bernoulli(z2, 0.3)
        yield log_q, log_p + normal(0.8, 1.5 * z1 - z2) - log_q
