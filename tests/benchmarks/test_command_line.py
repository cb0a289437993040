"""`python -m benchmarks`: every command is there, takes its options, and is what documents name."""

import importlib
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks.__main__ import COMMANDS, main

ROOT = pathlib.Path(__file__).parents[2]
TEXTS = [
    ROOT / "Makefile",
    *ROOT.glob("*.md"),
    *(path for path in (ROOT / "docs").rglob("*.md")),
    *(ROOT / "notebooks").glob("*.ipynb"),
    *(ROOT / "benchmarks").glob("*.md"),
    *(ROOT / "benchmarks").rglob("*.py"),
]


def test_help_has_a_line_for_each_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        assert [line.split() for line in lines].count([name, *command.does.split()]) == 1
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_its_options_are(name, capsys):
    module = importlib.import_module(f"benchmarks.{COMMANDS[name].module}")
    assert module.__doc__
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: python -m benchmarks {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_refuses_negative_counts(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    help_text = capsys.readouterr().out
    counts = re.findall(r"(--[\w-]+) (?:\{None\}\|)?\[?INT", help_text)
    assert counts or name in {"report", "need", "cost-regularizer", "scale", "plasticity"}
    for option in counts:
        try:
            code = main([name, option, "-1"])
        except SystemExit as ended:
            code = ended.code
        assert code == 2, option
        said = capsys.readouterr().err
        assert option in said or f"`{option[2:].replace('-', '_')}` must be" in said, said


def test_a_count_of_none_is_one(capsys):
    for arguments in (["applications", "--steps", "0"], ["run", "--seeds", "0"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "it must be 1 or more, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nothing"]])
def test_no_command_gets_the_list(arguments, capsys):
    assert main(arguments) == 2
    assert "error: no command" in (said := capsys.readouterr().err)
    assert all(name in said for name in COMMANDS)


def test_the_list_imports_no_benchmark():
    program = "import sys, benchmarks.__main__ as b; b.main(['-h']); print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("False\n")


def test_documents_name_commands_that_there_are():
    named = [
        (path.name, name)
        for path in TEXTS
        for name in re.findall(r"-m\s+benchmarks([\s.]\S*?)(?=[`'\"\s\\;,:)]|$)", path.read_text())
    ]
    assert len(named) > 30
    assert {name for _, name in named if name.strip() not in COMMANDS} <= {
        f" {word}" for word in ("COMMAND", "run|report|cost", "--help")
    }
