"""Programs of the kinds that the libraries' own examples train: dropout, batch normalisation, batches with and without
labels. After some steps buffers, parameters and random state are those of the stock ELBO, where nothing but the ELBO's
own draws could make a difference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from ppl_estimators import DisARM
from ppl_estimators.numpyro import EstimatorELBO as NumPyroELBO
from ppl_estimators.pyro import EstimatorELBO as PyroELBO

STEPS = 4


# ---- Pyro ----------------------------------------------------------------------------------------------------------


class Markov(nn.Module):
    """A deep Markov model: sequences of several lengths, a recurrent network with dropout between its layers."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.RNN(3, 4, num_layers=2, batch_first=True, dropout=0.5)
        self.combine, self.move, self.emit = nn.Linear(6, 4), nn.Linear(2, 4), nn.Linear(2, 3)

    def steps(self, x, parameters):
        z = torch.zeros(len(x), 2)
        with pyro.plate("sequences", len(x)):
            for t in pyro.markov(range(x.shape[1])):
                loc, scale = parameters(t, z).chunk(2, -1)
                z = pyro.sample(f"z{t}", dist.Normal(loc, scale.exp()).mask(x[:, t, :1] >= 0).to_event(1))
                yield t, z

    def model(self, x):
        pyro.module("markov", self)
        for t, z in self.steps(x, lambda t, z: self.move(z)):
            pyro.sample(f"x{t}", dist.Bernoulli(logits=self.emit(z)).to_event(1), obs=x[:, t])

    def guide(self, x):
        pyro.module("markov", self)
        states = self.rnn(x.flip(1))[0].flip(1)
        for _ in self.steps(x, lambda t, z: self.combine(torch.cat([states[:, t], z], -1))):
            pass

    def batches(self):
        return [(torch.bernoulli(torch.full((5, 2 + i % 2, 3), 0.4)),) for i in range(STEPS)]


