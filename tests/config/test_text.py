"""Files that are no config at all: every one a sentence, none a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from orchestrator.config import load_config
from orchestrator.config.text import MAX_FILE_BYTES, read_text
from orchestrator.errors import ConfigError

BILLION_LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "{file}: the file is empty (start from config/minimal.yaml)"),
        (b"# only a comment\n", "{file}: the file is empty (start from config/minimal.yaml)"),
        (b"- a\n- b\n", "{file}:1: the top level is a list (expected keys such as `engines:`)"),
        (b"hello", "{file}:1: the top level is a single value (expected keys such as `engines:`)"),
        (b"run: {\nname: x\n", "{file}:3: this is not YAML: expected ',' or '}', but got '<stream end>'"),
        (b"run:\n\tname: x\n", "{file}:2: this is not YAML: found character '\\t' that cannot start any token (indent"),
        (b"a: 1\n---\nb: 2\n", "{file}:2: this is not YAML: but found another document"),
        (b"run:\n  name: caf\xe9\n", "{file}:2: byte 0xe9 is not UTF-8 (save the file as UTF-8)"),
        (b"run: !!python/object:os.system x\n", "{file}:1: this is not YAML: could not determine a constructor"),
        (b"run: \x01\n", "{file}: this is not YAML: unacceptable character"),
        (b'a: 1\nb: ["\\ud83d\\ude00"]\n', "{file}:2: an escape is half of a character (write \\UXXXXXXXX"),
        (b'"\\ud83d": 1\n', "{file}:1: an escape is half of a character"),
        (b"a: 2024-13-01\n", "{file}: a value does not fit its type: month must be in 1..12 (put it in quotes if"),
        (b"[" * 5000, "{file}: the file is nested more than 50 levels deep"),
        (b"a: " + b"[" * 60 + b"]" * 60, "{file}:1: the file is nested more than 50 levels deep"),
        (b"a: &a [*a]\n", "{file}:1: the file is nested more than 50 levels deep"),
        (BILLION_LAUGHS.encode(), "{file}: the file expands to more than 100000 values; check its aliases"),
        (b"#" * (MAX_FILE_BYTES + 1), "{file}: the file has more than 1048576 bytes; is this a config file?"),
        (b"a: " + b"9" * 5000, "{file}: a value does not fit its type: Exceeds the limit"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_a_file_that_cannot_be_read_as_a_config(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(says.replace("{file}", str(path)))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the config file: No such file or directory"):
        load_config(tmp_path / "away.yaml")
    with pytest.raises(ConfigError, match="cannot read the config file: Is a directory"):
        load_config(tmp_path)


def test_lines_of_keys_items_and_merged_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfbase: &base\n  x: 1\n  y: 2\nown:\n  <<: *base\n  y: 3\nitems:\n- a\n-\n  z: 4\n")
    text = read_text(path)
    assert text.data["own"] == {"x": 1, "y": 3}
    assert text.lines["base", "y"] == 3
    assert text.lines["own", "x"] == 2  # where it is written
    assert text.lines["own", "y"] == 6  # a mapping's own keys win
    assert text.lines["items", 1, "z"] == 10
    assert text.line_of(("items", 1, "away", "deeper")) == 10
    assert text.line_of(("away",)) is None


@settings(deadline=None, max_examples=150)
@given(
    st.one_of(st.binary(max_size=200), st.text(alphabet="ab:- []{}&*!|>'\"#\n\t?,%@1.~<", max_size=80).map(str.encode))
)
@example(b"? [a]: b\n")
@example(b"? {a: b}\n: c\n")
@example(b"a: 2024-99-99\n")
@example(b"a: !!int x\n")
@example(b"a: !!binary x\n")
@example(b"<<: 3\n")
@example(b"<<: [1]\n")
@example(b"%YAML 9.9\n---\na: 1\n")
@example(b"a: !!set {b, c}\n")
@example(b"a: !!timestamp x\n")
@example(b"a: !!float x\n")
@example(b"a: !!bool x\n")
@example(b"&a a: &a b\nc: *d\n")
def test_any_bytes_give_a_config_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:  # no text that short is a config
        load_config(path)
    assert all(problem.message for problem in caught.value.problems)
