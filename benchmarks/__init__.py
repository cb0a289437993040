"""Comparisons of ways to train, on real data: `python -m benchmarks --help` lists the commands.

Folders, each of which uses those before it: `networks`, `problems`, `training`; then what is
compared, `contest`, `demo`, `cost`, `regularization`, `scale` and `applications`.
"""
