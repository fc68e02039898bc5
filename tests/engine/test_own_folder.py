"""Files that only their owner may write: what is read, what is refused, and how many are kept."""

from __future__ import annotations

import os

import pytest

from jaxpersona.engine import own_folder
from jaxpersona.engine.own_folder import OwnFolder, private

CONTENT = bytes(range(256)) * 4


@pytest.fixture
def folder(tmp_path):
    return OwnFolder(tmp_path / "above" / "own", 10_000)


def test_a_file_is_read_as_it_was_written(folder):
    assert folder.read("a") is None
    folder.write("a", CONTENT)
    folder.write("a", CONTENT[::-1])
    folder.write("b", b"")
    assert folder.read("a") == CONTENT[::-1] and folder.read("b") == b""
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert (folder.path / "a").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(folder.path)) == ["a", "b"]  # no temporary file


def test_a_folder_that_others_may_read_becomes_private(tmp_path):
    (tmp_path / "own").mkdir(mode=0o755)
    assert private(tmp_path / "own") is None
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700


def refused(folder, caplog, words):
    """Reading gives nothing, and the log says why."""
    caplog.clear()
    assert folder.read("a") is None
    assert words in caplog.text
    return True


def test_a_folder_that_others_may_write_is_not_used(folder, caplog):
    folder.write("a", CONTENT)
    for mode in (0o770, 0o707):
        folder.path.chmod(mode)
        assert refused(folder, caplog, f"is writable by other users (mode {mode:o})")
        assert "is writable by other users" in (private(folder.path) or "")
        folder.write("b", CONTENT)
    folder.path.chmod(0o700)
    assert folder.read("a") == CONTENT and folder.read("b") is None


def test_a_folder_of_another_user_is_not_used(folder, caplog, monkeypatch):
    folder.write("a", CONTENT)
    own = os.geteuid()
    monkeypatch.setattr(own_folder.os, "geteuid", lambda: own + 1)
    assert refused(folder, caplog, f"the folder belongs to user {own}")
    assert f"belongs to user {own}" in (private(folder.path) or "")


def test_links_are_not_followed(folder, caplog, tmp_path):
    folder.write("a", CONTENT)
    (tmp_path / "link").symlink_to(folder.path)
    assert OwnFolder(tmp_path / "link", 10_000).read("a") is None
    assert private(tmp_path / "link") is not None
    (folder.path / "a").rename(tmp_path / "elsewhere")
    (folder.path / "a").symlink_to(tmp_path / "elsewhere")
    assert refused(folder, caplog, "not used")


def test_a_file_that_others_may_write_is_not_used(folder, caplog):
    folder.write("a", CONTENT)
    (folder.path / "a").chmod(0o622)
    assert refused(folder, caplog, "the file is writable by other users")


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"y" + data,
    lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
], ids=["cut", "longer", "empty", "shifted", "a bit", "a bit of the digest"])
def test_a_damaged_file_is_not_used_and_can_be_written_again(folder, caplog, damage):
    folder.write("a", CONTENT)
    path = folder.path / "a"
    path.write_bytes(damage(path.read_bytes()))
    assert refused(folder, caplog, "damaged")
    folder.write("a", CONTENT)
    assert folder.read("a") == CONTENT


def test_a_file_under_another_name_is_not_used(folder, caplog):
    folder.write("b", CONTENT)
    (folder.path / "b").rename(folder.path / "a")
    assert refused(folder, caplog, "damaged")


def test_a_pipe_does_not_block(folder, caplog):
    folder.write("b", CONTENT)
    os.mkfifo(folder.path / "a", 0o600)
    assert refused(folder, caplog, "not a regular file")


def test_the_least_recently_used_files_are_removed(folder):
    for at, name in enumerate("abc"):
        folder.write(name, b"x" * 3000)
        os.utime(folder.path / name, (at, at))
    assert folder.read("a")  # used last now
    folder.write("d", b"x" * 3000)
    assert sorted(os.listdir(folder.path)) == ["a", "c", "d"]
    assert sum(path.stat().st_size for path in folder.path.iterdir()) <= folder.limit


def test_a_folder_that_cannot_be_made_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    folder = OwnFolder(tmp_path / "file" / "own", 100)
    folder.write("a", CONTENT)
    assert "not written" in caplog.text and folder.read("a") is None


def test_a_file_as_large_as_the_limit_is_kept_and_read(folder, caplog):
    """A file that is one byte larger is neither read nor kept."""
    folder.write("a", CONTENT)
    size = (folder.path / "a").stat().st_size
    assert size == len(CONTENT) + 18 + 32  # the first line and a SHA-256 hash
    assert OwnFolder(folder.path, size).read("a") == CONTENT
    assert OwnFolder(folder.path, size - 1).read("a") is None
    assert "larger than the folder's limit" in caplog.text
    OwnFolder(folder.path, size).write("a", CONTENT)
    assert folder.read("a") == CONTENT
    OwnFolder(folder.path, size - 1).write("a", CONTENT)
    assert folder.read("a") is None and not os.listdir(folder.path)


def test_what_cannot_be_written_is_logged_and_leaves_no_temporary_file(folder, caplog, monkeypatch):
    """The file of an earlier write stays."""
    folder.write("a", CONTENT)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(own_folder.os, "replace", full)
    folder.write("a", CONTENT[::-1])
    assert f"{folder.path / 'a'}: the file was not written (No space left" in caplog.text
    assert os.listdir(folder.path) == ["a"] and folder.read("a") == CONTENT
