"""A run that ends at any write, append or removal resumes to the bytes of an unbroken run."""
# ruff: noqa: F811 (fixtures of another module are imported and then named as arguments)

from __future__ import annotations

import os

import pytest
import support as s
from jaxpersona.ckpts import files
from test_damages import Killed, contents, finished, resume  # noqa: F401

from jaxpersona.runs import live


class Ends:
    """Ends a run at one of its changes of the folder, leaving what a killed process leaves."""

    def __init__(self, monkeypatch, kinds):
        self.left, self.kinds = 10**9, kinds
        replace, unlink, write = os.replace, os.unlink, live._write

        def renamed(source, target):
            if self.now("rename"):
                os.link(source, target.with_name(f".{target.name}.999999999.tmp"))
                raise Killed
            replace(source, target)

        def removed(path, **more):
            if os.path.basename(os.path.dirname(path)) == "live" and self.now("remove"):
                raise Killed
            unlink(path, **more)

        def appended(path, data, mode="ab"):
            if self.now("append"):
                write(path, data[: len(data) // 2], mode)
                raise Killed
            write(path, data, mode)

        monkeypatch.setattr(files.os, "replace", renamed)
        monkeypatch.setattr(os, "unlink", removed)
        monkeypatch.setattr(live, "_write", appended)

    def now(self, kind):
        self.left -= kind in self.kinds
        return kind in self.kinds and self.left < 0


def changes(ends, folder, **options):
    """Count the changes of an unbroken run."""
    ends.left = 10**9
    resume(folder, **options)
    return 10**9 - ends.left


def broken(ends, folder, at, **options):
    ends.left = at
    with pytest.raises(Killed):
        resume(folder, **options)
    ends.left = 10**9
    resume(folder, **options)
    return contents(folder)


@pytest.mark.parametrize(("kinds", "step"), [
    (("rename",), 6), (("remove",), 5), (("append",), 19),
    pytest.param(("rename", "remove", "append"), 1, marks=pytest.mark.slow)], ids=str)
def test_a_run_that_ends_at_any_change_resumes_to_the_same_bytes(finished, tmp_path, monkeypatch,
                                                                 kinds, step):
    expected = contents(finished / "run")
    ends = Ends(monkeypatch, kinds)
    count = changes(ends, tmp_path / "whole")
    assert contents(tmp_path / "whole") == expected
    assert count > {"rename": 20, "remove": 4, "append": 40}[kinds[0]]
    for at in range(0, count, step):
        assert broken(ends, tmp_path / str(at), at) == expected, at


@pytest.mark.parametrize("step", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_an_extension_that_ends_at_any_change_is_the_same(tmp_path, monkeypatch, step):
    """Roles that are closed again, because the judge failed, keep the bytes too."""
    failing = s.Scored(lambda role, key: OSError("busy") if key == "pos_p0_q1" else 3)
    judge = s.Scored(lambda role, key: 2 if key == "pos_p1_q1" else 3)
    ends = Ends(monkeypatch, ("rename", "remove", "append"))

    def begun(folder):
        ends.left = 10**9
        with pytest.warns(UserWarning, match="replies on which the judge failed: 3"):
            resume(folder, judge=failing)
        return folder

    count = changes(ends, begun(tmp_path / "whole"), judge=judge)
    expected = contents(tmp_path / "whole")
    for at in range(0, count, step):
        assert broken(ends, begun(tmp_path / str(at)), at, judge=judge) == expected, at
