"""The self-test's floors and distances on given projections, and the command `vectors check`."""

import json

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import save_vector

from jaxpersona.cli import caps
from jaxpersona.cli.edits import Edits
from jaxpersona.persona import check as module
from jaxpersona.vectors.caps import Caps
from jaxpersona.vectors.vector import Axis


def test_a_floor_just_beyond_the_limit_is_named_and_one_just_within_is_not():
    """The limit is the larger of the gap of the means and four standard deviations of that side."""
    for spread, limit in ((0.5, 10.0), (5.0, 20.0)):  # max(gap 10, 4 · spread)
        ours, theirs = (np.array([[mean - spread], [mean + spread]]) for mean in (10.0, 0.0))
        for sign, edge, words in ((1, 10 + limit, "change every"), (-1, -limit, "never bind")):
            for beyond in (-0.01, 0.01):
                floor = np.array([edge + sign * beyond])
                fine, said = module._scale((3,), ours, theirs, floor, np.ones(1), np.zeros(1))
                assert fine == (beyond < 0) and (fine or (words in said and "layer 3" in said))


def test_a_limit_is_that_of_the_replies_on_its_side():
    """Above the default persona, its own spread counts; below the roles, that of the roles."""
    def replies(mean, spread):
        return np.array([[mean - spread], [mean + spread]])

    for own, other, high, low in ((0.5, 5.0, 20.0, -20.0), (5.0, 0.5, 30.0, -10.0)):
        for floor, wanted in ((high - 0.01, True), (high + 0.01, False), (low + 0.01, True),
                              (low - 0.01, False)):
            fine, _ = module._scale((3,), replies(10.0, own), replies(0.0, other),
                                    np.array([floor]), np.ones(1), np.zeros(1))
            assert fine == wanted, (own, other, floor)


def test_a_floor_above_most_default_projections_gets_a_warning():
    """Distances are in the default's standard deviation at the layer."""
    ours, theirs = np.array([[9.0, 9.0], [11.0, 11.0]]), np.array([[0.0, 0.0], [0.0, 0.0]])
    spread, centre = np.array([2.0, 4.0]), np.array([10.5, 12.0])
    fine, said = module._scale((3, 4), ours, theirs, np.array([10.4, 11.0]), spread, centre)
    assert fine and "Warning" not in said
    assert said.startswith("floors: 0.2 to 0.25 standard deviations from the default persona's "
                           "mean projection, 104 to 110 % of the way")
    fine, said = module._scale((3, 4), ours, theirs, np.array([10.6, 11.0]), spread, centre)
    assert fine and "Warning: the floor is above the median of the" in said
    assert "(layers: 3)" in said
    table = {"default": {"p50": np.arange(8.0)}}
    held = Axis(np.ones((8, 4)), percentiles=table)
    assert module._centre(held, (3, 5), ours).tolist() == [3, 5]
    assert module._centre(Axis(np.ones((8, 4))), (3, 5), ours).tolist() == [10, 10]
    caps = Caps(np.ones((2, 4)), (3, 5), np.zeros(2), ("a", "b"))
    assert module._spread(caps, (3, 5), ours).tolist() == [2 ** 0.5] * 2


def test_a_floor_is_compared_with_the_median_that_was_measured_on_this_model():
    """The replies of a run may have higher projections than the short replies of the check."""
    ours, theirs = np.array([[9.0], [11.0]]), np.array([[-1.0], [1.0]])  # a limit of 10 + 10
    centre, spread = np.array([40.0]), np.ones(1)
    for floor, known, wanted in ((35, True, True), (35, False, False), (49, True, True),
                                 (51, True, False), (19, False, True)):
        fine, said = module._scale((3,), ours, theirs, np.array([float(floor)]), spread, centre,
                                   known=known)
        assert fine == wanted and (fine or "change every" in said)
    fine, _ = module._scale((3,), ours, theirs, np.array([19.0]), spread, np.zeros(1), known=True)
    assert fine  # the larger of the two


def test_floors_of_all_layers_are_read_at_the_chosen_ones():
    chosen, _, floors = module._entries(s.tiny_model(), Axis(np.ones((3, 32))), [2],
                                        np.array([1.0, 2.0, 3.0]))
    assert chosen == (2,) and floors.tolist() == [3.0]


def test_a_layer_without_a_gap_has_the_wrong_sign():
    """Gaps by layer: 2 and 8, 2 and 0, 0 and −1, in standard deviations of 2 and 4."""
    spread = np.array([2.0, 4.0])
    for gaps, fine, wanted in (
            ((2, 8), True, "by 1 to 2 standard deviations of the default persona's projections "
             "(layers: 3…4)"),
            ((2, 0), False, "at some of the tested layers (4)"),
            ((0, -1), False, "at every tested layer; the axis points away from the Assistant")):
        ours = np.array([[9.0, 9.0], [11.0, 11.0]])
        found, said = module._sign((3, 4), ours, 10 - np.array([gaps, gaps], float), spread)
        assert found == fine and wanted in said


def test_quartiles_that_are_equal_give_no_spread():
    """The spread of the replies is used at such layers, and never less than 1e-6."""
    table = {"default": {"p25": np.zeros(8), "p75": np.arange(8.0)}}
    held, ours = Axis(np.ones((8, 4)), percentiles=table), np.array([[1.0, 1.0], [3.0, 3.0]])
    np.testing.assert_allclose(module._spread(held, (0, 2), ours), [2 ** 0.5, 2 / 1.3489795])
    assert module._spread(held, (0, 2), ours[:1]).tolist() == [1e-6, 2 / 1.3489795]


