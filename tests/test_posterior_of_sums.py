"""`EstimatorELBO.posterior`: marginals and joint draws of what was summed, against every combination written out."""

from __future__ import annotations

import itertools

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
from numpyro.infer import SVI
from numpyro.infer import Predictive as PredictiveJax
from numpyro.optim import Adam
from pyro.infer import Predictive as PredictiveTorch
from pyro.infer import infer_discrete
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import chi2, norm

from ppl_estimators import Enumerate, EstimatorError, MovingAverage, Reinforce
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.numpyro import with_estimators as with_jax
from ppl_estimators.pyro import EstimatorELBO as TorchELBO
from ppl_estimators.pyro import with_estimators as with_torch

MARK = {"enumerate": "parallel"}
DRAWS = 10000


class Torch:
    sample, plate, dist, handlers = staticmethod(pyro.sample), staticmethod(pyro.plate), tdist, pyro.poutine
    array = staticmethod(lambda x: torch.as_tensor(x, dtype=torch.float64))


class Jax:
    sample, plate, dist, handlers = staticmethod(numpyro.sample), staticmethod(numpyro.plate), jdist, numpyro.handlers
    array = staticmethod(lambda x: jnp.asarray(x, float))


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        yield


def nothing(*args):
    pass


# ---- y enumerated in the guide; c below it, above two plates, z and w in them; x is seen in part ---------------------

LAW_Y, LAW_C = np.array([0.4, -0.3]), np.array([[0.1, 0.5, -0.4], [0.9, -0.2, 0.3]])
LAW_Z, LAW_W = np.array([[0.2, -0.6], [-0.1, 0.8], [0.5, 0.3]]), np.array([[0.7, -0.5], [-0.2, 0.4]])
X, SEEN = np.array([[0.3, -1.2], [1.4, 0.8]]), np.array([[True, True], [True, False]])  # [k, n]
Q, FULL, SHIFT = np.array([0.2, -0.7]), 4, 0.1  # two of four elements of n are seen


def plated(lib):
    d, array, sample = lib.dist, lib.array, lib.sample
    mask = torch.tensor(SEEN) if lib is Torch else SEEN

    def model():
        y = sample("y", d.Categorical(logits=array(LAW_Y)))
        c = sample("c", d.Categorical(logits=array(LAW_C)[y]), infer=MARK)
        shift = sample("shift", d.Normal(array([0.0, 1.0]), 1.0).to_event(1))[..., 0]
        with lib.plate("n", FULL, subsample_size=2, dim=-1):
            z = sample("z", d.Categorical(logits=array(LAW_Z)[c]), infer=MARK)
            with lib.plate("k", 2, dim=-2), lib.handlers.mask(mask=mask):
                w = sample("w", d.Categorical(logits=array(LAW_W)[z]), infer=MARK)
                sample("x", d.Normal(w + z * array(0.5) - y * array(0.3) + shift, 1.0), obs=array(X))

    def guide():
        y = sample("y", d.Categorical(logits=array(Q)), infer=MARK)
        place = array([SHIFT, -SHIFT])[y][..., None] * array([1.0, 1.0])
        sample("shift", d.Delta(place, event_dim=1))  # one for each value of y

    return model, guide


def given_y(y):
    """p(c), p(z | c) and p(w | z), [c], [n, c, z], [k, n, z, w]."""
    place = np.arange(2) + 0.5 * np.arange(2)[:, None] - 0.3 * y + (-SHIFT if y else SHIFT)
    log_x = np.where(SEEN, 1, 0)[..., None, None] * norm.logpdf(X[..., None, None], place)
    w = log_softmax(LAW_W, -1) + log_x
    z = log_softmax(LAW_Z, -1) + logsumexp(w, -1).sum(0)[:, None, :]
    c = log_softmax(LAW_C[y]) + FULL / 2 * logsumexp(z, -1).sum(0)
    return softmax(c), softmax(z, -1), softmax(w, -1)


