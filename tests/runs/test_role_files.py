"""What is stored in the files of a role, their names, and the names of lock files."""

from __future__ import annotations

import numpy as np
import pytest
from jaxpersona.ckpts.files import read_tensors

from jaxpersona.errors import UserError
from jaxpersona.runs.live import _is_verdict
from jaxpersona.runs.lock import is_lock
from jaxpersona.runs.names import check_names, file_stem
from jaxpersona.runs.run import Run
from jaxpersona.runs.seal import digest
from jaxpersona.runs.sums import Sample

MANIFEST = {"model": {}, "arguments": {}, "numerics": {}, "roles": {"default": "a", "ghost": "b"},
            "questions": {}, "judges": {"j": {}}, "last": {"judge": "j"}}


@pytest.fixture
def run(tmp_path):
    with Run.open(tmp_path / "run", MANIFEST) as opened:
        yield opened


def test_scores_are_read_in_the_order_of_the_rollouts_without_failed_ones(run):
    """The file has the judge, the rubric, and the details that are not empty."""
    run.save_verdicts("ghost", "j", "r", {"pos_p0_q10": 3, "pos_p0_q2": None, "pos_p1_q2": None},
                      {"pos_p0_q10": {}, "pos_p0_q2": {"error": "busy"}})
    found = run.verdicts("ghost")
    assert list(found["scores"].items()) == [
        ("pos_p0_q2", None), ("pos_p1_q2", None), ("pos_p0_q10", 3)]
    assert found["details"] == {"pos_p0_q2": {"error": "busy"}}
    assert (found["judge"], found["rubric"], found["role"]) == ("j", "r", "ghost")
    assert list(run.scores("ghost").items()) == [("pos_p1_q2", None), ("pos_p0_q10", 3)]
    assert run.scores("ghost", "other") is None and run.scores("default") is None
    run.forget("ghost", "j", "scores")
    assert run.scores("ghost") is None


def test_vectors_are_stored_with_the_numbers_of_their_rollouts(run):
    """A file has one tensor per label."""
    vectors = {"mean": (np.ones((2, 3), np.float32), 7), "pos_3": (np.zeros((2, 3), np.float32), 4)}
    run.save_vectors("ghost", vectors)
    found = run.vectors("ghost")
    assert {label: value.tolist() for label, value in found.items()} == {
        label: value.tolist() for label, (value, _) in vectors.items()}
    _, about = read_tensors(run.path("vectors", "ghost"))
    assert (about["count_mean"], about["count_pos_3"], about["role"]) == ("7", "4", "ghost")


def test_a_sample_has_the_digests_of_the_rollouts_before_and_after_a_change(run):
    """Both contents are accepted, as a process may be killed between two files."""
    sample = Sample(["a"], np.ones((1, 2), np.float32), np.zeros((1, 1, 2), np.float16))
    for text in ("1\n", "1\n2\n"):
        run.save_sample("ghost", sample, text)
        run.save_rollouts("ghost", text)
    assert run.rollouts("ghost") == [1, 2]
    for text, fine in (("1\n", True), ("1\n2\n", True), ("", False), ("1\n2\n3\n", False)):
        run.path("rollouts", "ghost").write_text(text)
        if fine:
            assert Run.read(run.folder).rollouts("ghost") == [int(x) for x in text.split()]
        else:
            with pytest.raises(UserError, match="differs from the rollouts that the run wrote"):
                Run.read(run.folder).rollouts("ghost")
    run.save_sample("ghost", sample, "1\n2\n")  # the same text: the earlier one stays known
    run.path("rollouts", "ghost").write_text("1\n")
    assert Run.read(run.folder).rollouts("ghost") == [1]
    assert run.sample("ghost").keys == ["a"] and run.sample("ghost").means.tolist() == [[[1, 1]]]
    run.discard("ghost")
    assert run.rollouts("ghost") is None and not run.path("samples", "ghost").exists()


@pytest.mark.parametrize(("verdict", "wanted"), [
    ({"score": 2**53 - 1}, True), ({"score": 2**53}, False), ({"score": 1 - 2**53}, True),
    ({"score": -(2**53)}, False), ({"score": None, "error": "busy", "raw": ""}, True),
    ({"score": 1, "expected": None, "mass": 0.5}, True), ({"score": 1, "mass": np.inf}, False),
    ({"score": 1, "expected": np.nan}, False), ({"score": 1, "refused": True}, True),
    ({"raw": "3"}, False), ({"score": 1, "raw": 3}, False)], ids=str)
def test_a_stored_verdict_has_numbers_that_json_keeps(verdict, wanted):
    """Integers beyond 53 bits, infinity and NaN are not exact in other programs."""
    assert _is_verdict({"judge": "j", "key": "k", "verdict": verdict}) == wanted
    assert not _is_verdict({"judge": "j", "key": "k", "verdict": verdict, "more": 1})


@pytest.mark.parametrize(("name", "wanted"), [
    ("gpt-4.5_mini", "gpt-4.5_mini"), (".a.b", "%2Ea.b"), ("a b", "a%20b"), ("é", "%C3%A9"),
    ("100%", "100%25"), ("a/b", "a%2Fb"), ("\n", "%0A")])
def test_a_name_of_a_file_keeps_letters_digits_and_three_signs(name, wanted):
    """A leading dot and all other bytes are escaped."""
    assert file_stem(name) == wanted


@pytest.mark.parametrize(("names", "wanted"), [
    (5, "roles is 5; give a list of role names"), ([5], "a role name is 5; it must be a non-empty"),
    (["Ab", "aB"], "two roles are named 'aB', or their names differ only")])
def test_names_of_roles_are_checked_without_regard_to_case(names, wanted):
    """A name of exactly 200 bytes is valid."""
    check_names(["x" * 200, "y"])
    with pytest.raises(UserError, match=wanted):
        check_names(names)


@pytest.mark.parametrize(("name", "wanted"), [
    (".lock", True), (".lock.1", True), (".lock.999999999", True), (".lock.0", False),
    (".lock.01", False), (".lock.x", False), (".lock.", False), ("x.lock", False),
    (".lock.1234567890", False)])
def test_lock_files_are_those_of_the_processes_of_a_run(name, wanted):
    """Process 0 has no number in the name of its file."""
    assert is_lock(name) == wanted


def test_a_digest_does_not_depend_on_the_order_of_keys():
    """It has sixteen hexadecimal digits, and texts may have lone surrogates."""
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": 2})
    assert len(digest("\ud800")) == 16 and digest([]) == "4f53cda18c2baa0c"  # of "[]"
