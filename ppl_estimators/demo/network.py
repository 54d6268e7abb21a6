"""The shapes and the starting point of the network, the same numbers for both libraries.

    model   top ~ Bernoulli(b)               low ~ Bernoulli(top)           style ~ Normal(0, 1)
            pixels ~ Binomial(16, hidden(low, style))
    guide   style ~ Normal(hidden(pixels))   low ~ Bernoulli(hidden, style)   top ~ Bernoulli(low)

The guide runs the hierarchy backwards: `top` hangs on the draw of `low`, and `low` on the draw of
`style`, so a score-function gradient flows on through a pathwise sample.
"""

from __future__ import annotations

import numpy as np

from ppl_estimators.demo.digits import DOTS, PIXELS

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