class Given:
    """Noise as it is given, call after call; without any it notes the shapes that it is asked for."""

    def __init__(self, own, noise=None):
        self.value, self.noise, self.shapes = own.value, noise and iter(noise), []

    def uniform(self, *asked):
        *_, shape, like = asked
        self.shapes.append(tuple(shape))
        u = np.full(shape, 0.5) if self.noise is None else next(self.noise)
        return torch.as_tensor(u).to(like) if isinstance(like, torch.Tensor) else jnp.asarray(u, like.dtype)


def draws_jax(program, count):
    """With the noise of each draw."""
    elbo = JaxELBO()
    own, elbo.randomness = elbo.randomness, None
    elbo.randomness = shapes = Given(own)
    jax.eval_shape(lambda: elbo.posterior(jax.random.key(0), {}, *program))
    generator = np.random.default_rng(1)
    noise = [generator.uniform(size=(count, *shape)) for shape in shapes.shapes]

    def one(noise):
        elbo.randomness = Given(own, noise)
        return jax.tree.map(lambda x: x[0], elbo.posterior(jax.random.key(0), {}, *program))

    found = jax.jit(jax.vmap(one))([jnp.asarray(u) for u in noise])
    return *({n: np.asarray(x) for n, x in part.items()} for part in found), noise


def same_in_pyro(program, nesting, samples, noise, count=10):
    elbo = TorchELBO(max_plate_nesting=nesting)
    own = elbo.randomness
    for i in range(count):
        elbo.randomness = Given(own, [u[i] for u in noise])
        found, marginals = elbo.posterior(*program)
        for name, x in found.items():
            np.testing.assert_allclose(x[0], samples[name][i], err_msg=name)
    return {n: x[0].numpy() for n, x in marginals.items()}


@pytest.mark.filterwarnings("ignore:site 'c'. summed out above plate 'n'")
def test_plates_values_of_the_guide_masks_and_a_minibatch():
    samples, marginals, noise = draws_jax(plated(Jax), DRAWS)
    in_pyro = same_in_pyro(plated(Torch), 2, samples, noise)
    q, laws = softmax(Q), [given_y(y) for y in (0, 1)]
    expected = {
        "y": q,
        "c": sum(q[y] * laws[y][0] for y in (0, 1)),
        "z": sum(q[y] * np.einsum("c,ncz->nz", *laws[y][:2]) for y in (0, 1)),
        "w": sum(q[y] * np.einsum("c,ncz,knzw->knw", *laws[y]) for y in (0, 1)),
    }
    for name, law in expected.items():
        np.testing.assert_allclose(marginals[name][0], law, rtol=1e-10)
        np.testing.assert_allclose(in_pyro[name], law, rtol=1e-10)
    assert {n: x.shape[1:] for n, x in samples.items()} == {"y": (), "shift": (2,), "c": (), "z": (2,), "w": (2, 2)}
    y, c, z, w = (samples[n] for n in "yczw")
    np.testing.assert_allclose(samples["shift"][:, 0], np.where(y, -SHIFT, SHIFT))  # that of the value that was drawn
    exact = np.zeros((2, 3, 2, 2, 2, 2, 2, 2))
    for cell in itertools.product(*map(range, exact.shape)):
        y_, c_, z_, w_ = cell[0], cell[1], cell[2:4], np.reshape(cell[4:], (2, 2))
        of_c, of_z, of_w = laws[y_]
        exact[cell] = q[y_] * of_c[c_] * np.prod([of_z[n, c_, z_[n]] for n in (0, 1)])
        exact[cell] *= np.prod([of_w[k, n, z_[n], w_[k, n]] for k in (0, 1) for n in (0, 1)])
    assert exact.sum() == pytest.approx(1)
    index = np.ravel_multi_index((y, c, *z.T, *w.reshape(len(w), 4).T), exact.shape)
    _assert_frequencies(np.bincount(index, minlength=exact.size), exact.ravel())


def _assert_frequencies(counts, law, cells=20):
    """Pearson's statistic, cells of less than five expected draws together."""
    expected, n = law * counts.sum(), counts.sum()
    rare = expected < 5
    seen, expected = ([*x[~rare], x[rare].sum()] for x in (counts, expected))
    statistic = sum((a - b) ** 2 / b for a, b in zip(seen, expected, strict=True) if b)
    assert n == sum(seen) and len(seen) > cells
    assert statistic < chi2.ppf(1 - 1e-5, len(seen) - 1)


