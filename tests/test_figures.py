"""The writers of figures leave matplotlib's global state unchanged."""

from __future__ import annotations

import subprocess
import sys


def test_drawing_leaves_the_back_end_and_the_list_of_figures_alone(tmp_path):
    code = f"""
import sys
import matplotlib
matplotlib.use("svg")
import numpy as np
from jaxpersona.report import figures
from jaxpersona.report.messages import messages
assert "matplotlib.axes" not in sys.modules
figures.by_layer({str(tmp_path / "a.png")!r}, {{"v": np.ones(2)}}, "title")
messages({str(tmp_path / "b.png")!r}, [1, 3], np.ones((2, 1)), ["v"], 4, [None])
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["svg", "False"], done
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
