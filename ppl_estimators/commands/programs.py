"""The programs that `report`, `compare` and `recommend` look at: small ones, those of the examples, or your own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ppl_estimators.backends import Library
from ppl_estimators.commands.demo import DISTRIBUTIONS
from ppl_estimators.commands.output import CommandError

#: built-in programs, and what is worth seeing in each
BUILT_IN = {
    "bit": "one Bernoulli site: every closed form is known",
    "bits": "ten Bernoulli sites with one shared cost",
    "mixture": "a component (Categorical) and a location (Normal): two kinds of sites",
    "counts": "a Poisson site, which has no reparameterised draw",
    "toy": "examples/bernoulli_toy.py: (b - 0.45)² under a fair coin",
    "square": "examples/gaussian_square.py: z² under a Normal of mean 2",
    "fit": "examples/categorical_fit.py: three categories, and an evidence that shifts every cost",
    "fairness": "examples/beta_bernoulli.py: a Beta guide, ten tosses",
}
Program = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def load(name: str, backend: Library) -> Program:
    """``(model, guide, args)`` of a built-in name, or of ``module:function``, which returns that."""
    if find_spec(backend) is None:
        raise CommandError(f"--backend {backend} needs it: pip install {DISTRIBUTIONS[backend]}")
    if ":" not in name:
        if name not in BUILT_IN:
            raise CommandError(f"program '{name}' is not known. Use {', '.join(BUILT_IN)}, or module:function", code=2)
        return _built_in(name, backend)
    module, _, function = name.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, TypeError) as error:
        raise CommandError(f"cannot load '{name}': {error}", code=2) from None
    finally:
        sys.path.pop(0)
    if not isinstance(found, tuple) or len(found) not in (2, 3) or not all(map(callable, found[:2])):
        raise CommandError(f"'{name}' must return (model, guide) or (model, guide, args)", code=2)
    return found[0], found[1], tuple(found[2]) if len(found) == 3 else ()


def _built_in(name: str, backend: Library) -> Program:
    array: Any
    if backend == Library.pyro:
        import pyro as ppl
        import pyro.distributions as dist
        from torch import tensor as array
    else:
        import numpyro as ppl
        import numpyro.distributions as dist
        from jax.numpy import array
    sample, param, factor, positive = ppl.sample, ppl.param, ppl.factor, dist.constraints.positive
    handlers = ppl.poutine if backend == Library.pyro else ppl.handlers

    def bit_model() -> None:
        sample("x", dist.Normal(2.0 * sample("b", dist.Bernoulli(0.4)), 1.0), obs=array(1.3))

    def bit_guide() -> None:
        sample("b", dist.Bernoulli(logits=param("logit", array(-0.8))))

    def bits_model() -> None:
        total = sum((1 + i) * sample(f"b{i}", dist.Bernoulli(0.4)) for i in range(10))
        sample("x", dist.Normal(total, 5.0), obs=array(20.0))

    def bits_guide() -> None:
        logits = param("logits", array([0.2 * i - 0.9 for i in range(10)]))
        for i in range(10):
            sample(f"b{i}", dist.Bernoulli(logits=logits[i]))

    def mixture_model() -> None:
        k = sample("component", dist.Categorical(array([0.5, 0.3, 0.2])))
        w = sample("location", dist.Normal(2.0 * k - 2.0, 1.0))
        sample("x", dist.Normal(w, 0.5), obs=array(1.1))

    def mixture_guide() -> None:
        sample("component", dist.Categorical(logits=param("logits", array([0.1, 0.4, -0.2]))))
        sample("location", dist.Normal(param("mean", array(0.3)), 0.8))

    def counts_model() -> None:
        sample("x", dist.Normal(1.0 * sample("n", dist.Poisson(4.0)), 1.0), obs=array(5.0))

    def counts_guide() -> None:
        sample("n", dist.Poisson(param("rate", array(3.0), constraint=positive)))

    def toy_model() -> None:
        with handlers.mask(mask=False):
            b = sample("b", dist.Bernoulli(0.5))
        factor("cost", -((b - 0.45) ** 2))

    def toy_guide() -> None:
        with handlers.mask(mask=False):
            sample("b", dist.Bernoulli(logits=param("logit", array(0.0))))

    def square_model() -> None:
        with handlers.mask(mask=False):
            z = sample("z", dist.Normal(0.0, 1.0))
        factor("square", z**2)

    def square_guide() -> None:
        with handlers.mask(mask=False):
            sample("z", dist.Normal(param("loc", array(2.0)), 1.0))

    def fit_model() -> None:
        z = sample("z", dist.Categorical(array([0.1, 0.6, 0.3])))
        factor("likelihood", array([-20.0, -20.0, -20.0])[z])

    def fit_guide() -> None:
        sample("z", dist.Categorical(logits=param("theta", array([0.0, 0.0, 0.0]))))

    def fairness_model() -> None:
        fairness = sample("fairness", dist.Beta(10.0, 10.0))
        with ppl.plate("tosses", 10):
            sample("heads", dist.Bernoulli(fairness), obs=array([1.0] * 6 + [0.0] * 4))

    def fairness_guide() -> None:
        alpha, beta = (param(n, array(15.0), constraint=positive) for n in ("alpha", "beta"))
        sample("fairness", dist.Beta(alpha, beta))

    both = {
        "bit": (bit_model, bit_guide),
        "bits": (bits_model, bits_guide),
        "mixture": (mixture_model, mixture_guide),
        "counts": (counts_model, counts_guide),
        "toy": (toy_model, toy_guide),
        "square": (square_model, square_guide),
        "fit": (fit_model, fit_guide),
        "fairness": (fairness_model, fairness_guide),
    }
    return (*both[name], ())
