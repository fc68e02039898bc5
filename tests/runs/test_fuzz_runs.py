"""Damage to published folders, run folders of format 2 and live files (see `fuzz.check`)."""

from __future__ import annotations

import json
import random
import shutil
import zlib

import fuzz
import numpy as np
import pytest
import support as s
from jaxpersona.ckpts.files import read_tensors, write_tensors
from test_damages import QUESTIONS, ROLES, contents, resume
from test_older import both, run  # noqa: F401 (a fixture)

from jaxpersona.persona.collect import rubric_of
from jaxpersona.runs.run import Run
from jaxpersona.runs.seal import sha256

SHAPE = (3, 32)


def lines(data: bytes, draw: random.Random) -> bytes:
    """Damage one value in JSON Lines with a final newline, or the bytes."""
    if draw.random() < 0.3:
        return fuzz.damage(data, draw)
    rows = data.split(b"\n")[:-1]
    at = draw.randrange(len(rows))
    rows[at] = fuzz.json_text(json.loads(rows[at]), draw)
    return b"\n".join(rows) + b"\n"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Return a folder with an output folder of the published code."""
    torch = pytest.importorskip("torch")
    from published_folder import steps_4_and_5, write

    folder = tmp_path_factory.mktemp("published")
    source = write(folder / "in", unscored=("pos_p0_q1",), lost=("pos_p1_q2",))
    _, axis = steps_4_and_5(source, 2)
    torch.save({"axis": torch.tensor(axis)}, source / "axis.pt")
    (source / "jaxpersona.json").write_text(json.dumps(
        {"format": "x", "model": "m", "fingerprint": "f", "fingerprint_scheme": 3}))
    return folder


PUBLISHED = {
    "in/responses/a.jsonl": lines,
    "in/responses/default.jsonl": lines,
    "in/scores/a.json": fuzz.damaged_json,
    "in/jaxpersona.json": fuzz.damaged_json,
    "in/activations/a.pt": None,
    "in/axis.pt": None,
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_damage_to_a_published_folder(published, name, count, capsys, monkeypatch):
    import torch

    monkeypatch.setattr("jaxpersona.cli.support.draw_run", lambda *_: None)
    path = published / name
    make = PUBLISHED[name] or fuzz.damaged_pickle(torch.load(path, weights_only=True))
    fuzz.check(path, published, make, lambda: s.run_command(
        ["runs", "import", str(published / "in"), str(published / "run"), "--min-count", "2"]),
        count, capsys, after=lambda: shutil.rmtree(published / "run", ignore_errors=True),
        least=0 if name.endswith("jaxpersona.json") else 0.2)


def resealed(means):
    """Damage rollouts of format 2, and write their new digest into the file of means."""
    def make(data, draw):
        made = lines(data, draw)
        tensors, about = read_tensors(means)
        write_tensors(means, dict(tensors), {**about, "rollouts": sha256(made)})
        return made
    return make


OLDER = {
    "old/run.json": fuzz.damaged_json,
    "old/rollouts/ghost.jsonl": lines,
    "old/means/ghost.safetensors": fuzz.damaged_safetensors,
    "old/scores/ghost.json": fuzz.damaged_json,
}


@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", [*OLDER, "resealed"])
def test_damage_to_a_run_of_format_2(both, tmp_path, name, count, capsys):  # noqa: F811
    old = shutil.copytree(both[1], tmp_path / "old")
    if name == "resealed":
        path = old / "rollouts" / "ghost.jsonl"
        make = resealed(old / "means" / "ghost.safetensors")
    else:
        path, make = tmp_path / name, OLDER[name]
    fuzz.check(path, tmp_path, make, lambda: fuzz.called(lambda: run(
        tmp_path / "run", take_from=old)), count, capsys,
        after=lambda: shutil.rmtree(tmp_path / "run", ignore_errors=True))


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Return a folder with the run of a killed process: the files of "ghost" are live files."""
    folder = tmp_path_factory.mktemp("live") / "run"
    resume(folder)
    found, ghost = Run.read(folder), next(role for role in ROLES if role.name == "ghost")
    records, scores = found.rollouts("ghost"), found.scores("ghost")
    for path in [p for p in folder.rglob("ghost.*") if p.is_file()]:
        path.unlink()
    live = found.live("ghost", SHAPE)
    for i, record in enumerate(records):
        live.add(record, np.full(SHAPE, i, np.float32))
    live.judge(f"test/{rubric_of(ghost)}", {
        key: {"score": score, "raw": str(score)} for key, score in scores.items()})
    assert len(records) == 2 * len(QUESTIONS)
    return folder


def checked(means=None):
    """Damage the JSON of live files, and write the checksums of the damaged lines."""
    def make(data, draw):
        if draw.random() < 0.2:
            return fuzz.damage(data, draw)
        rows = [row[9:] for row in data.split(b"\n")[:-1]]
        at = draw.randrange(len(rows))
        rows[at] = fuzz.json_text(json.loads(rows[at]), draw)
        size = 4 * SHAPE[0] * SHAPE[1]
        parts = [b"", *(means[i * size : (i + 1) * size] if means else b""
                        for i in range(len(rows) - 1))]
        return b"".join(b"%08x %s\n" % (zlib.crc32(part, zlib.crc32(row)), row)
                        for row, part in zip(rows, parts, strict=True))
    return make


@pytest.mark.parametrize("count", fuzz.COUNTS)
@pytest.mark.parametrize("name", ["ghost.jsonl", "ghost.means", "ghost.verdicts.jsonl"])
def test_damage_to_live_files(played, tmp_path, name, count, capsys):
    """Damaged entries are dropped, and then generated and judged again."""
    target, live = tmp_path / "run", played / "live"
    shutil.copytree(played, target)
    make = {"ghost.jsonl": checked((live / "ghost.means").read_bytes()),
            "ghost.verdicts.jsonl": checked()}.get(name, fuzz.damage)

    def restore():
        shutil.rmtree(target)
        shutil.copytree(played, target)

    fuzz.check(target / "live" / name, tmp_path, make,
               lambda: fuzz.called(lambda: resume(target)), count, capsys, after=restore, least=0)
    assert contents(target) == contents(played)
