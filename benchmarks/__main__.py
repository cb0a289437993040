"""All benchmarks: `python -m benchmarks COMMAND`, and `--help` for what there is."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import tyro

PROGRAM = "python -m benchmarks"


class Command(NamedTuple):
    """A command.

    Attributes:
      does: What it does, in a line.
      module: Where it is; imported when the command is called.
      function: What is called. Its parameters are the options of the command line.
      parses: Whether it takes the command line itself, as a list of strings.
    """

    does: str
    module: str
    function: str = "main"
    parses: bool = False


COMMANDS = {
    "run": Command("tune and train methods on problems: the contest", "contest.command", "run"),
    "report": Command("tables and figures of the contest", "contest.command", "report"),
    "need": Command("does a problem need it: one batch beside who won", "contest.need"),
    "demo": Command("a comparison in three minutes on a laptop", "demo.command", parses=True),
    "cost": Command("what a training step costs, beside BatchNorm's", "cost.step"),
    "cost-capture": Command("what the capture adds before a step runs", "cost.capture"),
    "cost-regularizer": Command("what the regularizers cost", "cost.regularizers"),
    "cost-transformer": Command("what the capture costs in a transformer", "cost.transformer"),
    "cost-whiten": Command("what whitening costs over SGD", "cost.whiten"),
    "regularization": Command(
        "regularization in z beside that in p", "regularization.command", parses=True
    ),
    "scale": Command("many devices against one, in every mode of JAX", "scale.command"),
    "applications": Command("where normalization cannot go", "applications.command"),
    "plasticity": Command(
        "why a learner of many tasks stops learning", "applications.plasticity", parses=True
    ),
}


def usage() -> str:
    """What there is."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{command.does}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Comparisons of ways to train.",
            "",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    name, *options = (sys.argv[1:] if argv is None else list(argv)) or [""]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        print(f"error: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    # Only what the command needs is imported: other benchmarks need other packages.
    module = importlib.import_module(f"benchmarks.{command.module}")
    function = getattr(module, command.function)
    if command.parses:
        return function(options) or 0
    return tyro.cli(function, args=options, prog=f"{PROGRAM} {name}") or 0


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "Agg"
    sys.exit(main())
