"""The data: scikit-learn's 1,797 scanned digits of 8 × 8 pixels, each a count from 0 to 16.

A pixel of this set is the number of ink dots in a 4 × 4 block of the original scan, so the likelihood
is a Binomial of 16 trials: the images are used as they are, neither thresholded nor dithered.
"""

from __future__ import annotations

from dataclasses import dataclass

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