# ---- along time -----------------------------------------------------------------------------------------------------

TABLE, PLACE = np.array([[0.3, 0.1, 0.2], [-0.2, 0.4, 0.9], [0.1, 0.5, -0.7]]), np.array([-1.0, 2.0, 0.3])
SERIES = np.random.default_rng(0).normal(size=(5, 2))  # of two sequences


def chain_torch(steps=5):
    table, place, z = torch.tensor(TABLE), torch.tensor(PLACE), 0
    with pyro.plate("s", 2):
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z{t}", tdist.Categorical(logits=table[z]), infer=MARK)
            pyro.sample(f"x{t}", tdist.Normal(place[z], 1.0), obs=torch.tensor(SERIES[t]))


def chain_jax():
    table, place = jnp.asarray(TABLE), jnp.asarray(PLACE)

    def step(z, x):
        with numpyro.plate("s", 2):
            z = numpyro.sample("z", jdist.Categorical(logits=table[z]))
            numpyro.sample("x", jdist.Normal(place[z], 1.0), obs=x)
        return z, None

    scan(step, 0, jnp.asarray(SERIES))


def filtered():
    """log p(z_t, x_0..t), [t, s, z]."""
    law, places = log_softmax(TABLE, 1), norm.logpdf(SERIES[..., None], PLACE)
    found = [law[0] + places[0]]
    for x in places[1:]:
        found.append(logsumexp(found[-1][:, :, None] + law, 1) + x)
    return np.stack(found)


def smoothed():
    law, places, after = log_softmax(TABLE, 1), norm.logpdf(SERIES[..., None], PLACE), [np.zeros((2, 3))]
    for x in places[:0:-1]:
        after.append(logsumexp(law + (x + after[-1])[:, None, :], -1))
    return softmax(filtered() + np.stack(after[::-1]), -1)


def test_chains_are_forward_and_backward():
    samples, marginals, (noise, last) = draws_jax((chain_jax, nothing), 500)
    np.testing.assert_allclose(marginals["z"][0], smoothed(), rtol=1e-10)
    law = log_softmax(TABLE, 1)
    forward = filtered()
    for z, u, end in zip(samples["z"], noise, last, strict=True):
        expected = np.zeros((5, 2), int)
        for s in (0, 1):
            expected[4, s] = np.searchsorted(softmax(forward[4, s]).cumsum(), end[s])
            for t in (3, 2, 1, 0):
                after = expected[t + 1, s]
                chance = softmax(forward[t, s] + law[:, after])
                expected[t, s] = np.searchsorted(chance.cumsum(), u[t + 1, s, after])
        np.testing.assert_array_equal(z, expected)


def test_a_markov_loop():
    elbo = TorchELBO(max_plate_nesting=1)
    _, marginals = elbo.posterior(chain_torch, nothing)
    np.testing.assert_allclose(np.stack([marginals[f"z{t}"][0] for t in range(5)]), smoothed(), rtol=1e-10)
    samples, _ = elbo.posterior(chain_torch, nothing, 3, num_samples=200)
    law, places = log_softmax(TABLE, 1), norm.logpdf(SERIES[..., None], PLACE)
    exact = np.zeros((2, 3, 3, 3))
    for s, *cell in np.ndindex(exact.shape):
        exact[s, *cell] = sum(law[a, b] + places[t, s, b] for t, (a, b) in enumerate(itertools.pairwise((0, *cell))))
    for s in (0, 1):
        index = np.ravel_multi_index([samples[f"z{t}"][:, s].numpy() for t in range(3)], (3,) * 3)
        _assert_frequencies(np.bincount(index, minlength=27), softmax(exact[s].ravel()), 5)


# ---- the libraries' own tools ----------------------------------------------------------------------------------------

DATA = np.array([-2.1, 1.9, 2.2, -1.8])


def mixture(lib, infer=MARK):
    d, array, sample = lib.dist, lib.array, lib.sample

    def model(data=DATA):
        shift = sample("shift", d.Bernoulli(array(0.5)))
        with lib.plate("data", 4):
            z = sample("z", d.Categorical(array([0.4, 0.6])), infer=infer)
            sample("x", d.Normal(4.0 * z - 2.0 + shift, array(1.0)), obs=data if data is None else array(data))

    def guide(data=DATA):
        sample("shift", d.Bernoulli(array(0.1)))

    return model, guide


