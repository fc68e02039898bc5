"""The examples run without modification."""

from __future__ import annotations

import ast
import pathlib
import runpy

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


def test_interventions(capsys):
    runpy.run_path(str(EXAMPLES / "interventions.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    said = {tuple(line[:41].split("  ")[:1]) + (line[33:41].strip(),): line[41:] for line in lines}
    assert len(lines) == len(said) == 30
    for (name, who), text in said.items():
        changed = int(text.split()[0])
        idle = name == "none" or (name, who) == ("gate", "default")
        assert (changed == 0) == idle, f"{name}, {who}: {text}"
    words = {key: text.split("changed")[1].strip() for key, text in said.items()}
    assert words["cap, a floor", "pirate"] != words["none", "pirate"]
    assert words["gate", "default"] == words["none", "default"]
    assert words["gate", "pirate"] != words["none", "pirate"]
    assert words["cap, a ceiling", "default"] != words["none", "default"]


def test_each_operator_takes_at_most_three_lines():
    tree = ast.parse((EXAMPLES / "interventions.py").read_text())
    table = next(node.value for node in ast.walk(tree) if isinstance(node, ast.Assign)
                 and getattr(node.targets[0], "id", "") == "examples")
    assert len(table.values) == 15
    for key, value in zip(table.keys, table.values, strict=True):
        assert value.end_lineno - key.lineno < 3, key.value
