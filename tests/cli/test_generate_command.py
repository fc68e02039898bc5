"""`jaxpersona generate`: comparison in one batch, JSON, files of prompts, streaming."""

from __future__ import annotations

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import support as s

import jaxpersona as jp
from jaxpersona.cli.support import check_output
from jaxpersona.engine import programs
from jaxpersona.text.chat import answered

MODEL, AXIS = jp.load("mini"), jp.load_axis("mini")
PIRATE = {"role": "system", "content": "You are a pirate. Stay in character."}
ASKED = "Who are you really, under the mask?"
TALK = [PIRATE, {"role": "user", "content": ASKED}]
CAP = jp.cap(AXIS, layers=slice(4, 8), floor="p25")
SETTINGS = {"temperature": 0.7, "seed": 5, "max_new_tokens": 24}
OPTIONS = ["--temperature", "0.7", "--seed", "5", "--max-new-tokens", "24", "--system",
           PIRATE["content"], "--cap", "mini", "--no-check"]


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    monkeypatch.setattr("jaxpersona.cli.support.open_model", lambda *_: MODEL)


def run(capsys, *arguments):
    """Run the command; return standard output and error."""
    capsys.readouterr()
    code = s.run_command(["generate", *arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


@pytest.fixture(scope="module")
def separate():
    """The replies of two separate runs at the batch size of the comparison."""
    return [jp.generate(MODEL, [TALK], interventions=edits, batch_size=2, **SETTINGS)
            for edits in (CAP, None)]


def test_a_comparison_is_one_batch_with_the_replies_of_two_runs(capsys, separate):
    capped, plain = separate
    s.KEPT.clear()
    out, err = run(capsys, ASKED, *OPTIONS, "--compare", "--json", "--axis", "mini")
    assert (s.compiled(programs.decode), s.compiled(programs.prefill)) == (1, 1)
    found = json.loads(out)
    assert found["prompt"] == TALK
    assert found["reply"] == capped.text[0] != plain.text[0] == found["without"]["reply"]
    for one, wanted in ((found, capped), (found["without"], plain)):
        assert one["tokens"] == len(wanted.tokens[0]) and one["stopped"] == wanted.stopped[0]
        row = answered(MODEL.tokenizer, wanted.rows[0], wanted.tokens[0])
        mean = jp.extract(MODEL, [row]).captured["mean"][0, 4]  # without interventions
        assert abs(one["projections"]["4"] - mean @ AXIS.unit[4]) <= 1e-4
    (counts,) = found["edits"]
    assert counts == {"edit": "cap(everywhere, layers 4–7, residual)", "layers": [4, 5, 6, 7],
                      "seen": capped.applied[0].seen[0],
                      "changed": capped.applied[0].changed[:, 0].tolist()}
    assert err == (f"intervention 0: tokens selected: {counts['seen']}, activations changed: "
                   f"{sum(counts['changed'])}, layers: 4\n")
    assert found["projections"]["4"] < AXIS.thresholds("p25")[4]  # read before the cap, not after
    # as a table
    out, err = run(capsys, ASKED, *OPTIONS, "--compare", "--axis", "mini")
    words = out.replace("│", " ").split()
    assert set(capped.text[0].split()) | set(plain.text[0].split()) <= set(words)
    assert "read before the interventions at that layer" in err
    assert f"{found['without']['projections']['4']:+.2f}" in words


def test_prompts_of_a_file_are_written_as_json_lines(capsys, tmp_path, separate):
    (tmp_path / "p.jsonl").write_text(f"{json.dumps(TALK)}\n" + json.dumps({"messages": TALK}))
    arguments = [x for x in OPTIONS if x not in ("--system", PIRATE["content"])]
    out, err = run(capsys, "--prompts", str(tmp_path / "p.jsonl"), *arguments, "--out",
                   str(tmp_path / "r.jsonl"))
    assert out == "" and f"wrote {tmp_path}/r.jsonl: 2 replies" in err
    found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    # the second is another sample of the same prompt
    assert found[0]["reply"] == separate[0].text[0] != found[1]["reply"]
    assert [one["prompt"] for one in found] == [TALK, TALK] and "projections" not in found[0]
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["p.jsonl", "r.jsonl"]


def test_a_system_prompt_applies_to_the_prompts_of_a_file(capsys, tmp_path):
    (tmp_path / "p.txt").write_text(f"{ASKED}\nHello.\n")
    _, err = run(capsys, "Hi.", "--prompts", str(tmp_path / "p.txt"), "--system", "Be a pirate.",
                 "--max-new-tokens", "1", "--out", str(tmp_path / "r.jsonl"))
    found = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in found] == [
        [{"role": "system", "content": "Be a pirate."}, {"role": "user", "content": said}]
        for said in ("Hi.", ASKED, "Hello.")]


def test_both_replies_of_a_comparison_are_in_the_file(capsys, tmp_path, monkeypatch):
    """The replies to all prompts with the interventions come first, then those without."""
    changed = np.arange(16).reshape(4, 4)  # layer, reply
    made = SimpleNamespace(text=["a", "b", "c", "d"], stopped=[True, False, True, False],
                           tokens=[np.zeros(n, np.int32) for n in (1, 2, 3, 4)], captured={},
                           applied=[jp.Applied(np.array([5, 6, 7, 8]), changed)])
    monkeypatch.setattr("jaxpersona.engine.generate.generate", lambda *_, **__: made)
    out, err = run(capsys, "One?", "Two?", "--cap", "mini", "--no-check", "--compare", "--json",
                   "--out", str(tmp_path / "r.jsonl"))
    assert f"wrote {tmp_path}/r.jsonl: 4 replies\n" in err
    assert (tmp_path / "r.jsonl").read_text() == out  # both were asked for
    found = [json.loads(line) for line in out.splitlines()]
    assert [(one["prompt"][0]["content"], one["reply"], one["tokens"], one["stopped"],
             one["without"]) for one in found] == [
        ("One?", "a", 1, True, {"reply": "c", "stopped": True, "tokens": 3}),
        ("Two?", "b", 2, False, {"reply": "d", "stopped": False, "tokens": 4})]
    assert [one["edits"][0]["changed"] for one in found] == [[0, 4, 8, 12], [1, 5, 9, 13]]
    # 5 + 6 tokens; 24 + 28 activations; the replies without interventions do not count
    assert ("intervention 0: tokens selected: 11, activations changed: 52, layers: 4\n"
            ) in err


def test_the_check_of_an_output_leaves_nothing_and_changes_nothing(tmp_path):
    check_output("--out", tmp_path / "new" / "er" / "r.jsonl")
    assert not any(tmp_path.iterdir())
    for name, target in (("link", "kept"), ("dangling", "none")):
        (tmp_path / "kept").write_text("kept")
        (tmp_path / name).symlink_to(tmp_path / target)
        with pytest.raises(jp.UserError, match="not a regular file; give another name"):
            check_output("--out", tmp_path / name)
        assert not (tmp_path / "none").exists()
    (tmp_path / "r.jsonl").write_text("kept")
    check_output("--out", tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_text() == "kept"
    with pytest.raises(jp.UserError, match="a folder; give the name of a file"):
        check_output("--out", tmp_path)


def test_where_limits_the_interventions(capsys, separate):
    """A cap on the user's message sees its tokens alone."""
    out, _ = run(capsys, ASKED, *OPTIONS, "--where", "user", "--json")
    (counts,) = json.loads(out)["edits"]
    row = separate[0].rows[0]
    user = int(((np.asarray(row.kind) & jp.where.user.need & ~1) > 0).sum())
    assert counts["edit"] == "cap(user, layers 4–7, residual)" and counts["seen"] == user > 0


def test_a_cap_holds_after_the_steering_and_a_spec_comes_last(capsys, tmp_path):
    jp.save_vector(tmp_path / "v.safetensors", AXIS)
    (tmp_path / "spec.json").write_text(json.dumps({
        "operator": "scale", "vector": "v.safetensors", "layers": [4], "factor": 1.01}))
    out, _ = run(capsys, ASKED, *OPTIONS, "--cap-layers", "4:5", "--steer",
                 str(tmp_path / "v.safetensors"), "--steer-layers", "4", "--scale", "-3", "--spec",
                 str(tmp_path / "spec.json"), "--json")
    found = json.loads(out)
    assert [one["edit"].split("(")[0] for one in found["edits"]] == ["steer", "cap", "scale"]
    wanted = jp.generate(MODEL, [TALK], batch_size=1, **SETTINGS, interventions=jp.chain(
        jp.steer(AXIS, layers=4, scale=-3.0), jp.cap(AXIS, layers=4, floor="p25"),
        jp.scale(AXIS, 1.01, layers=4)))
    assert found["reply"] == wanted.text[0]
    seen = found["edits"][1]["seen"]
    assert found["edits"][1]["changed"] == [seen]  # the steering moves every token below the floor


class Screen(io.StringIO):
    """Standard output at a terminal."""

    def isatty(self):
        return True


def test_a_single_reply_is_streamed_to_a_terminal(capsys, monkeypatch):
    screen, pieces = Screen(), []
    write = screen.write
    screen.write = lambda text: pieces.append(text) or write(text)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("TERM", "dumb")
    _, err = run(capsys, ASKED, *OPTIONS)
    wanted = jp.generate(MODEL, [TALK], interventions=CAP, batch_size=1, **SETTINGS)
    assert screen.getvalue() == f"{wanted.text[0]}\n" and len([p for p in pieces if p]) > 3
    assert f"tokens selected: {int(wanted.applied[0].seen[0])}," in err


@pytest.mark.parametrize(("arguments", "wanted"), [
    ([], "there is no prompt; give one, or a file with --prompts"),
    (["Hi", "--out", "."], "--out is ., a folder; give the name of a file"),
    (["Hi", "--prompts", "none.txt"], "none.txt: no such file"),
    (["Hi", "--compare"], "--compare needs interventions; give --cap, --steer or --spec"),
])
def test_mistakes_are_one_line(capsys, arguments, wanted):
    assert s.run_command(["generate", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {wanted}\n"