def test_a_shift_of_the_layers_is_found_on_layers_that_all_shifts_have():
    """Orthogonal layers; the axis is shifted by −2 to 2 against the difference, or almost flat."""
    rows = np.eye(8)
    for shift in (-2, -1, 0, 1, 2):
        axis = Axis(np.roll(rows, -shift, 0).astype(np.float32))
        (fine, said), found = module._layer_base(axis, 5 * rows)
        assert found == shift and fine == (shift == 0)
        assert f"layer l fits layer l{shift:+d} best" in said or fine
    for step, wanted in ((0.05, None), (0.2, 0)):  # cosines of neighbours: 0.9988 and 0.98
        turned = np.stack([np.cos(step * np.arange(8)), np.sin(step * np.arange(8))], -1)
        (fine, said), found = module._layer_base(Axis(turned.astype(np.float32)), turned)
        assert fine and found == wanted
        assert ("adjacent layers are too similar" in said) == (wanted is None)
    for count, wanted in ((6, None), (7, 0)):  # three layers have all neighbours in seven
        _, found = module._layer_base(Axis(np.eye(count, dtype=np.float32)), np.eye(count))
        assert found == wanted


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """Run `vectors check` on an axis, with a result in place of the self-test's generation."""
    table = {f"p{q}": np.arange(8.0) + q for q in (1, 25, 50, 75, 99)}
    every = {name: values + 1000 for name, values in table.items()}
    axis = Axis(np.ones((8, 4)), percentiles={"default": table, "all": every})
    save_vector(tmp_path / "axis.safetensors", axis)
    seen = []

    def check(model, held, *, progress, **options):
        seen.append(options)
        faults = ("sign: wrong",) if seen[-1].get("layers") == "0:1" else ()
        return module.Check(
            not faults, faults, ("sign: fine", "layers: fine"), (4, 5), np.array([10.0, 20.0]),
            np.array([4.0, 2.0]), 0, np.array([2.0, 4.0]), np.array([9.0, 22.0]))

    monkeypatch.setattr(module, "check", check)
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: None)

    def run(*more):
        return s.run_command(["vectors", "check", str(tmp_path / "axis.safetensors"), *more]), seen
    return run


def test_the_command_prints_distances_by_layer(checked, capsys):
    """(4 − 10) / 2 and (2 − 20) / 4 for roles, (9 − 10) / 2 and (22 − 20) / 4 for floors."""
    code, seen = checked("--json")
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and seen[-1] == {"layers": None}  # layers and floors of the self-test
    assert found["z_roles"] == [-3.0, -4.5] and found["z_floors"] == [-0.5, 0.5]
    assert found["ok"] and found["layers"] == [4, 5] and found["floors"] == [9.0, 22.0]
    assert checked()[0] == 0
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["4", "10", "2", "4", "-3.0", "9", "-0.5"] in rows
    assert ["5", "20", "4", "2", "-4.5", "22", "+0.5"] in rows
    assert ["sign:", "fine"] in rows


def test_the_command_tests_the_chosen_layers_and_floors(checked, capsys):
    code, seen = checked("--cap-layers", "4:6", "--percentile", "p75", "--of", "all")
    assert code == 0 and seen[-1]["layers"] == "4:6"
    assert seen[-1]["floor"].tolist() == [1075, 1076, 1077, 1078, 1079, 1080, 1081, 1082]
    capsys.readouterr()
    for more, wanted in ((["--percentile", "p33"], "percentile is 'p33'"),
                         (["--experiment", "x"], "--experiment applies only to files of caps"),
                         (["--cap-layers", "x"], "layers is 'x'")):
        count = len(seen)
        assert checked(*more)[0] == 2 and len(seen) == count
        assert wanted in capsys.readouterr().err


def test_a_percentile_or_a_population_may_be_given_alone(checked):
    """The other of the two is p25 or the default persona."""
    _, seen = checked("--of", "all")
    assert seen[-1]["floor"].tolist() == [x + 1025 for x in range(8)]
    _, seen = checked("--percentile", "p75")
    assert seen[-1]["floor"].tolist() == [x + 75 for x in range(8)]


def test_a_failed_test_is_one_line_and_exit_code_2(checked, capsys):
    assert checked("--cap-layers", "0:1")[0] == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "axis.safetensors: sign: wrong" in said.err
    assert "-3.0" in said.out  # the table is printed nevertheless


def test_a_cap_is_tested_with_the_floor_of_its_population(monkeypatch, tmp_path):
    """A cap of a file of interventions, and that of the options."""
    seen = []

    def tested(model, held, *, progress, layers, floor):
        seen.append(np.asarray(floor)[1].item())
        return module.Check(True, (), ("sign: fine",), (1,), *np.ones((2, 1)), 0, np.ones(1), None)

    monkeypatch.setattr(module, "check", tested)
    model, file = s.tiny_model(), tmp_path / "axis.safetensors"
    table = {"p25": np.arange(3.0), "p50": np.arange(3.0) + 10}
    save_vector(file, Axis(np.ones((3, 32)), percentiles={
        "default": table, "all": {name: row + 100 for name, row in table.items()}}))
    for of, percentile, wanted in (("default", "p25", 1), ("default", "p50", 11),
                                   ("all", "p25", 101), ("all", "p50", 111)):
        caps.spec_edits(model, {"operator": "cap", "vector": file.name, "layers": 1, "of": of,
                                "floor": percentile}, tmp_path / "spec.json", True)
        Edits(cap=str(file), of=of, percentile=percentile).read().build(model)
        assert seen == [wanted] * 2, (of, percentile)
        del seen[:]
