"""Text from files is printed on the terminal without control characters."""

import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.vectors import save_vector

from jaxpersona import inputs
from jaxpersona.cli import support
from jaxpersona.data.texts import Role
from jaxpersona.errors import UserError
from jaxpersona.judges.protocol import Item
from jaxpersona.runs.compare import FORMAT, sealed
from jaxpersona.runs.run import Run
from jaxpersona.runs.status import Status
from jaxpersona.vectors.vector import Axis, Vector


def test_control_characters_are_written_out():
    said = "a\x1b[31mb\x07\x9bc\x7f\u202e\r\n\td\u200d\u00e9"
    assert inputs.printable(said) == "a\\x1b[31mb\\x07\\x9bc\\x7f\\u202e\n\td\u200d\u00e9"
    assert inputs.printable(5) == "5"


HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b1m\u202e"


def clean(capsys):
    """Check that the output contains no control characters except tab and newline."""
    out = "".join(capsys.readouterr())
    assert out and not [c for c in out if (ord(c) < 32 or 126 < ord(c) < 160 or c == "\u202e")
                        and c not in "\n\t"], repr(out)
    return out


def test_names_and_notes_of_files_reach_the_terminal_as_text(checkpoint, tmp_path, capsys):
    """Test tables, lines, errors and figure names of all commands that print them."""
    import jaxpersona as jp

    model = jp.load(str(checkpoint))
    shape = (model.config.n_layers, model.config.d_model)
    axis = Axis(np.ones(shape), name=HOSTILE, model=HOSTILE, notes={HOSTILE: HOSTILE},
                percentiles={HOSTILE: {"p25": np.zeros(shape[0])}})
    save_vector(tmp_path / "a.safetensors", axis)
    file, out = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    talk = tmp_path / "talk.json"
    talk.write_text(json.dumps([{"role": "user", "content": "hi"},
                                {"role": "assistant", "content": HOSTILE}]))
    assert s.run_command(["vectors", "show", file]) == 0
    assert "\\x1b]0;title" in clean(capsys)
    assert s.run_command(["vectors", "convert", file, out]) == 0
    assert "\\x1b]0;title" in clean(capsys)
    assert s.run_command(["project", str(talk), "--on", file, "--model", str(checkpoint)]) == 0
    assert "\\x1b]0;" in clean(capsys)
    assert s.run_command(["generate", "hi", "--steer", file, "--model", str(checkpoint),
                          "--max-new-tokens", "4", "--steer-layers", "9"]) == 2
    clean(capsys)
    talk.write_text(json.dumps([{"role": HOSTILE, "content": "hi"}]))
    assert s.run_command(["project", str(talk), "--on", file, "--model", str(checkpoint)]) == 2
    clean(capsys)
    roles = tmp_path / "texts" / "roles"
    roles.mkdir(parents=True)
    (roles / "\x1b[2Jghost.json").write_text("{}")
    assert s.run_command(["data", "check", str(tmp_path / "texts")]) == 2
    assert "\\x1b[2Jghost.json" in clean(capsys)
    vector = Vector(np.ones((5, 7)), name=HOSTILE)
    save_vector(tmp_path / "v.safetensors", vector)
    assert s.run_command(["generate", "hi", "--steer", str(tmp_path / "v.safetensors"),
                          "--model", str(checkpoint)]) == 2
    assert "made for another model" in clean(capsys)


def test_replies_and_role_names_of_a_run_reach_the_terminal_as_text(tmp_path, monkeypatch, capsys):
    item = Item("q0", Role(HOSTILE, (), ""), HOSTILE, f"\x7f{HOSTILE}", HOSTILE)
    monkeypatch.setattr(Run, "read", lambda path: SimpleNamespace())
    monkeypatch.setattr("jaxpersona.persona.verdicts.replies_of", lambda _: {f"{HOSTILE}/q0": item})
    with monkeypatch.context() as patch:
        patch.setattr("jaxpersona.persona.verdicts.scores_of", lambda _: {f"{HOSTILE}/q0": 3})
        sample = ["judge", "sample", str(tmp_path)]
        assert s.run_command(sample) == 0
        assert clean(capsys).count("\\x1b]0;title") == 4
        assert s.run_command([*sample, "--json"]) == 0
        assert json.loads(clean(capsys)) == {
            "item": f"{HOSTILE}/q0", "score": 3, "system_prompt": HOSTILE, "question": HOSTILE,
            "answer": f"\x7f{HOSTILE}"}
        assert s.run_command([*sample, "--role", f"{HOSTILE}2"]) == 2
        clean(capsys)
    for name, score in (("a", 3), ("b", 0)):
        (tmp_path / f"{name}.csv").write_text(f"item,score,digest\n{HOSTILE}/q0,{score},x\n")
    agreement = ["judge", "agreement", str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]
    assert s.run_command(agreement) == 0
    assert "\n\\x1b]0;title\\x07\\x1b[2J\\x9b1m\\u202e " in clean(capsys)
    assert s.run_command([*agreement, "--json"]) == 0
    assert list(json.loads(clean(capsys))["roles"]) == [HOSTILE]
    (tmp_path / "b.csv").write_text(f"item,score,digest\n{HOSTILE}/q0,{HOSTILE},x\n")
    assert s.run_command(agreement) == 2
    assert "score of \\x1b]0;title" in clean(capsys)


