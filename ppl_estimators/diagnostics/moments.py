"""Running moments of gradients and their parts: no draw is kept."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Array = np.ndarray


class Moments:
    """Mean and variance of every entry of a gradient, merged chunk by chunk (Welford; Chan, Golub and LeVeque 1983).

    With ``parts``, also of each part: its mean by entry, and over all entries the variance of each part and its
    covariance with the whole. Memory: two numbers for each entry, and one more for each entry and part.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Array] = {}
        self.squares: dict[str, Array] = {}
        self.part_mean: dict[str, Array] = {}
        self.part_squares: dict[str, Array] = {}  # [parts]
        self.part_products: dict[str, Array] = {}  # [parts], with the whole
        self.losses = Series()

    def add(self, losses: Array, gradients: Mapping[str, Array]) -> None:
        """A chunk: losses ``[n]``, gradients ``{name: [n, ...]}``."""
        n, total = len(losses), self.count + len(losses)
        for name, g in gradients.items():
            g = np.asarray(g, float)
            mean, squares = g.mean(0), ((g - g.mean(0)) ** 2).sum(0)
            if self.count:
                delta = mean - self.mean[name]
                squares = squares + self.squares[name] + delta**2 * (self.count * n / total)
                mean = self.mean[name] + delta * (n / total)
            self.mean[name], self.squares[name] = mean, squares
        self.losses.add(losses)
        self.count = total

    def add_parts(self, losses: Array, parts: Mapping[str, Array]) -> None:
        """A chunk in parts, ``{name: [n, parts, ...]}``."""
        n, count, total = len(losses), self.count, self.count + len(losses)
        for name, p in parts.items():
            p = np.asarray(p, float).reshape(n, p.shape[1], -1)
            whole = p.sum(1)
            mean = p.mean(0)
            away, away_whole = p - mean, whole - whole.mean(0)
            squares = np.einsum("npd,npd->p", away, away)
            products = np.einsum("npd,nd->p", away, away_whole)
            if count:
                delta = mean - self.part_mean[name]
                weight = count * n / total
                squares += self.part_squares[name] + weight * (delta**2).sum(-1)
                products += self.part_products[name] + weight * delta @ delta.sum(0)
                mean = self.part_mean[name] + delta * (n / total)
            self.part_mean[name], self.part_squares[name], self.part_products[name] = mean, squares, products
        self.add(losses, {name: np.asarray(p, float).sum(1) for name, p in parts.items()})

    def variance(self, name: str) -> Array:
        """Of each entry of one draw."""
        return self.squares[name] / (self.count - 1)

    @property
    def total_variance(self) -> float:
        """Of one draw, summed over all entries."""
        return float(sum(self.variance(n).sum() for n in self.squares))


class Series:
    """Mean and variance of a number."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def add(self, values: Array) -> None:
        for x in np.ravel(np.asarray(values, float)):
            self.count += 1
            delta = x - self.mean
            self.mean += delta / self.count
            self.squares += delta * (x - self.mean)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(np.sqrt(self.squares / max(self.count - 1, 1) / max(self.count, 1)))


def signal_to_noise(mean: Array, variance: float, count: int) -> float:
    """‖E g‖ / √(total variance) of one draw; the mean's own error, variance / count, is taken off its square."""
    square = max(float((np.asarray(mean) ** 2).sum()) - variance / count, 0.0)
    if variance <= 1e-24 * max(square, 1e-300):
        return float("inf") if square > 0 else 0.0
    return float(np.sqrt(square / variance))


def concentration(decay: float, count: int) -> float:
    """Σ w_i² / (Σ w_i)² of exponential weights: one over the number of draws that such an average is worth."""
    power = decay**count
    return (1 - decay) * (1 + power) / ((1 + decay) * (1 - power))


def running(square_of_mean: float, mean_square: float, decay: float, count: int) -> tuple[float, float]:
    """‖E g‖² and the total variance of one g, from exponential averages of n ≥ 2 independent draws, both without bias.

    The weights sum to 1 − dⁿ. With averages divided by that, and c their `concentration`,

        E ‖avg g‖² = ‖E g‖² + c V,   E avg ‖g‖² = ‖E g‖² + V.
    """
    whole = 1 - decay**count
    square = mean_square / whole
    variance = max(square - square_of_mean / whole**2, 0.0) / (1 - concentration(decay, count))
    return square - variance, variance
