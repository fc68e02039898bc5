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
assert "matplotlib.axes" not in sys.modules
figures.conversation({str(tmp_path / "a.png")!r}, [1, 3], np.ones((2, 1)), ["v"], 4)
print(matplotlib.get_backend(), "matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout.split() == ["svg", "False"], done
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
