"""Damaged run folders: each kind of damage is repaired, or raises an error that names the file."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tracemalloc

import numpy as np
import pytest
import support as s
from jaxpersona.ckpts import files, tensorfile
from jaxpersona.ckpts.files import read_tensors, write_tensors

from jaxpersona.data.texts import Question, Role
from jaxpersona.persona.extract import extract_axis
from jaxpersona.runs.compare import sealed
from jaxpersona.runs.rollouts import Settings
from jaxpersona.runs.run import Run

ROLES = [Role("default", ("", "You are an AI."), "")] + [
    Role(name, (f"You are a {name}.", f"Act as a {name}."), "{question} {answer}?")
    for name in ("ghost", "pirate", "tutor")]
QUESTIONS = [Question(0, "Why?"), Question(1, "How?")]
SETTINGS = Settings(temperature=1.0, top_p=1.0, max_new_tokens=4, batch_size=8)
# replies of different lengths, which finish out of order
MODEL = dataclasses.replace(s.tiny_model(vocab_size=258, stop_ids=(*range(60, 100), 257)),
                            tokenizer=s.byte_tokenizer())


# every fourth rollout has score 2 and all others score 3
JUDGE = s.Scored(lambda role, key: 2 if key == "pos_p1_q1" else 3)


def resume(folder, **changes):
    options = {"judge": JUDGE, "settings": SETTINGS, "min_count": 2, **changes}
    return extract_axis(MODEL, ROLES, QUESTIONS, folder, **options)


def contents(folder):
    """Return the files of a run but for status.json, which has times."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*")
            if p.is_file() and p.name != "status.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a folder with a finished run, and one with a different seed."""
    folder = tmp_path_factory.mktemp("runs")
    resume(folder / "run")
    resume(folder / "other", settings=dataclasses.replace(SETTINGS, seed=1))
    assert not list((folder / "run").glob(".*"))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """Return a copy of the finished run that tests may damage."""
    return shutil.copytree(finished / "run", tmp_path / "run")


def flip(at):
    def act(path):
        data = bytearray(path.read_bytes())
        data[int(at * (len(data) - 1))] ^= 4
        path.write_bytes(data)
    return act


def rewrite(change):
    def act(path):
        path.write_bytes(change(path.read_bytes()))
    return act


def as_folder(path):
    path.unlink()
    (path / "inner").mkdir(parents=True)


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_dangling_link(path):
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


