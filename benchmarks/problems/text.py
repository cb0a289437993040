"""Prediction of the next character in Python's standard library."""

import functools
import hashlib
import platform
import sysconfig
from pathlib import Path

import numpy as np
from jaxtyping import Int

from benchmarks.data import DataError, Dataset, Split
from benchmarks.models import Norm
from benchmarks.problems import lineups
from benchmarks.problems.base import Data, Problem, Scale
from benchmarks.problems.record import as_data
from benchmarks.transformer import CharTransformer

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


def load(data_dir: Path | None = None, seed: int = 0) -> Data:
    """Windows of the modules of the running Python; no data folder is needed.

    So the text depends on Python's version, which is among the facts. All windows of the training
    modules are there, and 256 chosen at random of each of the others.

    Args:
      data_dir: Not used.
      seed: Of the choice of windows.

    Raises:
      DataError: If this Python has no such files.
    """
    folder = sysconfig.get_paths()["stdlib"]
    texts = _texts(folder)
    parts = {}
    for part, modules in MODULES.items():
        x, y = map(np.concatenate, zip(*(windows(encode(texts[m])) for m in modules), strict=True))
        if part != "train":
            chosen = np.random.default_rng(seed).choice(len(x), N_EVAL, replace=False)
            x, y = x[chosen], y[chosen]
        parts[part] = Split(x, y)
    whole = "".join(texts.values())
    return as_data(
        Dataset("python", **parts),
        f"codes 0..{len(CHARACTERS) - 1} of newline and printable ASCII",
        "Python's standard library",
        seed=seed,
        python=platform.python_version(),
        n_files=len(texts),
        n_characters=len(whole),
        sha256_of_text=hashlib.sha256(whole.encode()).hexdigest(),
        modules={part: list(modules) for part, modules in MODULES.items()},
    )


def next_character(scale: Scale) -> Problem:
    """A transformer of two blocks on windows of 64 characters."""
    return Problem(
        name="text-transformer",
        title=f"Transformer, next character of Python code, batch size {BATCH_SIZE}",
        load=load,
        network=_network,
        batch_size=BATCH_SIZE,
        steps=STEPS[scale],
        points=POINTS,
        methods=lineups.TRANSFORMER,
    )


_INDEX = {c: i for i, c in enumerate(CHARACTERS)}


@functools.lru_cache(maxsize=1)
def _texts(folder: str) -> dict[str, str]:
    """By module, its source."""
    texts = {}
    for module in (m for modules in MODULES.values() for m in modules):
        path = Path(folder) / f"{module}.py"
        try:
            texts[module] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            msg = (
                f"cannot read {path} ({type(error).__name__}); the text problem needs a Python of "
                "3.11 or later whose standard library is installed as files"
            )
            raise DataError(msg) from error
    return texts


def _network(norm: Norm, steps: int) -> CharTransformer:
    """The length of the run is not needed."""
    return CharTransformer(
        vocabulary=len(CHARACTERS), width=64, depth=2, heads=4, context=CONTEXT, norm=norm
    )
