"""The figures of the report: what is drawn, and how, on cells whose numbers are known."""

import matplotlib.image
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from support.report_cells import FC6, POINTS, STEPS, altered, make_cell, only, with_curve

from benchmarks.contest import curves
from benchmarks.contest.cells import Cell
from benchmarks.contest.summary import contests
from benchmarks.training.methods import METHODS


def figure_of(found, name):
    group = next(g for g in curves.GROUPS if g.name == name)
    return curves.draw(contests(found), group)


def test_lines_and_bands_of_a_panel():
    losses = (0.5, 1.0, 1.5)
    found = [make_cell(losses=losses), make_cell(method="bnp_sgd", scores=(0.7, 0.8, 0.9))]
    figure = figure_of(found, "figure-4")
    above, below = figure.axes
    assert (above.get_yscale(), below.get_yscale()) == ("log", "linear")
    assert above.get_title() == f"Title of {FC6}"
    assert above.get_ylabel() == "training loss, nats"
    assert below.get_ylabel() == "test accuracy, %"
    sgd, bnp = above.get_lines()
    assert (sgd.get_label(), bnp.get_label()) == ("SGD", "BNP + SGD")
    assert {line.get_linestyle() for line in above.get_lines()} == {"--"}
    assert {line.get_linestyle() for line in below.get_lines()} == {"-"}
    assert to_rgb(bnp.get_color()) == to_rgb(METHODS["bnp_sgd"].color)
    np.testing.assert_array_equal(sgd.get_xdata(), np.arange(10, STEPS + 1, 10))
    expected = np.mean([np.geomspace(2.3, loss, POINTS) for loss in losses], axis=0)
    np.testing.assert_allclose(sgd.get_ydata(), expected)
    band = below.collections[1].get_paths()[0].vertices
    at_end = band[band[:, 0] == STEPS, 1]
    assert (at_end.min(), at_end.max()) == pytest.approx((70, 90))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["SGD", "BNP + SGD"]


def test_what_diverged_stays_in_the_panel():
    broken = np.full(POINTS, np.nan)
    found = [
        make_cell(),
        with_curve(make_cell(method="adam"), 1, train_loss=broken, score=broken),
        make_cell(method="bnp_sgd", losses=(np.nan,) * 3, scores=(np.nan,) * 3),
    ]
    figure = figure_of(found, "others")
    for axis in figure.axes:
        for line in axis.get_lines():
            assert np.isfinite(line.get_ydata()).all()
    _, adam, _ = figure.axes[0].get_lines()
    np.testing.assert_allclose(adam.get_ydata(), 3 * 2.3)
    _, adam, _ = figure.axes[1].get_lines()
    np.testing.assert_array_equal(adam.get_ydata(), 0)


def test_drawn_are_the_papers_the_best_baseline_and_the_best_of_ours():
    names = ["sgd", "adam", "batchnorm", "layernorm", "bnp_sgd", "adam_z", "bnp_sgd_warm"]
    found = [make_cell(method=name) for name in names]
    found[1] = make_cell(method="adam", scores=(0.9, 0.9, 0.9))
    found[5] = make_cell(method="adam_z", scores=(0.9, 0.9, 0.9))
    contest = only(found)
    drawn = curves.chosen(contest, ("sgd", "bnp_sgd", "absent"))
    assert [s.name for s in drawn] == ["sgd", "adam", "bnp_sgd", "adam_z"]
    assert [s.name for s in curves.chosen(contest, names, limit=3)] == ["sgd", "adam", "adam_z"]
    incomplete = altered(found[4], complete=False)
    assert [s.name for s in curves.chosen(only([found[0], incomplete]), names)] == ["sgd"]


def test_methods_of_one_color_differ_in_markers():
    found = [make_cell(method=name) for name in ("sgd", "u1", "u2", "u3", "u4", "u5", "u6")]
    group = curves.Group("x", "X", ("*",), tuple(c.method["name"] for c in found))
    (axis, _) = curves.draw(contests(found), group).axes
    styles = {(to_rgb(line.get_color()), line.get_marker()) for line in axis.get_lines()}
    assert len(styles) == 7


@pytest.mark.parametrize(
    ("problem", "group"),
    [
        ("fc-mnist-b60-raw", "figure-3"),
        ("fc-cifar10-b6-raw", "figure-4"),
        ("cnn-cifar10-b1-raw", "figure-4"),
        ("cnn-cifar10-b128-raw", "figure-5"),
        ("drift-scale-digits", "drift"),
        ("fc-fashion-mnist-b60-raw", "further-images"),
        ("resnet110-cifar10", "figures-6-7"),
        ("friedman-raw", "others"),
    ],
)
def test_groups(problem, group):
    assert curves.group_of(problem).name == group


def test_figures_are_written(tmp_path):
    # Two problems to a figure, and one in the last.
    found = [make_cell(f"fc-cifar10-b60-{i}", m) for i in range(3) for m in ("sgd", "bnp_sgd")]
    skipped = make_cell("resnet-x", "bnp_sgd")
    found.append(Cell(skipped.problem, skipped.method, skipped="too large"))
    paths = curves.save_figures(found, tmp_path / "new")
    assert paths == {
        "fc-cifar10-b60-0": tmp_path / "new" / "figure-3-1.png",
        "fc-cifar10-b60-2": tmp_path / "new" / "figure-3-2.png",
    }
    for path in paths.values():
        image = matplotlib.image.imread(path)
        assert image.shape[1] > 800
        assert image[..., :3].std() > 0.02
