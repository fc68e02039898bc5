"""Bounds of the file readers, kinds of files, and the characters that are printed as escapes."""

from __future__ import annotations

import os
import pathlib
import socket
import sys

import pytest

from jaxpersona import inputs
from jaxpersona.errors import UserError


def test_a_text_may_have_256_mebibytes(tmp_path):
    """One byte more is refused before the file is read."""
    path = tmp_path / "big.json"
    path.touch()
    os.truncate(path, 256 << 20)
    inputs.require_files(tmp_path, (".json",))
    os.truncate(path, (256 << 20) + 1)
    for call in (lambda: inputs.require_files(tmp_path, (".json",)),
                 lambda: inputs.read_bytes(path), lambda: inputs.read_json(path)):
        with pytest.raises(UserError, match=r"has 268435457 bytes; the limit is 268435456"):
            call()


def test_a_socket_and_a_pipe_are_named(tmp_path, monkeypatch):
    """Reading either would block."""
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("s.json")
        with pytest.raises(UserError, match="s.json: cannot be read .it is a socket; give a file"):
            inputs.require_file("s.json")
        os.mkfifo("p.json")
        with pytest.raises(UserError, match="p.json: cannot be read .it is a pipe; give a file"):
            inputs.require_files(tmp_path, (".json",))


def test_folders_and_broken_links_are_no_files_of_a_folder(tmp_path):
    """Another library does not read them, so they are no mistake."""
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.json").symlink_to(tmp_path / "none")
    (tmp_path / "c.json").write_text("{}")
    (tmp_path / "d.json").symlink_to(tmp_path / "c.json")
    inputs.require_files(tmp_path, (".json",), 2)
    with pytest.raises(UserError, match="c.json has 2 bytes; the limit is 1"):
        inputs.require_files(tmp_path, (".json",), 1)


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_file_that_reports_no_size_is_read():
    """As files in /proc do; the limit applies all the same."""
    assert b"Pid:" in inputs.read_bytes("/proc/self/status", 4096)
    assert len(inputs.read_bytes("/proc/self/status", 10)) == 10


def test_a_json_text_keeps_the_order_of_its_pairs():
    """The hook gets every pair, also of keys that occur twice."""
    seen = []
    inputs.parse_json('{"b": 1, "a": {"c": 2}, "b": 3}', lambda pairs: seen.append(pairs) or {})
    assert seen == [[("c", 2)], [("b", 1), ("a", {}), ("b", 3)]]
    with pytest.raises(UserError, match="x.json: no such file"):
        inputs.read_json("x.json")


@pytest.mark.parametrize(("low", "high"), [(0x00, 0x08), (0x0B, 0x1F), (0x7F, 0x9F),
                                           (0x61C, 0x61C), (0x202A, 0x202E), (0x2066, 0x2069)])
def test_every_control_character_is_printed_as_an_escape(low, high):
    """Both ends of each range, and not their neighbours."""
    for code in {low, high}:
        text = inputs.printable(chr(code))
        assert text == ascii(chr(code))[1:-1] and text.isascii() and text != chr(code)
    for code in (low - 1, high + 1):
        if code >= 0 and not 0x0A < code < 0x20:
            assert inputs.printable(chr(code)) == chr(code)


def test_line_breaks_and_marks_of_direction_are_printed():
    r"""\\r\\n becomes a newline; a single \\r is an escape."""
    assert inputs.printable("a\r\nb\n\tc\u200e\u200f") == "a\nb\n\tc\u200e\u200f"
    assert inputs.printable("a\rb") == "a\\rb"


@pytest.mark.parametrize(("value", "wanted"), [
    (0, True), (-2.5, True), (sys.float_info.max, True), (-int(sys.float_info.max), True),
    (int(sys.float_info.max) + 1, False), (10**400, False), (-10**400, False),
    (float("inf"), False), (float("nan"), False), ("1", False), (None, False)])
def test_a_finite_number_is_one_that_a_float_can_have(value, wanted):
    """JSON may contain integers that no float can have."""
    assert inputs.is_finite(value) is wanted
