"""Sketches and Nystrom approximations of explicit matrices, in float64."""

import numpy as np

from bnp_optax import sketches

K = sketches.N_PRODUCTS


def signs(k, n):
    return np.asarray(sketches.signs(k, n), np.float64)


def explicit(matrix, k=K):
    """Products with the signs, and the diagonal."""
    products = signs(k, matrix.shape[-1]) @ matrix
    return np.concatenate([products, np.diagonal(matrix, axis1=-2, axis2=-1)[..., None, :]], -2)


def nystrom(matrix, rank, k=K):
    """M O (O^T M O)^+ O^T M, and of that the part of the largest eigenvalues."""
    omega = signs(k, len(matrix)).T
    products = matrix @ omega
    whole = products @ np.linalg.pinv(omega.T @ products, rcond=1e-13, hermitian=True) @ products.T
    values, vectors = np.linalg.eigh(whole)
    return vectors[:, -rank:] * values[-rank:] @ vectors[:, -rank:].T


def spectrum(n, values, seed=0):
    """Falling eigenvalues, random eigenvectors, and the matrix that has them."""
    draws = np.random.default_rng(seed).normal(size=(n, len(values)))
    vectors = np.linalg.qr(draws)[0]
    return values, vectors, vectors * values @ vectors.T
