"""Tests runtime/checked_json: a file that cannot be read is one line that names it."""

import os
import re

import pytest

from tocom.runtime import checked_json
from tocom.runtime.checked_json import AbsentError, Json, read
from tocom.runtime.errors import InputError


def test_it_gives_what_is_made_of_the_file(tmp_path):
    (tmp_path / "a.json").write_text('\ufeff{"a": [1, 2.5]}')
    assert read(tmp_path / "a.json", lambda value: value["a"]) == [1, 2.5]


@pytest.mark.parametrize("name", ["missing.json", "file/below.json"])
def test_a_missing_file_is_told_apart(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(AbsentError, match=f"there is no .*{name}"):
        read(tmp_path / name, lambda value: value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is not JSON"),
        (b"\x80", "cannot be read"),
        (b'{"a": Infinity}', "Infinity is not a JSON number"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[]", "the file must be an object, got []"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_the_files_name(tmp_path, content, words):
    file = tmp_path / "a\nb.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)) as refused:
        read(file, lambda value: Json(value, "").key("a"))
    assert str(refused.value).isprintable() and r"a\nb.json" in str(refused.value)
    assert not isinstance(refused.value, AbsentError)


def test_deep_values_that_are_walked_are_refused(tmp_path):
    (tmp_path / "a.json").write_text("[" * 900 + "]" * 900)

    def walk(value):
        return [walk(item) for item in value] + walk(value)

    with pytest.raises(InputError, match="a.json: it is nested too deeply"):
        read(tmp_path / "a.json", walk)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(InputError, match="cannot be read: it is not a file"):
            read(tmp_path / name, lambda value: value)
    with pytest.raises(InputError):
        read(tmp_path / "\0", lambda value: value)


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(checked_json, "LARGEST_FILE", 1 << 20)
    (tmp_path / "a.json").write_text(" " * (1 << 20) + "1")
    with pytest.raises(InputError, match="must not be larger than 1 MiB"):
        read(tmp_path / "a.json", lambda value: value)
