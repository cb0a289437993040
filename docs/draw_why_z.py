"""Draw docs/why_z.png: one unit's loss in p and in z, and gradient descent in both.

python docs/draw_why_z.py
"""

import pathlib

import matplotlib.pyplot as plt
import numpy as np

BLUE, ORANGE = "#0072B2", "#D55E00"
N_STEPS = 15
MEAN, STD = 1.5, 0.5


def main() -> None:
    """The picture of one unit with one input."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=2000)
    h = MEAN + STD * (h - h.mean()) / h.std()
    inputs = np.stack([np.ones_like(h), h])  # [1, h], which [b, w] multiplies
    hessian = inputs @ inputs.T / h.size
    best = np.array([1.0, 1.0])
    P = np.array([[1.0, -MEAN / STD], [0.0, 1.0 / STD]])  # U D
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for axis, change, color, title in (
        (axes[0], np.eye(2), ORANGE, "in p = [b, w]"),
        (axes[1], P, BLUE, "in z, where p = P z"),
    ):
        matrix = change.T @ hessian @ change
        target = np.linalg.solve(change, best)
        values = np.linalg.eigvalsh(matrix)
        rate = 2.0 / values.sum()  # the best for both ends of the spectrum
        start = target + np.array([-2.0, 1.5])
        points = [start]
        for _ in range(N_STEPS):
            points.append(points[-1] - rate * matrix @ (points[-1] - target))
        path = np.array(points)
        span = np.linspace(-3.0, 3.0, 200)
        x, y = np.meshgrid(target[0] + span, target[1] + span)
        away = np.stack([x - target[0], y - target[1]])
        loss = 0.5 * np.einsum("iab,ij,jab->ab", away, matrix, away)
        axis.contour(x, y, loss, levels=np.geomspace(0.02, 60, 12), colors="0.75", linewidths=0.8)
        axis.plot(*path.T, "o-", color=color, markersize=4, linewidth=1.2)
        axis.plot(*target, "k*", markersize=12)
        axis.set_aspect("equal")
        axis.set(title=f"{title}: condition number {values[-1] / values[0]:.0f}")
        axis.set(xlabel="bias", ylabel="weight")
    figure.savefig(pathlib.Path(__file__).parent / "why_z.png", dpi=110)


if __name__ == "__main__":
    main()
