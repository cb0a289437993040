"""What a training has revealed: Renyi differential privacy of the subsampled Gaussian."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import gammaln

ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 384, 512)


def subsampled_gaussian(rate: float, noise: float, order: int) -> float:
    """The divergence of one step, of an integer order.

        1 / (a - 1) log sum_k binom(a, k) (1 - q)^(a - k) q^k exp(k (k - 1) / (2 sigma^2))

    Args:
      rate: q in (0, 1], with which each example enters the batch, independently of the others.
      noise: sigma > 0, deviation of the noise relative to what one example may change the sum by.
      order: a >= 2.

    Source: Mironov, Talwar, Zhang, "Renyi differential privacy of the sampled Gaussian mechanism",
    2019, section 3.3; neighbours differ by one example that one has and the other has not.
    """
    if rate == 1.0:
        return order / (2.0 * noise**2)
    k = np.arange(order + 1)
    chosen = gammaln(order + 1) - gammaln(k + 1) - gammaln(order - k + 1)
    drawn = (order - k) * math.log1p(-rate) + k * math.log(rate)
    terms = chosen + drawn + k * (k - 1) / (2.0 * noise**2)
    return float(np.logaddexp.reduce(terms)) / (order - 1)


def epsilon(divergences: Sequence[float], delta: float) -> float:
    """The least epsilon, for `delta`, of the total divergences at `ORDERS`.

    Source: Canonne, Kamath, Steinke, "The discrete Gaussian for differential privacy", NeurIPS
    2020, proposition 12.
    """
    return min(
        divergence + math.log1p(-1.0 / order) - math.log(delta * order) / (order - 1)
        for order, divergence in zip(ORDERS, divergences, strict=True)
    )


def spent(rate: float, noise: float, steps: int, delta: float, once: float | None = None) -> float:
    """Epsilon of a training.

    Args:
      rate: As in `subsampled_gaussian`.
      noise: Of each step, likewise.
      steps: How many.
      delta: The probability of the exception, below 1 / examples.
      once: Noise of a release from all examples beside the training, if any.
    """
    release = math.inf if once is None else once
    totals = [
        steps * subsampled_gaussian(rate, noise, order) + order / (2.0 * release**2)
        for order in ORDERS
    ]
    return epsilon(totals, delta)


def noise_for(
    target: float, rate: float, steps: int, delta: float, once: float | None = None
) -> float:
    """The least noise of each step with which a training spends no more than `target`.

    Raises:
      ValueError: If the release alone spends more.
    """
    low, high = 0.2, 200.0
    if spent(rate, high, steps, delta, once) > target:
        msg = f"no noise keeps epsilon below {target} with a release of noise {once} beside it"
        raise ValueError(msg)
    while high - low > 1e-4 * low:
        middle = (low + high) / 2.0
        low, high = (
            (low, middle)
            if spent(rate, middle, steps, delta, once) <= target
            else (
                middle,
                high,
            )
        )
    return high
