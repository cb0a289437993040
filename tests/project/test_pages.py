"""The Python of the README and of the documentation runs, each block alone, as pasted."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[2]
# Its blocks follow each other: tests/project/test_scale.py.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs" / "scale.md")


def blocks(page: pathlib.Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


CASES = [
    pytest.param(page, block, id=f"{page.relative_to(ROOT)}:{i}")
    for page in PAGES
    for i, block in enumerate(blocks(page))
]


@pytest.fixture
def as_users_have_it():
    """JAX without the strictness of the tests, and in a hurry: this is about what runs."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.filterwarnings("default::DeprecationWarning")
@pytest.mark.parametrize(("page", "block"), CASES)
def test_runs_alone(page, block):
    exec(compile(block, str(page), "exec"), {"__name__": "pasted"})


def test_every_guide_and_bridge_has_a_block_with_an_assertion_or_two():
    for folder in ("guides", "bridges"):
        pages = list((ROOT / "docs" / folder).glob("*.md"))
        assert len(pages) >= 6
        for page in pages:
            assert blocks(page), page
    assert sum("assert" in case.values[1] for case in CASES) > 15


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_navigation_and_links_of_the_readme_exist():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation, page
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_reference_has_every_public_name():
    import bnp_optax
    from bnp_optax import diagnostics

    pages = "\n".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    paths = re.findall(r"^::: bnp_optax\.([\w.]+)$", pages, re.MULTILINE)
    # Where a module has the name of its function, griffe takes the module: so some paths are full.
    headed = re.findall(r"heading: bnp_optax\.([\w.]+)$", pages, re.MULTILINE)
    documented = {*paths, *headed}
    public = set(bnp_optax.__all__) | {f"diagnostics.{name}" for name in diagnostics.__all__}
    # States are described where their transformation is.
    public = {name for name in public if not name.endswith("State")} | {"TrainState"}
    assert public <= documented | {"flax_nnx"}, public - documented