DAMAGES = {
    "emptied": rewrite(lambda data: b""), "halved": rewrite(lambda data: data[: len(data) // 2]),
    "cut": rewrite(lambda data: data[:-1]), "longer": rewrite(lambda data: data + b"\n"),
    "doubled": rewrite(lambda data: data + data), "zeroed": rewrite(lambda data: bytes(len(data))),
    "flipped first": flip(0), "flipped early": flip(0.1), "flipped middle": flip(0.5),
    "flipped late": flip(0.9), "flipped last": flip(1),
    "not UTF-8": rewrite(lambda data: b"\xff\xfe" + data[2:]),
    "a folder": as_folder, "a pipe": as_pipe, "a dangling link": as_dangling_link,
}
SEALED = ("rollouts/ghost.jsonl", "rollouts/default.jsonl", "samples/ghost.safetensors",
          "samples/default.safetensors", "scores/test/ghost.json", "sums/test/ghost.safetensors",
          "sums/default.safetensors")
DERIVED = ("vectors/ghost.safetensors", "axis.safetensors", "analysis.json")


def refused(run, *wanted, **changes):
    """Check that resuming raises one line with all words in `wanted` and changes no file."""
    before = contents(run)
    with pytest.raises(ValueError) as error:
        resume(run, **changes)
    said = str(error.value)
    assert "\n" not in said and all(text in said for text in wanted), said
    assert contents(run) == before


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", SEALED)
def test_a_role_s_file_is_refused_by_name(finished, run, name, damage):
    """The error names the role and how to regenerate it."""
    DAMAGES[damage](run / name)
    role = re.split(r"[/.]", name)[-2]
    refused(run, name.rpartition(".")[0], "damaged", f"--redo {role}")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused_by_name_or_mended(finished, run, damage):
    DAMAGES[damage](run / "run.json")
    if damage in ("longer", "cut"):  # an extra or missing newline leaves the JSON value unchanged
        resume(run)
        assert contents(run) == contents(finished / "run")
    else:
        refused(run, "run")


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", DERIVED)
def test_what_is_computed_anew_is_recovered(finished, run, name, damage):
    """Vectors, axis and analysis are recomputed from sums, samples and scores."""
    DAMAGES[damage](run / name)
    if damage == "a folder":
        with pytest.raises(ValueError, match=re.escape(name)):
            resume(run)
        return
    resume(run)
    assert contents(run) == contents(finished / "run")


@pytest.mark.parametrize("name", [
    "rollouts/ghost.jsonl", "scores/test/ghost.json", "vectors/ghost.safetensors",
    "axis.safetensors", "analysis.json", "rollouts", "scores", "vectors", "status.json"])
def test_what_is_removed_is_made_anew(finished, run, name):
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    resume(run)
    assert contents(run) == contents(finished / "run")


def test_a_removed_sample_and_a_removed_manifest_are_refused(run):
    (run / "samples/ghost.safetensors").unlink()
    refused(run, "samples/ghost.safetensors", "no such file", "--redo ghost")
    (run / "run.json").unlink()
    refused(run, str(run), "has no run.json")


def swap_lines(text):
    lines = text.splitlines(keepends=True)
    return "".join([lines[1], lines[0], *lines[2:]])


def edit_reply(text):
    lines = [json.loads(line) for line in text.splitlines()]
    lines[0]["conversation"][-1]["content"] += "!"
    return "".join(json.dumps(r, ensure_ascii=False, sort_keys=True) + "\n" for r in lines)


@pytest.mark.parametrize("change", [
    swap_lines, edit_reply, lambda text: text.split("\n", 1)[1],
    lambda text: text + text.split("\n", 1)[0] + "\n", lambda text: "5\n" + text,
    lambda text: text.replace('"sample": 0', '"sample": 1'),
    lambda text: text.replace("\n", "\r\n")],
    ids=["swapped lines", "an edited reply", "a line less", "a line twice", "a number",
         "other samples", "line ends"])
def test_rollouts_that_are_valid_but_others(run, change):
    path = run / "rollouts/ghost.jsonl"
    path.write_bytes(change(path.read_text("utf-8")).encode())
    refused(run, "rollouts/ghost.jsonl", "--redo ghost")


def change_row(row, value):
    def act(tensors, about):
        tensors["differences"][row] = value
    return act


def swap_rows(tensors, about):
    tensors["differences"][[0, 1]] = tensors["differences"][[1, 0]]


def drop_row(tensors, about):
    tensors["differences"] = tensors["differences"][1:]


@pytest.mark.parametrize("change", [
    change_row(0, np.nan), change_row(1, np.inf), change_row((0, 0, 0), np.nan),
    change_row((slice(None), 1), 7.0), swap_rows, drop_row,
    lambda tensors, about: tensors.update(extra=np.zeros(2, np.float32)),
    lambda tensors, about: tensors.pop("base"),
    lambda tensors, about: tensors.update(base=tensors["base"].astype(np.float16)),
    lambda tensors, about: about.update(role="pirate"),
    lambda tensors, about: about.update(rollouts="0" * 64),
    lambda tensors, about: about.pop("digest"), lambda tensors, about: about.clear()],
    ids=["NaN row", "Inf row", "NaN number", "a layer overwritten", "swapped rows", "a row less",
         "a tensor more", "no tensor", "another dtype", "another role", "other rollouts",
         "no digest", "no header"])
def test_samples_that_are_valid_but_others(run, change):
    path = run / "samples/ghost.safetensors"
    tensors, about = read_tensors(path)
    change(tensors, about)
    write_tensors(path, tensors, about)
    refused(run, "samples/ghost.safetensors", "--redo ghost")


@pytest.mark.parametrize("change", [
    lambda tensors, about: tensors["3"].__imul__(2), lambda tensors, about: tensors.pop("2"),
    lambda tensors, about: about.update(groups=about["groups"].replace('"2"', '"3"')),
    lambda tensors, about: about.update(role="pirate"), lambda tensors, about: about.clear()],
    ids=["twice the sum", "no sum", "another group", "another role", "no header"])
def test_sums_that_are_valid_but_others(run, change):
    path = run / "sums/test/ghost.safetensors"
    tensors, about = read_tensors(path)
    change(tensors, about)
    write_tensors(path, tensors, about)
    refused(run, "sums/test/ghost.safetensors", "--redo ghost")


@pytest.mark.parametrize("change", [
    lambda t: t["scores"].update({next(iter(t["scores"])): True}),
    lambda t: t["scores"].update({next(iter(t["scores"])): 3.0}),
    lambda t: t["scores"].update({next(iter(t["scores"])): 4}),
    lambda t: t["scores"].update({next(iter(t["scores"])): 0}),
    lambda t: t["scores"].update({next(iter(t["scores"])): [3]}),
    lambda t: t["scores"].popitem(), lambda t: t["scores"].update(more=3),
    lambda t: t.update(scores=[3, 3, 3, 3]), lambda t: t.update(role="pirate"),
    lambda t: t.pop("digest"), lambda t: t.update(rubric="0" * 16), lambda t: t.clear()],
    ids=["true", "3.0", "4", "another score", "a list", "one less", "one more", "all a list",
         "another role", "no digest", "another rubric", "nothing"])
def test_scores_that_are_valid_json_but_others(run, change):
    path = run / "scores/test/ghost.json"
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    refused(run, "scores/test/ghost.json", "--redo ghost")


@pytest.mark.parametrize("parts", [
    ["rollouts"], ["samples"], ["scores/test"], ["sums/test"], ["rollouts", "samples"],
    ["rollouts", "samples", "scores/test", "sums/test"]], ids="+".join)
@pytest.mark.parametrize("source", ["role", "run"])
def test_files_of_another_role_or_run(finished, run, parts, source):
    """Undamaged files of a different role or run are rejected."""
    there = finished / "other" if source == "run" else finished / "run"
    for part in parts:
        end = next((run / part).glob("ghost.*")).suffix
        name = "ghost" if source == "run" else "pirate"
        shutil.copy(there / part / f"{name}{end}", run / part / f"ghost{end}")
    refused(run, "/ghost.", "--redo ghost")


@pytest.mark.parametrize(("field", "value", "wanted"), [
    (("model", "fingerprint"), "0" * 16, "model.fingerprint"),
    (("model", "dtype"), "bfloat16", "model.dtype"), (("arguments", "seed"), 3, "arguments.seed"),
    (("arguments", "samples"), True, "arguments.samples was true, now 1"),
    (("arguments", "batch_size"), 8.0, "arguments.batch_size"),
    (("roles", "ghost"), "0" * 16, "roles.ghost"), (("questions", "1"), "0" * 16, "questions.1"),
    (("numerics", "platform"), "gpu", "numerics.platform"),
    (("numerics", "device"), "NVIDIA H100", "numerics.device"),
    (("numerics", "devices"), 4, "numerics.devices"),
    (("numerics", "mesh"), {"data": 2}, "numerics.mesh.data was 2, now absent"),
    (("numerics", "prng"), "rbg", "numerics.prng"),
    (("numerics", "jax", "jax_enable_x64"), True, "numerics.jax.jax_enable_x64"),
    (("format",), "jaxpersona-run 1", "resume with the version that started the run"),
    (("roles",), ["ghost"], "roles is not an object"), (("last",), 5, "last is not an object"),
    (("format",), 5, "is not the manifest of a run"),
    (("unknown",), 1, "unknown was 1, now absent"),
], ids=str)
def test_what_determines_the_rollouts_is_compared(run, field, value, wanted):
    manifest = json.loads((run / "run.json").read_text())
    table = manifest
    for key in field[:-1]:
        table = table[key]
    table[field[-1]] = value
    (run / "run.json").write_text(json.dumps(sealed(manifest)))
    refused(run, wanted, str(run))


@pytest.mark.parametrize("damaged", [
    ["rollouts/ghost.jsonl"], ["samples/ghost.safetensors"], ["scores/test/ghost.json"],
    ["sums/test/ghost.safetensors"], ["rollouts/default.jsonl", "scores/test/tutor.json"]],
    ids="+".join)
def test_a_damaged_role_is_made_anew_when_asked(finished, run, damaged):
    """The error names all damaged roles, and `redo` regenerates only these."""
    for name in damaged:
        flip(0.5)(run / name)
    roles = [re.split(r"[/.]", name)[-2] for name in damaged]
    refused(run, *damaged, *(f"--redo {role}" for role in roles))
    kept = run / "rollouts" / "pirate.jsonl"
    before = kept.stat().st_mtime_ns
    resume(run, redo=roles)
    assert contents(run) == contents(finished / "run") and kept.stat().st_mtime_ns == before
    refused(run, "redo contains unknown roles ['nobody']", redo=["nobody"])


class Killed(BaseException):
    """Raised to end a write like a signal."""


def test_a_file_is_on_its_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """After a power cut, the name is that of a whole file, the old or the new one."""
    done, fsync, replace = [], os.fsync, os.replace

    def note(what, place):
        found = os.stat(place)
        done.append((what, found.st_ino, found.st_size))

    def flushed(handle):
        fsync(handle)
        note("flushed", handle)

    def renamed(source, target):
        note("renamed", source)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    files.write_json(tmp_path / "x.json", list(range(1000)))
    files.write_tensors(tmp_path / "x.safetensors", {"a": np.ones(1000, np.float32)}, {})
    tensorfile.replace_files(tmp_path, {"a": [b"12", b"3"], "b": [b"45"]})
    assert [what for what, *_ in done] == ["flushed", "renamed"] * 2 + ["flushed"] * 2 + [
        "renamed"] * 2
    for name in ("x.json", "x.safetensors", "a", "b"):
        found = (tmp_path / name).stat()
        own = [what for what, *file in done if file == [found.st_ino, found.st_size]]
        assert own == ["flushed", "renamed"]


def test_a_file_is_replaced_and_never_written_over(tmp_path):
    """Open handles still read the old file, and a failed write leaves it unchanged."""
    path = tmp_path / "x.json"
    files.write_json(path, {"old": 1})
    with open(path) as old:
        files.write_json(path, {"new": list(range(1000))})
        assert json.load(old) == {"old": 1}
    with pytest.raises(Killed), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise Killed
    assert json.loads(path.read_text()) == {"new": list(range(1000))}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("name", ["rollouts/ghost.jsonl", "samples/ghost.safetensors"])
def test_a_file_of_any_size_is_hashed_before_it_is_held(run, name):
    """The file may be larger than memory even if its header is valid."""
    size, path = 512 << 20, run / name
    if path.suffix == ".jsonl":
        os.truncate(path, size)
    else:
        _, about = read_tensors(path)
        header = json.dumps({"__metadata__": about, "base": {
            "dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}},
            separators=(",", ":")).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(path, 8 + len(header) + size)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{path.name}: damaged"):
            Run.read(run).rollouts("ghost")
        assert tracemalloc.get_traced_memory()[1] < size / 8
    finally:
        tracemalloc.stop()
