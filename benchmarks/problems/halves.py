"""Which problems the library's defaults were chosen on, and which are for judging them.

Settled before any default was tried on the second half. What is chosen on the first half, by scores
on its validation splits, is reported on the second, with nothing chosen but learning rates, by the
same search for every method.
"""

import fnmatch

DEVELOPMENT = (
    "fc-digits-*",
    "fc-mnist-*",
    "fc-cifar10-*",
    "cnn-cifar10-b128-*",
    "cnn-cifar10-b2-*",
    "tabular-*",
    "friedman-*",
    "text-transformer",
)


def is_held_out(name: str) -> bool:
    """Whether nothing was chosen on a problem."""
    return not any(fnmatch.fnmatch(name, pattern) for pattern in DEVELOPMENT)
