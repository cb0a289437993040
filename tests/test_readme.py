"""The README's Python examples run, one after the other as a reader would."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_examples_run_in_order():
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
