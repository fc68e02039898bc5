"""The examples run without modification."""

from __future__ import annotations

import ast
import pathlib
import re
import runpy

import numpy as np
import pytest

import jaxpersona as jp

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.fixture
def lines(request, capsys):
    """The printed lines of the example that the test is named after."""
    name = request.node.name.removeprefix("test_")
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_interventions(lines):
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


def test_steering_sweep(lines):
    """Style rises with the strength, and the row of strength 0 is the unsteered reply."""
    rows = [re.fullmatch(r"([+-][\d.]+)  style ([\d.]+) (.{20})  readable ([\d.]+)  (.*)", line)
            for line in lines[1:]]
    found = {float(row[1]): (float(row[2]), row[5]) for row in rows if row}
    assert lines[0].startswith("Vector('toward a role', [8, 128]") and len(found) == 8
    styles = [found[strength][0] for strength in sorted(found)]
    assert styles[-1] > styles[0] + 0.3
    assert (np.diff(styles) > -0.1).all()
    plain = jp.generate(jp.load("mini"), ["Tell me about the sea."], max_new_tokens=40).text[0]
    assert found[0.0][1] == plain


def test_capped_rows(lines):
    form = r"  (\S+) +seen +(\d+)  changed by layer ([\d ]+)  at layer 6: +(\S+)  (.*)"
    rows = [re.fullmatch(form, line) for line in lines]
    found = [(row[1], int(row[2]), [int(n) for n in row[3].split()], float(row[4]), row[5])
             for row in rows if row]
    pirate, default = found[:5], found[5:]
    assert [name for name, *_ in pirate] == ["none", "p1", "p25", "p50", "p95"]
    for group in (pirate, default):
        _, seen, changed, _, _ = group[0]
        assert seen == 0 and not any(changed)
        for _, seen, changed, _, text in group[1:]:
            assert 0 < max(changed) <= seen and "7351" not in text
    assert all(place > pirate[0][3] + 3 for _, _, _, place, _ in pirate[1:])  # read without caps
    assert "7351" in pirate[0][4] and "7351" not in default[0][4]


def test_project_tokens(lines):
    means = [float(line.split()[-1]) for line in lines if ": mean projection" in line]
    assert len(means) == 5
    own, played = means[2], means[4]  # an Assistant's answer, and the pirate's
    assert own > played + 3
    values = [float(line.split()[0]) for line in lines if re.match(r" +-?\d", line)]
    tail = len([line for line in lines[lines.index(f"assistant: mean projection {played:.1f}"):]
                if re.match(r" +-?\d", line)])
    assert np.mean(values[-tail:]) == pytest.approx(played, abs=0.1)


def test_stream_projections(lines):
    floor = float(lines[0].split()[-1])
    pieces = {"plain": [], "capped": []}
    for line in lines[1:]:
        if row := re.fullmatch(r"(plain|capped) +(-?[\d.]+)  (['\"].*)", line):
            pieces[row[1]].append((float(row[2]), ast.literal_eval(row[3])))
    assert min(value for value, _ in pieces["capped"]) >= floor - 0.1  # rounded to one decimal
    assert max(value for value, _ in pieces["plain"]) < floor
    assert len(pieces["plain"]) > 3
    assert lines[-1].startswith(("plain", "capped")) and "ended by 'stop'" in lines[-1]
    talk = [{"role": "system", "content": "You are a pirate. Stay in character."},
            {"role": "user", "content": "Who are you really, under the mask?"}]
    text = jp.generate(jp.load("mini"), [talk], max_new_tokens=40).text[0]
    assert "".join(piece for _, piece in pieces["plain"]) == text
