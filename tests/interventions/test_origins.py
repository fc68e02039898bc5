"""The model of a named direction is kept, so that the direction is refused for another model."""

from __future__ import annotations

import numpy as np
import pytest

from jaxpersona.captures import capture
from jaxpersona.interventions import cap, gate, mean_ablate, rotate, stack_rows, steer
from jaxpersona.vectors.vector import Vector

E = np.eye(8)
BANK = steer(E[:2], layers=1, rows=[0, 1])
KNOWN, UNKNOWN = (Vector(E[:4] + 1, fingerprint=mark) for mark in ("0" * 8 + "0000002a", ""))


@pytest.mark.parametrize(("made", "wanted"), [
    (lambda: cap(KNOWN, layers=1, floor=0, push=E[0]), [42]),
    (lambda: cap(E[0], layers=1, floor=0, push=KNOWN), [42]),
    (lambda: mean_ablate(KNOWN, E[0], layers=1), [42]),
    (lambda: mean_ablate(E[0], KNOWN, layers=1), [42]),
    (lambda: mean_ablate(E[:2], KNOWN, layers=1, rows=[0, 1]), [42, 42]),
    (lambda: mean_ablate([UNKNOWN, KNOWN], E[:2], layers=1, rows=[0, 1]), [0, 42]),
    (lambda: rotate(KNOWN, E[0], layers=1, by=1), [42]),
    (lambda: rotate(E[0], KNOWN, layers=1, by=1), [42]),
    (lambda: stack_rows([steer(E[0], layers=1), steer(KNOWN, layers=1)]), [0, 42]),
])
def test_an_array_beside_a_named_direction_keeps_its_model(made, wanted):
    (edit,) = made().edits
    np.testing.assert_array_equal(edit.origin, wanted)


def test_gates_and_captures_keep_the_model_of_a_direction():
    for vector, wanted in ((KNOWN, [42, 42]), ([UNKNOWN, KNOWN], [0, 42])):
        (edit,) = gate(BANK, vector, layer=0, above=0).edits
        np.testing.assert_array_equal(edit.gate.origin, wanted)
    read = capture.projections([UNKNOWN, KNOWN]).readings["projections"]
    np.testing.assert_array_equal(read.origin, [42])
