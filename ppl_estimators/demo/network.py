"""The data, the network as a program, and its starting point: the same text and the same numbers for both libraries.

scikit-learn's 1,797 scanned digits have 8 × 8 pixels, each the number of ink dots in a 4 × 4 block of the original
scan. So the likelihood is a Binomial of 16 trials: images are used as they are, neither thresholded nor dithered.

    model   top ~ Bernoulli(b)               low ~ Bernoulli(top)           style ~ Normal(0, 1)
            pixels ~ Binomial(16, hidden(low, style))
    guide   style ~ Normal(hidden(pixels))   low ~ Bernoulli(hidden, style)   top ~ Bernoulli(low)

The guide runs the hierarchy backwards: `top` hangs on the draw of `low`, and `low` on the draw of
`style`, so a score-function gradient flows on through a pathwise sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

DOTS = 16
SIDE = 8
PIXELS = SIDE * SIDE


@dataclass(frozen=True)
class Digits:
    """Images as float32 counts, `[images, PIXELS]`, split once."""

    train: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray

    def minibatches(self, steps: int, size: int, seed: int) -> np.ndarray:
        """Indices into `train` for each step, `[steps, size]`: whole epochs, reshuffled each time."""
        rng = np.random.default_rng(seed)
        per_epoch = len(self.train) // size
        epochs = -(-steps // per_epoch)
        order = [rng.permutation(len(self.train))[: per_epoch * size] for _ in range(epochs)]
        return np.concatenate(order).reshape(-1, size)[:steps]

    def one_of_each(self) -> np.ndarray:
        """The first held-out image of each of the ten digits, `[10, PIXELS]`."""
        first = [int(np.argmax(self.held_out_labels == digit)) for digit in range(10)]
        return self.held_out[first]


def load(seed: int) -> Digits:
    """1,437 images to train on and 360 held out, every digit in proportion."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, held_out, _, held_out_labels = train_test_split(
        images.astype(np.float32), labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return Digits(train, held_out, held_out_labels)


TOP, LOW, STYLE, HIDDEN = 32, 64, 8, 128

LAYERS = {  # name: ({input: size}, outputs)
    "model.low": ({"top": TOP}, LOW),
    "model.hidden": ({"low": LOW, "style": STYLE}, HIDDEN),
    "model.pixels": ({"hidden": HIDDEN}, PIXELS),
    "guide.hidden": ({"pixels": PIXELS}, HIDDEN),
    "guide.style.loc": ({"hidden": HIDDEN}, STYLE),
    "guide.style.scale": ({"hidden": HIDDEN}, STYLE),
    "guide.low": ({"hidden": HIDDEN, "style": STYLE}, LOW),
    "guide.top": ({"low": LOW}, TOP),
}


def initial_parameters(images: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Weights of variance 1 / inputs; the biases that show the mean image to both ends.

    `images` are the training images, `[images, PIXELS]`. Returns float32 arrays by parameter name.
    """
    rng = np.random.default_rng(seed)
    parameters = {"model.top.bias": np.zeros(TOP)}
    for name, (inputs, outputs) in LAYERS.items():
        for source, size in inputs.items():
            weight = rng.normal(size=(size, outputs)) / np.sqrt(sum(inputs.values()))
            parameters[f"{name}.{source}"] = weight
        parameters[f"{name}.bias"] = np.zeros(outputs)
    mean = np.clip(images.mean(0) / DOTS, 0.005, 0.995)
    parameters["model.pixels.bias"] = np.log(mean) - np.log1p(-mean)
    parameters["guide.style.scale.bias"] -= 1.0
    return {name: value.astype(np.float32) for name, value in parameters.items()}


def program(library: str, initial: Mapping[str, Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Model and guide over `images`, `[batch, PIXELS]`, in "pyro" or "numpyro": ordinary ones, with nothing of ours in
    them. Parameters start at `initial`; the model returns the expected share of ink of each pixel."""
    array: Any
    nn: Any
    if library == "pyro":
        import pyro as ppl
        import pyro.distributions as dist
        import torch.nn.functional as nn
        from torch import tensor as array
    else:
        import jax.nn as nn
        import numpyro as ppl
        import numpyro.distributions as dist
        from jax.numpy import asarray as array
    start = {name: array(value) for name, value in initial.items()}

    def affine(name: str, **inputs: Any) -> Any:
        terms = [value @ ppl.param(f"{name}.{source}", start[f"{name}.{source}"]) for source, value in inputs.items()]
        return sum(terms, start=ppl.param(f"{name}.bias", start[f"{name}.bias"]))

    def bits(name: str, logits: Any) -> Any:
        return ppl.sample(name, dist.Bernoulli(logits=logits).to_event(1))

    def model(images: Any) -> Any:
        with ppl.plate("images", images.shape[0]):
            top = bits("top", affine("model.top"))
            low = bits("low", affine("model.low", top=top))
            style = ppl.sample("style", dist.Normal(array([0.0] * STYLE), 1.0).to_event(1))
            logits = affine("model.pixels", hidden=nn.tanh(affine("model.hidden", low=low, style=style)))
            ppl.sample("pixels", dist.Binomial(total_count=DOTS, logits=logits).to_event(1), obs=images)
        return nn.sigmoid(logits)

    def guide(images: Any) -> None:
        with ppl.plate("images", images.shape[0]):
            hidden = nn.tanh(affine("guide.hidden", pixels=images / DOTS - 0.3))
            scale = nn.softplus(affine("guide.style.scale", hidden=hidden))
            law = dist.Normal(affine("guide.style.loc", hidden=hidden), scale)
            style = ppl.sample("style", law.to_event(1))
            low = bits("low", affine("guide.low", hidden=hidden, style=style))
            bits("top", affine("guide.top", low=low))

    return model, guide
