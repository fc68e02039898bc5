"""Arguments of the wrong type or value raise `UserError`, not a NumPy or JAX exception."""

from __future__ import annotations

import numpy as np
import pytest

import jaxpersona as jp
from jaxpersona.data.texts import Question, Role
from jaxpersona.distributed import processes, sharding
from jaxpersona.models.batch import batch
from jaxpersona.planning import chips
from jaxpersona.runs.names import check_names
from jaxpersona.training import learn
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Axis, Vector

V = np.ones((2, 4), np.float32)
DIGITS = "9" * 5000  # more digits than Python converts to an integer

CASES = {
    "source is 5": lambda: jp.load(5),
    "mesh is 'data=2'": lambda: jp.load("mini", mesh="data=2"),
    "dtype is 'zeros'": lambda: jp.load("mini", dtype="zeros"),
    "dtype is <object": lambda: jp.load("mini", dtype=object()),
    "data is 'x'": lambda: jp.make_mesh(data="x"),
    "model is None": lambda: jp.make_mesh(model=None),
    "mesh is 'data=9": lambda: sharding.parse_mesh("data=" + DIGITS),
    "topology is 'v5e:9": lambda: chips.parse("v5e:" + DIGITS),
    "topology is 5": lambda: chips.parse(5),
    "the process index is '0'": lambda: processes.start("host:1", 2, "0"),
    "coordinator is 5": lambda: processes.start(5, 2, 0),
    "width is 'x'": lambda: batch([[1, 2]], width="x"),
    "kind is 5": lambda: batch([[1, 2]], kind=5),
    "kind is .*1180591620717411303424": lambda: batch([[1, 2]], kind=[[2**70, 1]]),
    "turn is ": lambda: batch([[1, 2]], turn=[["a", "b"]]),
    "row_id is ": lambda: batch([[1, 2]], row_id=["a"]),
    "values is complex": lambda: Vector(V * 1j),
    "name that is not a string": lambda: Axis(V, percentiles={"default": {25: np.zeros(2)}}),
    "layers is 5": lambda: Caps(V, 5, np.zeros(2), ("a", "b")),
    "width is -1": lambda: learn.Direction(-1, layers=1),
    "size is 'x'": lambda: learn.Direction(4, layers=1, size="x"),
    "seed is 'x'": lambda: learn.Direction(4, layers=1, seed="x"),
    "where is 'nothing'": lambda: learn.Direction(4, layers=1, where="nothing"),
    "roles is 5": lambda: check_names(5),
    "eval_prompt of role 'a' is 5": lambda: Role("a", ("b",), 5),
    "text of question 0 is 5": lambda: Question(0, 5),
}


@pytest.mark.parametrize("message", CASES)
def test_a_mistaken_argument_is_named(message):
    with pytest.raises(jp.UserError, match=message):
        CASES[message]()


def test_a_direction_takes_the_name_of_a_token_test():
    direction = learn.Direction(4, layers=1, where="generated")
    assert direction.where == jp.generated
