"""The digits network in Pyro: an ordinary model and guide, with nothing of ours in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import torch

from ppl_estimators.demo.network import DOTS, STYLE


def program(initial: Mapping[str, np.ndarray]) -> tuple[Callable, Callable]:
    """Model and guide over `images`, `[batch, PIXELS]`, with parameters that start at `initial`."""

    def parameter(name: str) -> torch.Tensor:
        return pyro.param(name, lambda: torch.tensor(initial[name]))

    def affine(name: str, **inputs: torch.Tensor) -> torch.Tensor:
        terms = [value @ parameter(f"{name}.{source}") for source, value in inputs.items()]
        return sum(terms, start=parameter(f"{name}.bias"))

    def model(images: torch.Tensor) -> torch.Tensor:
        with pyro.plate("images", images.shape[0]):
            logits = parameter("model.top.bias")
            top = pyro.sample("top", dist.Bernoulli(logits=logits).to_event(1))
            low = pyro.sample("low", dist.Bernoulli(logits=affine("model.low", top=top)).to_event(1))
            style = pyro.sample("style", dist.Normal(images.new_zeros(STYLE), 1.0).to_event(1))
            hidden = torch.tanh(affine("model.hidden", low=low, style=style))
            logits = affine("model.pixels", hidden=hidden)
            pixels = dist.Binomial(total_count=DOTS, logits=logits).to_event(1)
            pyro.sample("pixels", pixels, obs=images)
        return torch.sigmoid(logits)

    def guide(images: torch.Tensor) -> None:
        with pyro.plate("images", images.shape[0]):
            hidden = torch.tanh(affine("guide.hidden", pixels=images / DOTS - 0.3))
            loc = affine("guide.style.loc", hidden=hidden)
            scale = torch.nn.functional.softplus(affine("guide.style.scale", hidden=hidden))
            style = pyro.sample("style", dist.Normal(loc, scale).to_event(1))
            logits = affine("guide.low", hidden=hidden, style=style)
            low = pyro.sample("low", dist.Bernoulli(logits=logits).to_event(1))
            pyro.sample("top", dist.Bernoulli(logits=affine("guide.top", low=low)).to_event(1))

    return model, guide
