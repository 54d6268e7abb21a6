"""Integer and one-hot categoricals."""

from itertools import product

import numpy as np

from .case import apart, finite
from .oracle import categorical, normal

# Integer and one-hot categoricals, one under the other, in a plate.

CATEGORY_X = np.array([1.3, -0.8])


def categories(ppl, init):
    def model():
        with ppl.plate("plate", 2):
            k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array([0.2, -0.3, 0.4])))
            logits = ppl.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]])[k]
            z = ppl.sample("z", ppl.one_hot(logits))
            loc = ppl.array([-1.0, 0.5, 2.0])[k] + ppl.dot(z, ppl.array([1.2, -0.7, 0.4]))
            ppl.sample("x", ppl.dist.Normal(loc, 1.0), obs=ppl.array(CATEGORY_X))

    def guide():
        a, b = ppl.param("a", init), ppl.param("b", init)
        with ppl.plate("plate", 2):
            k = ppl.sample("k", ppl.dist.Categorical(logits=a))
            ppl.sample("z", ppl.one_hot(b[k]))

    return model, guide


CATEGORIES = {
    "a": [[0.6, -0.4, 0.2], [-0.7, 0.5, 0.9]],
    "b": [[0.8, -0.6, 0.3], [-0.2, 0.9, -0.5], [0.4, 0.1, -1.0]],
}


@apart(categories, "L3 L4", CATEGORIES, 2)
def categories_states(p, e):
    prior = categorical(np.array([0.2, -0.3, 0.4]))
    rows = categorical(np.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]]))
    loc_k, loc_z = np.array([-1.0, 0.5, 2.0]), np.array([1.2, -0.7, 0.4])
    for k, z in product(range(3), repeat=2):
        log_q = categorical(p["a"][e])[k] + categorical(p["b"][k])[z]
        yield log_q, prior[k] + rows[k, z] + normal(CATEGORY_X[e], loc_k[k] + loc_z[z]) - log_q


# Categoricals in a plate whose elements one later cost sees together.


def coupled_categories(ppl, init):
    def model():
        with ppl.plate("plate", 2):
            k = ppl.sample("k", ppl.dist.Categorical(logits=ppl.array([0.2, -0.3, 0.4])))
            z = ppl.sample("z", ppl.one_hot(ppl.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]])[k]))
        total = ppl.total(
            ppl.array([1.5, -1.0]) * ppl.array([-1.0, 0.5, 2.0])[k] * ppl.dot(z, ppl.array([1.2, -0.7, 0.4]))
        )
        ppl.sample("y", ppl.dist.Normal(total, 1.0), obs=ppl.array([0.9]))

    return model, categories(ppl, init)[1]


@finite(coupled_categories, "L3 L4", CATEGORIES)
def coupled_categories_states(p):
    prior = categorical(np.array([0.2, -0.3, 0.4]))
    rows = categorical(np.array([[0.5, -0.2, 0.1], [-0.4, 0.6, 0.0], [0.3, 0.3, -0.9]]))
    loc_k, loc_z = np.array([-1.0, 0.5, 2.0]), np.array([1.2, -0.7, 0.4])
    for k0, z0, k1, z1 in product(range(3), repeat=4):
        log_q = categorical(p["a"][0])[k0] + categorical(p["b"][k0])[z0]
        log_q = log_q + categorical(p["a"][1])[k1] + categorical(p["b"][k1])[z1]
        log_p = prior[k0] + rows[k0, z0] + prior[k1] + rows[k1, z1]
        log_p = log_p + normal(0.9, 1.5 * loc_k[k0] * loc_z[z0] - 1.0 * loc_k[k1] * loc_z[z1])
        yield log_q, log_p - log_q
