"""NumPyro: a cost of one element of a plate that reads others is named when a step is traced, and nothing else is."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI
from numpyro.optim import SGD

from ppl_estimators import EstimatorWarning
from ppl_estimators.numpyro import EstimatorELBO

N = 6
DATA = jnp.linspace(-1.0, 2.0, N)
IMAGE = (1, 1, 5)


def normalised(h, axis):
    return (h - h.mean(axis, keepdims=True)) / jnp.sqrt(h.var(axis, keepdims=True) + 1e-3)


def attention(z):
    h = jnp.stack([z, DATA], -1) @ jnp.ones((2, 3))
    return (jax.nn.softmax(h @ h.T, -1) @ h).sum(-1)


def before(z):
    return jax.lax.scan(lambda last, x: (x, last), 0.0, z)[1]


#: of the bits of a plate: a mean for each element, that reads others
COUPLED = {
    "mean": lambda z: z - z.mean(),
    "cumsum": jnp.cumsum,
    "associative_scan": lambda z: jax.lax.associative_scan(jnp.add, z),
    "scan": before,
    "roll": lambda z: z + jnp.roll(z, 1),
    "shifted": lambda z: jnp.concatenate([jnp.zeros(1), z[:-1]]),
    "flipped": lambda z: z[::-1],
    "difference": lambda z: jnp.pad(jnp.diff(z), (0, 1)),
    "first": lambda z: z * z[0],
    "rank": lambda z: jnp.argsort(z) * 1.0,
    "softmax": jax.nn.softmax,
    "batch_norm": lambda z: normalised(z[:, None] * jnp.ones(4), 0).sum(-1),
    "matmul": lambda z: jnp.eye(N, k=1) @ z,
    "attention": attention,
    "smoothed": lambda z: jnp.convolve(z, jnp.ones(3), mode="same"),
    "threshold": lambda z: jnp.where(z > z.mean(), 1.0, 0.0),
    "feature": lambda z: jnp.stack([z, jnp.full(N, z.mean())], -1) @ jnp.ones(2),
    "picked": lambda z: jnp.arange(3.0)[z.astype(int)].mean() * DATA,
}

#: that reads its own, or too little is known
APART = {
    "own": lambda z: 2.0 * z,
    "dense": lambda z: jax.nn.softplus(jnp.stack([z, DATA], -1) @ jnp.ones((2, 8))) @ jnp.ones(8),
    "of_data": lambda z: z * DATA.mean() + jnp.cumsum(DATA),
    "layer_norm": lambda z: normalised(jnp.stack([z, DATA, 2 * z], -1), -1)[:, 0],
    "one_hot": lambda z: jax.nn.one_hot(z.astype(int), 2) @ jnp.arange(2.0),
    "table": lambda z: jnp.arange(3.0)[z.astype(int)],
    "own_row": lambda z: jnp.outer(z, jnp.arange(3.0))[jnp.arange(N), jnp.arange(N) % 3],
    "along": lambda z: jnp.take_along_axis(jnp.stack([z, -z], -1), z.astype(int)[:, None], -1)[:, 0],
    "vmap": lambda z: jax.vmap(lambda a, b: jnp.array([a, b]) @ jnp.ones(2))(z, DATA),
    "map": lambda z: jax.lax.map(lambda x: 2.0 * x, z),
    "chunks": lambda z: jax.lax.map(lambda x: 2.0 * x, z, batch_size=2),
    "convolved": lambda z: jax.lax.conv(z[:, None, None] * jnp.ones(IMAGE), jnp.ones(IMAGE), (1,), "SAME").sum((1, 2)),
    "reshaped": lambda z: z.reshape(2, 3).reshape(N) + jnp.tile(z[:, None], (1, 2)).reshape(-1)[::2],
    "there_and_back": lambda z: jnp.roll(jnp.roll(z, 1), -1),
    "beside_a_total": lambda z: jnp.concatenate([z, z.sum()[None]])[:N],
    "if_finite": lambda z: jnp.where(jnp.all(jnp.isfinite(z)), z, 0.0),
    "unless_wrong": lambda z: jax.lax.cond(jnp.any(z > 1), lambda z: z * jnp.nan, lambda z: z, z),
    "until": lambda z: jax.lax.while_loop(lambda x: jnp.any(x < 1), lambda x: x + 0.5, z),
    "for": lambda z: jax.lax.fori_loop(0, 3, lambda i, x: 0.5 * x + DATA, z),
}


def warned_of(model, guide):
    """Each site and plate that a traced step warns of, and the operation that it names."""
    svi = SVI(model, guide, SGD(0.1), EstimatorELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(lambda key: svi.update(svi.init(key)), jax.random.key(0))
    texts = [str(w.message) for w in caught]
    found = [
        re.match(r"site '(.*?)': (.*) of an element of plate '(.*?)' moves with '\1' .*?elements(.*?), and", t)
        for t in texts
    ]
    return {m.group(1, 3): m.group(2, 4) for m in found}


def test_what_reads_other_elements_is_named_when_a_step_is_traced():
    ways = {**COUPLED, **APART}

    def model():
        for name, way in ways.items():
            with numpyro.plate(name, N):
                z = numpyro.sample("z_" + name, dist.Bernoulli(0.3))
                numpyro.sample("x_" + name, dist.Normal(way(z * 1.0), 1.0), obs=DATA)

    def guide():
        a = numpyro.param("a", DATA)
        for name in ways:
            with numpyro.plate(name, N):
                numpyro.sample("z_" + name, dist.Bernoulli(logits=a))

    found = warned_of(model, guide)
    assert found.keys() == {("z_" + name, name) for name in COUPLED}
    assert all(term == f"log p of 'x_{name}'" for (_, name), (term, _) in found.items())
    named = {name: where for (_, name), (_, where) in found.items()}
    here = r" \(by {} in test_coupled_plates_numpyro.py, line \d+\)"
    assert re.fullmatch(here.format("cumsum"), named["cumsum"]) and re.fullmatch(here.format("add"), named["roll"])
    assert named["flipped"] == ""  # nothing joins two


def test_what_acts_by_way_of_a_site_counts():
    """Within a plate it is a cost of others, from outside of it it is everybody's; so is a total. What is not credited
    by element is of no account."""

    def model():
        with numpyro.plate("N", N):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            k = numpyro.sample("k", dist.Categorical(jnp.ones(3) / 3))
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
            y = numpyro.sample("y", dist.Normal(z, 1.0))
        total = numpyro.sample("total", dist.Normal(z.sum(), 1.0))
        numpyro.factor("penalty", -0.1 * z.sum())
        with numpyro.plate("N", N):
            numpyro.sample("x", dist.Normal(y + total + w.mean() + jnp.arange(3.0)[k], 1.0), obs=DATA)

    def guide(through):
        a = numpyro.param("a", DATA)
        with numpyro.plate("N", N):
            z = numpyro.sample("z", dist.Bernoulli(logits=a))
            numpyro.sample("k", dist.Categorical(logits=a[:, None] * jnp.arange(3.0)))
            numpyro.sample("w", dist.Normal(a, 1.0))
            numpyro.sample("y", dist.Normal(through(z), 1.0))
        numpyro.sample("total", dist.Normal(z.sum(), 1.0))

    assert warned_of(model, lambda: guide(lambda z: 0.5 * z)) == {}
    (found,) = warned_of(model, lambda: guide(lambda z: z.mean() * jnp.ones(N))).items()
    assert found[0] == ("z", "N") and found[1][0] == "-log q of 'y'"


@pytest.mark.parametrize("reads", [lambda z: z, lambda z: z.sum(-1, keepdims=True)], ids=["own", "others"])
def test_steps_of_a_scan_and_minibatches(reads):
    def chain(draw):
        def step(last, x):
            with numpyro.plate("N", 10, subsample_size=N):
                z = numpyro.sample("z", draw(last))
                if x is not None:
                    numpyro.sample("x", dist.Normal(reads(z), 1.0), obs=x)
            return z * 1.0, None

        return step

    def model():
        scan(chain(lambda last: dist.Bernoulli(0.3 + 0.4 * last)), jnp.zeros(N), jnp.ones((4, N)))

    def guide():
        a = numpyro.param("a", 0.2)
        scan(chain(lambda last: dist.Bernoulli(logits=a + last)), jnp.zeros(N), None, length=4)

    assert warned_of(model, guide).keys() == ({("z", "N")} if reads(DATA).shape == (1,) else set())


def test_what_the_warning_says_to_write_has_none():
    def program(sample):
        def model():
            z = sample(lambda: dist.Bernoulli(0.3), lambda: dist.Bernoulli(0.3).expand([N]).to_event(1))
            with numpyro.plate("N", N):
                numpyro.sample("x", dist.Normal(z + z.mean(), 1.0), obs=DATA)

        def guide():
            a = numpyro.param("a", DATA)
            sample(lambda: dist.Bernoulli(logits=a), lambda: dist.Bernoulli(logits=a).to_event(1))

        return model, guide

    def inside(law, _):
        with numpyro.plate("N", N):
            return numpyro.sample("z", law())

    assert warned_of(*program(inside)) and not warned_of(*program(lambda _, law: numpyro.sample("z", law())))


def test_a_jitted_step_warns():
    def model():
        with numpyro.plate("N", N):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(jnp.cumsum(z), 1.0), obs=DATA)

    def guide():
        with numpyro.plate("N", N):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", DATA)))

    svi = SVI(model, guide, SGD(0.1), EstimatorELBO())
    with pytest.warns(EstimatorWarning, match="'x'.* plate 'N' moves with"):
        svi.run(jax.random.key(0), 2, progress_bar=False)
