"""The demonstration: a small comparison on a laptop, `make demo`."""