def test_infer_discrete_and_predictive_of_pyro():
    model, guide = mixture(Torch)
    guide = with_torch(guide, {"shift": Reinforce(MovingAverage())})
    trained = pyro.poutine.replay(model, trace=pyro.poutine.trace(guide).get_trace())
    for temperature in (0, 1):
        inferred = infer_discrete(trained, temperature=temperature, first_available_dim=-2)
        assert pyro.poutine.trace(inferred).get_trace().nodes["z"]["value"].tolist() == [0, 1, 1, 0]
    found = TorchELBO(max_plate_nesting=1).posterior(model, guide, num_samples=3)
    assert (found.samples["z"] == torch.tensor([0, 1, 1, 0])).all()
    again = PredictiveTorch(model, posterior_samples=found.samples)(None)
    assert again["x"].shape == (3, 4)
    assert (again["x"][:, 0] < again["x"][:, 1]).all()


def test_infer_discrete_and_predictive_of_numpyro():
    model, guide = mixture(Jax)
    guide, key = with_jax(guide, {"shift": Reinforce(MovingAverage())}), jax.random.key(0)
    svi = SVI(model, guide, Adam(0.1), JaxELBO())
    params = svi.get_params(svi.init(key))
    found = PredictiveJax(model, guide=guide, params=params, num_samples=3, infer_discrete=True)(key)
    assert (found["z"] == np.array([0, 1, 1, 0])).all()
    found = JaxELBO().posterior(key, params, model, guide, num_samples=3)
    assert (found.samples["z"] == np.array([0, 1, 1, 0])).all()
    again = PredictiveJax(model, posterior_samples=found.samples)(key, None)
    assert again["x"].shape == (3, 4)
    assert (again["x"][:, 0] < again["x"][:, 1]).all()


def test_a_site_that_is_named_and_a_program_that_sums_nothing():
    model, guide = mixture(Torch, {})
    _, marginals = TorchELBO({"z": Enumerate()}, max_plate_nesting=1).posterior(model, guide)
    _, marked = TorchELBO(max_plate_nesting=1).posterior(*mixture(Torch))
    assert torch.allclose(marginals["z"][0, :, 1] > 0.5, torch.tensor(DATA > 0))
    assert marked["z"].shape == marginals["z"].shape == (1, 4, 2)
    samples, marginals = JaxELBO().posterior(jax.random.key(0), {}, mixture(Jax)[1], mixture(Jax)[1], num_samples=5)
    assert (samples["shift"].shape, marginals) == ((5,), {})


def test_draws_of_different_sites():
    def program():
        if pyro.sample("b", tdist.Bernoulli(0.5)):
            pyro.sample("c", tdist.Normal(0.0, 1.0))

    assert TorchELBO().posterior(program, program).samples["b"].shape == (1,)
    with pytest.raises(EstimatorError, match="site 'c': in some of the draws only"):
        TorchELBO().posterior(program, program, num_samples=20)


def test_draws_of_a_scan_beside_a_sum():
    """Steps that the guide draws come with the values of those that are summed."""

    def model():
        def step(z, x):
            shift = numpyro.sample("shift", jdist.Normal(0.0, 1.0))
            z = numpyro.sample("z", jdist.Categorical(logits=jnp.asarray(TABLE)[z]))
            numpyro.sample("x", jdist.Normal(jnp.asarray(PLACE)[z] + shift, 1.0), obs=x)
            return z, None

        scan(step, 0, jnp.asarray(SERIES[:, 0]))

    def guide():
        scan(lambda c, _: (c, numpyro.sample("shift", jdist.Delta(0.0, log_density=0.3))), 0, None, length=5)

    samples, marginals = jax.jit(lambda key: JaxELBO().posterior(key, {}, model, guide, num_samples=2))(
        jax.random.key(0)
    )
    assert (samples["shift"].shape, samples["z"].shape) == ((2, 5), (2, 5))
    np.testing.assert_allclose(marginals["z"][1], smoothed()[:, 0], rtol=1e-10)
