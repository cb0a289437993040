"""Regularization in z-space beside regularization in p."""
