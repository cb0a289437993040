"""Comparisons of optimizers with and without batch normalization preconditioning.

`python -m benchmarks.demo` runs the demonstration; `data`, `models`, `methods` and `train` are
parts to build other comparisons of.
"""
