"""Who the project is, said in several files in one way."""

import pathlib
import re
import tomllib

import pytest
import yaml

import bnp_optax

ROOT = pathlib.Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_license():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in read("LICENSE")
    assert "Version 2.0" in read("LICENSE")


def test_citation_is_of_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["version"] == bnp_optax.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == REPOSITORY
    assert [author["name"] for author in PROJECT["authors"]] == [
        author["name"] for author in citation["authors"]
    ]
    assert f"version {bnp_optax.__version__}" in read("docs/cite.md")


def test_changelog_has_this_version_below_what_is_not_released():
    headings = re.findall(r"^## \[(.+?)\](.*)$", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == bnp_optax.__version__
    assert re.fullmatch(r" - \d{4}-\d\d-\d\d", headings[1][1])


@pytest.mark.parametrize("name", ["README.md", "mkdocs.yml", "CITATION.cff", "docs/index.md"])
def test_addresses_are_those_of_pyproject(name):
    """`OWNER` stands for who publishes it; one `sed` over the repository replaces it."""
    owner = REPOSITORY.split("/")[3]
    found = re.findall(r"https://(?:colab[\w./]*/)?github(?:\.com)?/([\w-]+)/bnp_optax", read(name))
    assert found
    assert set(found) == {owner}


def test_only_those_extras_that_are_needed():
    required = {re.split(r"[>=\[]", line)[0] for line in PROJECT["dependencies"]}
    assert required == {"jax", "jaxlib", "optax", "jaxtyping"}


def test_workflows_and_templates_are_yaml():
    files = [ROOT / ".pre-commit-config.yaml", *(ROOT / ".github").rglob("*.yml")]
    if not (ROOT / ".github").exists():
        pytest.skip("a source distribution has no .github")
    assert len(files) > 5
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file