def test_a_status_reaches_the_terminal_as_text(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps(sealed({"format": FORMAT})))
    found = Status(tmp_path, total=9, to_judge=8, roles=7).value("running") | {
        "state": HOSTILE, "host": HOSTILE, "updated": HOSTILE}
    (tmp_path / "status.json").write_text(json.dumps(found))
    assert s.run_command(["status", str(tmp_path)]) == 0
    assert clean(capsys).count("\\x1b]0;title") == 3
    assert s.run_command(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(clean(capsys)) == found


def test_redirected_output_has_lines_of_progress(monkeypatch, capsys):
    monkeypatch.setattr(support, "LOG_SECONDS", 0.02)
    lines = []

    def wait(count):
        """Wait for more lines, even on a busy machine."""
        wanted, end = len(lines) + count, time.monotonic() + 60
        while len(lines) < wanted and time.monotonic() < end:
            time.sleep(0.01)
            lines.extend(capsys.readouterr().err.splitlines())

    with support.progress(log=True) as report:
        wait(2)
        assert set(lines) == {"preparing: 0 s"}
        report("rollouts", 300, 400, 0)  # resumed
        wait(3)
        assert lines[-1] == "rollouts 300/400"
        report("rollouts", 399, 400, 5000)
        wait(3)
        # 99 of 100 are done, so the remaining time is about a hundredth of the elapsed time
        form = r"rollouts 399/400, [\d,]+ tokens/s, about [01] s left"
        assert re.fullmatch(form, lines[-1]), lines[-1]
        report("rollouts", 400, 400, 5000)
        wait(3)
        assert lines[-1] == "rollouts 400/400 complete; the next step has taken 0 s so far"
        report("judging", 1, 3, 0)
        wait(2)
        assert lines[-1] == "judging 1/3"
        with support.progress(log=True) as inner:  # the same display, as for a judge's model
            inner("load", 2_000_000_000, 4_000_000_000, 0)
            wait(2)
        assert lines[-1] == "load 2.0/4.0 GB"
    capsys.readouterr()
    with support.progress() as report:  # the other commands print nothing
        report("rollouts", 1, 2, 3)
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.fixture
def slow(monkeypatch, capsys):
    """Make a function wait until two lines are on standard error; return stage → these lines."""
    seen: dict[str, list[list[str]]] = {}
    monkeypatch.setattr(support, "LOG_SECONDS", 0.02)

    def patch(stage, target, instead=None):
        import pkgutil

        real = instead or pkgutil.resolve_name(target)

        def call(*args, **named):
            capsys.readouterr()
            lines, end = [], time.monotonic() + 60
            while len(lines) < 2 and time.monotonic() < end:
                time.sleep(0.01)
                lines += capsys.readouterr().err.splitlines()
            seen.setdefault(stage, []).append(lines)
            return real(*args, **named)

        monkeypatch.setattr(target.replace(":", "."), call)
        return seen

    return patch


def test_axis_is_never_silent_in_a_slow_stage(slow, tmp_path, capsys):
    """Loading the model, the check of stored files, the results and the figures."""
    slow("load", "jaxpersona.ckpts.loading:load")
    slow("files", "jaxpersona.persona.collect:Collection._scan")
    slow("results", "jaxpersona.persona.extract:axis_of")
    seen = slow("figures", "jaxpersona.cli.support:draw_run", lambda *_: True)
    assert s.run_command([
        "axis", "--out", str(tmp_path / "run"), "--roles-named", "void,hive", "--limit-questions",
        "1", "--min-count", "1", "--max-new-tokens", "4", "--batch-size", "16", "--judge", "none",
    ]) == 0, capsys.readouterr().err
    assert {stage: len(calls) for stage, calls in seen.items()} == {
        "load": 1, "files": 1, "results": 1, "figures": 1}
    for stage, calls in seen.items():
        assert all(len(lines) >= 2 for lines in calls), stage
    assert seen["load"][0][0].startswith("preparing: ")
    assert "complete; the next step has taken" in seen["results"][0][-1]


def test_loading_a_judge_is_not_silent(slow, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise UserError("stopped here")

    monkeypatch.setattr("jaxpersona.persona.extract.extract_axis", stop)
    (tmp_path / "rubric.txt").write_text("{question} {answer} Give a score from 0 to 3.")
    seen = slow("load", "jaxpersona.ckpts.loading:load")
    assert s.run_command(["axis", "--out", str(tmp_path / "run"), "--judge", "model:mini",
                          "--judge-rubric", str(tmp_path / "rubric.txt")]) == 2
    assert "stopped here" in capsys.readouterr().err
    assert len(seen["load"]) == 2 and all(len(lines) >= 2 for lines in seen["load"])


@pytest.mark.parametrize(("command", "target"), [
    (["demo"], "jaxpersona.organism.demo:run_demo"),
    (["axis", "--dry-run", "--sample-seconds", "0"], "jaxpersona.persona.forecast:forecast"),
])
def test_demo_and_a_dry_run_are_never_silent(command, target, slow, tmp_path, capsys):
    def stop(*_, **__):
        raise UserError("stopped here")

    seen = slow("work", target, stop)
    assert s.run_command([*command, "--out", str(tmp_path / "run")]) == 2
    assert len(seen["work"][0]) >= 2 and "stopped here" in capsys.readouterr().err


@pytest.mark.parametrize("seconds,expected", [(0.4, "0 s"), (99, "99 s"), (150, "2 min"),
                                              (5990, "100 min"), (7200, "2.0 h")])
def test_a_duration_has_one_unit(seconds, expected):
    assert support._duration(seconds) == expected
