"""Plotting writes files and leaves matplotlib's global state unchanged."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from jaxpersona.report import figures


def test_drawing_leaves_the_back_end_and_the_list_of_figures_alone(tmp_path):
    code = f"""
import sys
import matplotlib
matplotlib.use("svg")
import numpy as np
from jaxpersona.report import figures
figures.conversation({str(tmp_path / "a.png")!r}, [1, 3], np.ones((2, 1)), ["v"], 4)
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["svg", "False"], done
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_held_out_roles_are_open_circles(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda figure, path: drawn.append(figure))
    values = {name: np.full((2, 1), at) for at, name in enumerate(("ghost", "pirate", "default"))}
    figures.roles_on_axis(tmp_path / "a.png", values, 0, ["pirate"])
    points = [line for line in drawn[0].axes[0].lines if line.get_marker() == "o"]
    assert [line.get_fillstyle() for line in points] == ["full", "none", "full"]
