"""The digits network in NumPyro: an ordinary model and guide, with nothing of ours in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from ppl_estimators.demo.network import DOTS, STYLE


def program(initial: Mapping[str, np.ndarray]) -> tuple[Callable, Callable]:
    """Model and guide over `images`, `[batch, PIXELS]`, with parameters that start at `initial`."""

    def parameter(name: str) -> jax.Array:
        return numpyro.param(name, jnp.asarray(initial[name]))

    def affine(name: str, **inputs: jax.Array) -> jax.Array:
        terms = [value @ parameter(f"{name}.{source}") for source, value in inputs.items()]
        return sum(terms, start=parameter(f"{name}.bias"))

    def model(images: jax.Array) -> jax.Array:
        with numpyro.plate("images", images.shape[0]):
            logits = parameter("model.top.bias")
            top = numpyro.sample("top", dist.Bernoulli(logits=logits).to_event(1))
            low = numpyro.sample("low", dist.Bernoulli(logits=affine("model.low", top=top)).to_event(1))
            style = numpyro.sample("style", dist.Normal(jnp.zeros(STYLE), 1.0).to_event(1))
            hidden = jnp.tanh(affine("model.hidden", low=low, style=style))
            logits = affine("model.pixels", hidden=hidden)
            pixels = dist.Binomial(total_count=DOTS, logits=logits).to_event(1)
            numpyro.sample("pixels", pixels, obs=images)
        return jax.nn.sigmoid(logits)

    def guide(images: jax.Array) -> None:
        with numpyro.plate("images", images.shape[0]):
            hidden = jnp.tanh(affine("guide.hidden", pixels=images / DOTS - 0.3))
            loc = affine("guide.style.loc", hidden=hidden)
            scale = jax.nn.softplus(affine("guide.style.scale", hidden=hidden))
            style = numpyro.sample("style", dist.Normal(loc, scale).to_event(1))
            logits = affine("guide.low", hidden=hidden, style=style)
            low = numpyro.sample("low", dist.Bernoulli(logits=logits).to_event(1))
            numpyro.sample("top", dist.Bernoulli(logits=affine("guide.top", low=low)).to_event(1))

    return model, guide
