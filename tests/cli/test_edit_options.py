"""The interventions and the monitor that the options of `generate` and `chat` describe."""

from __future__ import annotations

import dataclasses

import numpy as np
import support as s
from jaxpersona.ckpts.vectors import save_vector

import jaxpersona as jp
from jaxpersona.cli.edits import Edits
from jaxpersona.persona.monitor import Monitor

MODEL, AXIS = jp.load("mini"), jp.load_axis("mini")


def test_the_short_form_of_a_cap_sets_layers_and_floor():
    short = Edits(cap="mini:5:7:p75", check=False, where="response").read().build(MODEL)
    whole = jp.cap(AXIS, layers=slice(5, 7), floor="p75", where="response")
    assert s.same_bits(short, whole) and repr(short) == "cap(response, layers 5–6, residual)"
    assert not s.same_bits(short, jp.cap(AXIS, layers=slice(5, 7), floor="p50", where="response"))
    np.testing.assert_array_equal(AXIS.thresholds("p75")[5:7], short.edits[0].coefficients[:, 0, 2])
    for other in (Edits(cap="mini:5:7", percentile="p75"),
                  Edits(cap="mini", cap_layers="5:7", percentile="p75")):
        made = dataclasses.replace(other, check=False, where="response").read().build(MODEL)
        assert s.same_bits(made, whole)


def test_steering_has_the_layers_scale_and_tokens_of_its_options(tmp_path):
    file = tmp_path / "v.safetensors"
    save_vector(file, AXIS)
    made = Edits(steer=file, scale=-2.0, where="user").read().build(MODEL)
    assert s.same_bits(made, jp.steer(AXIS, layers=4, scale=-2.0, where="user"))  # the middle
    assert s.same_bits(Edits(steer=file, steer_layers="2:4").read().build(MODEL),
                       jp.steer(AXIS, layers=[2, 3]))


def test_a_cap_has_the_floor_of_its_population_and_shows_its_own_axis(tmp_path):
    table = {"p25": np.arange(8.0), "p50": np.arange(8.0) + 10}
    every = {name: values + 100 for name, values in table.items()}
    axis = dataclasses.replace(AXIS, percentiles={"default": table, "all": every})
    own, other = tmp_path / "a.safetensors", tmp_path / "v.safetensors"
    save_vector(own, axis)
    save_vector(other, dataclasses.replace(AXIS, name="other"))
    for given, first in (({}, 4), ({"percentile": "p50"}, 14), ({"of": "all"}, 104),
                         ({"percentile": "p50", "of": "all"}, 114)):
        edits = Edits(cap=str(own), check=False, **given).read()
        (found,) = edits.build(MODEL).edits
        assert list(found.layers) == [4, 5, 6, 7]
        assert found.coefficients[:, 0, 2].tolist() == [first + i for i in range(4)]
    assert edits.monitor(MODEL) is None
    assert repr(edits.monitor(MODEL, default=True)) == repr(Monitor(MODEL, axis))
    both = Edits(cap=str(own), axis=other, axis_layers="2:4").read()
    assert repr(both.monitor(MODEL, default=True)) == repr(both.monitor(MODEL)) == repr(
        Monitor(MODEL, dataclasses.replace(AXIS, name="other"), "2:4"))
    assert both.monitor(MODEL).usual.keys() == {2, 3}
    # a file whose own name looks like the short form has no layers in it
    named = tmp_path / "a.safetensors:1:2"
    assert Edits(cap=str(named))._cap_file() == (own, ":1:2")
    named.touch()
    assert Edits(cap=str(named))._cap_file() == (named, "")


def test_the_tokens_of_a_file_of_caps_are_those_of_where(tmp_path):
    file = tmp_path / "caps.safetensors"
    caps = jp.Caps(AXIS.values[4:6], (4, 5), AXIS.thresholds("p25")[4:6], ("a", "b"))
    save_vector(file, caps)
    for where in ("response", "everywhere"):
        made = Edits(cap=str(file), check=False, where=where).read().build(MODEL)
        assert s.same_bits(made, caps.interventions(where=where))
        assert repr(made).startswith(f"cap({where}, ")