class Topics(nn.Module):
    """Product of experts: dropout and batch normalisation on both sides, a smaller last batch."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3), nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False))
        self.decoder = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 6, bias=False), nn.BatchNorm1d(6, affine=False))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("documents", len(x)):
            theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1)).softmax(-1)
            pyro.sample("x", dist.Multinomial(int(x.sum(-1).max()), logits=self.decoder(theta)), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("documents", len(x)):
            pyro.sample("theta", dist.Normal(loc, (0.5 * scale).exp()).to_event(1))

    def batches(self):
        return [(torch.poisson(torch.full((8 if i < STEPS - 1 else 3, 6), 2.0)),) for i in range(STEPS)]


class Labels(nn.Module):
    """Semi-supervised: labels given at every other batch, a classifier's loss as a factor, batch normalisation
    everywhere, dropout in the classifier."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.2))
        self.encoder = nn.Sequential(nn.Linear(9, 4), nn.BatchNorm1d(4))
        self.decoder = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))

    def model(self, x, y=None):
        pyro.module("labels", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3), obs=y)
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(torch.cat([y, z], -1))).to_event(1), obs=x)

    def guide(self, x, y=None):
        pyro.module("labels", self)
        with pyro.plate("data", len(x)):
            law = dist.OneHotCategorical(logits=self.classifier(x))
            if y is None:
                y = pyro.sample("y", law)
            else:
                pyro.factor("classified", -0.1 * law.log_prob(y), has_rsample=True)
            loc, scale = self.encoder(torch.cat([x, y], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def batches(self):
        x = torch.bernoulli(torch.full((STEPS, 8, 6), 0.4))
        return [(x[i], torch.eye(3)[torch.arange(8) % 3]) if i % 2 else (x[i],) for i in range(STEPS)]


class Completed(nn.Module):
    """A conditional autoencoder: the prior looks at the first guess of a frozen network, with dropout, under no_grad;
    how many pixels are observed differs from batch to batch."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))
        self.prior, self.recognition, self.generation = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(2, 6)

    def latent(self, parameters):
        loc, scale = parameters.chunk(2, -1)
        return pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    def model(self, x, y):
        pyro.module("completed", self)
        with pyro.plate("data", len(x)):
            with torch.no_grad():
                guess = self.first(x)
            loc = self.generation(self.latent(self.prior(guess)))
            hidden = x[0] == -1
            pyro.sample("y", dist.Bernoulli(logits=loc[:, hidden]).to_event(1), obs=y[:, hidden])

    def guide(self, x, y):
        with pyro.plate("data", len(x)):
            self.latent(self.recognition(torch.where(x == -1, y, x)))

    def batches(self):
        found = []
        for i in range(STEPS):
            y = torch.bernoulli(torch.full((8, 6), 0.4))
            found.append((torch.where(torch.arange(6) < 2 + i % 3, -1.0, y), y))
        return found


def trained(kind, elbo, lr):
    """Buffers, parameters and random state after one pass over the batches."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    net = kind()
    svi = pyro.infer.SVI(net.model, net.guide, pyro.optim.SGD({"lr": lr}), elbo)
    for batch in net.batches():
        svi.step(*batch)
    return dict(net.named_buffers()), dict(net.named_parameters()), torch.get_rng_state()


@pytest.mark.parametrize("kind", [Markov, Topics, Completed])
def test_pathwise_programs_are_trained_bit_for_bit_as_by_the_stock_elbo(kind):
    stock, ours = trained(kind, pyro.infer.Trace_ELBO(), 1e-3), trained(kind, PyroELBO(), 1e-3)
    start = kind().state_dict().keys()
    assert {*stock[0], *stock[1]} == set(start)
    for a, b in zip(stock[:2], ours[:2], strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), name
    assert torch.equal(stock[2], ours[2])


@pytest.mark.filterwarnings("ignore:site 'y'.* a plate says that none does")  # the decoder's batch normalisation
def test_labelled_and_unlabelled_batches_leave_the_buffers_of_the_stock_elbo():
    """What is drawn is another value, so parameters stand still; layers that see data only must agree to the bit, and
    all must have seen as many batches: the estimator at the label runs the program several times a step."""
    elbo = PyroELBO()
    stock, ours = trained(Labels, pyro.infer.Trace_ELBO(), 0.0)[0], trained(Labels, elbo, 0.0)[0]
    assert elbo.memory.last is not None and any(p.reruns for p in elbo.memory.plans.values())
    counters = [n for n in stock if n.endswith("num_batches_tracked")]
    assert [int(stock[n]) for n in counters] == [STEPS] * 3 == [int(ours[n]) for n in counters]
    of_data = [n for n in stock if n.startswith("classifier")]
    assert len(of_data) == 3
    for name in of_data:
        assert torch.equal(stock[name], ours[name]), name


# ---- NumPyro -------------------------------------------------------------------------------------------------------


def normalised(name, x):
    """Batch normalisation: running averages as mutable state, as a flax module keeps them."""
    held = numpyro.primitives.mutable(name, {"mean": jnp.zeros(x.shape[-1]), "batches": jnp.zeros((), int)})
    mean = x.mean(0)
    held["mean"], held["batches"] = 0.9 * held["mean"] + 0.1 * jax.lax.stop_gradient(mean), held["batches"] + 1
    return x - mean


def dropped(x):
    return jnp.where(jax.random.bernoulli(numpyro.prng_key(), 0.5, x.shape), 2.0 * x, 0.0)


@pytest.mark.filterwarnings("ignore:Currently, SVI with Trace_ELBO loss does not support models with discrete")
@pytest.mark.filterwarnings("ignore:site 'z'.* a plate says that none does")  # the decoder's batch normalisation
def test_mutable_state_is_that_of_one_run_a_step():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (8, 6)).astype(float))

    def model(x):
        decode = numpyro.param("decode", 0.1 * jnp.arange(12.0).reshape(2, 6))
        with numpyro.plate("data", 8):
            z = numpyro.sample("z", jdist.Bernoulli(logits=jnp.zeros(2)).to_event(1))
            logits = normalised("decoder", dropped(1.0 * z) @ decode)
            numpyro.sample("x", jdist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        encode = numpyro.param("encode", 0.1 * jnp.arange(12.0).reshape(6, 2))
        with numpyro.plate("data", 8):
            logits = dropped(normalised("encoder", x @ encode))
            numpyro.sample("z", jdist.Bernoulli(logits=logits).to_event(1))

    found = []
    for elbo in (numpyro.infer.Trace_ELBO(), NumPyroELBO(DisARM())):
        svi = numpyro.infer.SVI(model, guide, numpyro.optim.SGD(0.0), elbo)
        state = svi.init(jax.random.key(0), x)
        update = jax.jit(svi.update)
        for _ in range(STEPS):
            state, _ = update(state, x)
        found.append(state.mutable_state)
    stock, ours = found
    assert stock.keys() == ours.keys() == {"encoder", "decoder"}
    jax.tree.map(np.testing.assert_array_equal, stock["encoder"], ours["encoder"])  # which sees data only
    assert int(ours["decoder"]["batches"]) == int(stock["decoder"]["batches"]) >= STEPS
