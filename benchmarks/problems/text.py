"""Prediction of the next character in the source of installed packages."""

import dataclasses
import functools
import hashlib
import platform
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import sklearn
from jaxtyping import Int

from benchmarks.data import DataError, Dataset, Split
from benchmarks.networks.small import Norm
from benchmarks.networks.transformer import CharTransformer
from benchmarks.problems import lineups
from benchmarks.problems.base import Data, Problem, Scale
from benchmarks.problems.record import as_data

CONTEXT = 64
BATCH_SIZE = 16
STEPS = {"small": 500, "paper": 15_000}
POINTS = 10
N_EVAL = 256
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))

# Modules of one file in every Python since 3.11; split by file, so that no text is shared.
MODULES: dict[str, tuple[str, ...]] = {
    "train": (
        *("argparse", "ast", "base64", "bdb", "calendar", "cmd", "codecs", "compileall"),
        *("configparser", "contextlib", "csv", "dataclasses", "difflib", "dis", "doctest", "enum"),
        *("fileinput", "fractions", "ftplib", "functools", "gettext", "gzip", "heapq", "imaplib"),
        *("inspect", "ipaddress", "locale", "mailbox", "mimetypes", "optparse", "os", "pdb"),
        *("pickle", "plistlib", "poplib", "pprint", "pstats", "random", "selectors", "shutil"),
    ),
    "validation": ("smtplib", "socket", "socketserver", "statistics", "subprocess", "tempfile"),
    "test": ("textwrap", "threading", "timeit", "tokenize", "trace", "traceback", "typing"),
}

# The same of another package, whose modules are laid out alike since its version 1.6.
SKLEARN_MODULES: dict[str, tuple[str, ...]] = {
    "train": (
        *("cluster/_kmeans", "cluster/_agglomerative", "cluster/_birch", "cluster/_dbscan"),
        *("decomposition/_pca", "decomposition/_nmf", "decomposition/_fastica"),
        *("ensemble/_forest", "ensemble/_gb", "ensemble/_bagging", "ensemble/_voting"),
        *("linear_model/_ridge", "linear_model/_logistic", "linear_model/_bayes"),
        *("manifold/_t_sne", "manifold/_isomap", "metrics/_ranking", "metrics/_regression"),
        *("neighbors/_base", "neighbors/_lof", "preprocessing/_data", "svm/_classes"),
    ),
    "validation": ("linear_model/_huber", "mixture/_base", "tree/_classes"),
    "test": ("cluster/_spectral", "linear_model/_ransac", "naive_bayes"),
}


def encode(text: str) -> Int[np.ndarray, " characters"]:
    """Indices in `CHARACTERS`: a tab is four spaces, other characters are left out."""
    text = text.replace("\t", "    ")
    return np.array([_INDEX[c] for c in text if c in _INDEX], np.int32)


def windows(
    codes: Int[np.ndarray, " characters"],
) -> tuple[Int[np.ndarray, "n context"], Int[np.ndarray, "n context"]]:
    """Texts of `CONTEXT` characters, one after the other, and the character after each.

    What is left at the end is dropped.
    """
    n = (len(codes) - 1) // CONTEXT
    ahead = codes[1 : n * CONTEXT + 1].reshape(n, CONTEXT)
    return codes[: n * CONTEXT].reshape(n, CONTEXT), ahead


@dataclasses.dataclass(frozen=True)
class Source:
    """Loads the text of some modules; the `load` of a problem.

    Attributes:
      name: What the modules are called together.
      modules: By split, the modules, as paths below the folder without their suffix.
      seed: Of the choice of windows.
    """

    name: str
    modules: Mapping[str, Sequence[str]]
    seed: int = 0

    def __call__(self, data_dir: Path | None = None) -> Data:
        """Windows of the modules as they are installed; no data folder is needed.

        So the text depends on a version, which is among the facts. All windows of the training
        modules are there, and 256 chosen at random of each of the others.

        Args:
          data_dir: Not used.

        Raises:
          DataError: If the modules are not installed as files.
        """
        texts = _texts(_folder(self.name), tuple(m for part in self.modules.values() for m in part))
        parts = {}
        for part, modules in self.modules.items():
            pairs = (windows(encode(texts[module])) for module in modules)
            x, y = map(np.concatenate, zip(*pairs, strict=True))
            if part != "train":
                chosen = np.random.default_rng(self.seed).choice(len(x), N_EVAL, replace=False)
                x, y = x[chosen], y[chosen]
            parts[part] = Split(x, y)
        whole = "".join(texts.values())
        return as_data(
            Dataset(self.name, **parts),
            f"codes 0..{len(CHARACTERS) - 1} of newline and printable ASCII",
            _SOURCES[self.name],
            seed=self.seed,
            **_version(self.name),
            n_files=len(texts),
            n_characters=len(whole),
            sha256_of_text=hashlib.sha256(whole.encode()).hexdigest(),
            modules={part: list(modules) for part, modules in self.modules.items()},
        )


PYTHON = Source("python", MODULES)
SKLEARN = Source("scikit-learn", SKLEARN_MODULES)
_SOURCES = {"python": "Python's standard library", "scikit-learn": "the package scikit-learn"}


def next_character(source: Source, scale: Scale) -> Problem:
    """A transformer of two blocks on windows of 64 characters."""
    return Problem(
        name="text-transformer" if source is PYTHON else f"text-{source.name}",
        title=f"Transformer, next character of {_TITLES[source.name]}, batch size {BATCH_SIZE}",
        load=source,
        network=functools.partial(_network, width=64, depth=2),
        batch_size=BATCH_SIZE,
        steps=STEPS[scale],
        points=POINTS,
        methods=lineups.TRANSFORMER if source is PYTHON else lineups.HELD_OUT_TEXT,
    )


def next_character_deep(scale: Scale) -> Problem:
    """Six blocks, twice as wide, for twice as many steps: for an accelerator."""
    return Problem(
        name="text-transformer-deep",
        title=f"Transformer of 6 blocks, next character of Python code, batch size {BATCH_SIZE}",
        load=PYTHON,
        network=functools.partial(_network, width=128, depth=6),
        batch_size=BATCH_SIZE,
        steps=2 * STEPS[scale],
        points=POINTS,
        methods=lineups.DEEP_TRANSFORMER,
    )


_TITLES = {"python": "Python code", "scikit-learn": "scikit-learn's code"}
_INDEX = {c: i for i, c in enumerate(CHARACTERS)}


def _folder(name: str) -> str:
    if name == "python":
        return sysconfig.get_paths()["stdlib"]
    return str(Path(sklearn.__file__).parent)


def _version(name: str) -> dict[str, str]:
    if name == "python":
        return {"python": platform.python_version()}
    return {"version": sklearn.__version__}


@functools.lru_cache(maxsize=2)
def _texts(folder: str, modules: tuple[str, ...]) -> dict[str, str]:
    """By module, its source."""
    texts = {}
    for module in modules:
        path = Path(folder) / f"{module}.py"
        try:
            texts[module] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            msg = (
                f"cannot read {path} ({type(error).__name__}); the text problem needs a Python of "
                "3.11 or later whose standard library is installed as files, and scikit-learn"
            )
            raise DataError(msg) from error
    return texts


def _network(norm: Norm, steps: int, width: int, depth: int) -> CharTransformer:
    """The length of the run is not needed."""
    return CharTransformer(
        vocabulary=len(CHARACTERS), width=width, depth=depth, heads=4, context=CONTEXT, norm=norm
    )
