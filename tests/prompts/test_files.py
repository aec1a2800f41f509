"""Prompt sources: what opens, what it gives, and what is said of files that do not open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import PromptFileError
from orchestrator.prompts import PromptSource
from orchestrator.prompts.jsonl import MAX_LINE_BYTES
from orchestrator.records import Prompt
from tests.support.specs import load_prompts, open_prompts

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=2)
    return path


def read(source: PromptSource, row: int, epoch: int = 0) -> Prompt:
    """Files are read without leaving the loop, and so without one."""
    try:
        source.read(row, epoch).send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits for something")


def read_all(source: PromptSource) -> list[Prompt]:
    return [read(source, row) for row in range(len(source))]


WRITERS = pytest.mark.parametrize(
    ("write", "suffix"), [(write_jsonl, "jsonl"), (write_parquet, "parquet")], ids=["jsonl", "parquet"]
)


# -- the same for every format ----------------------------------------------------------------------------------------


@WRITERS
async def test_a_source_gives_what_its_file_says(write: Any, suffix: str, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{n}+1?", "label": str(n + 1), "metadata": {"level": n}, "unused": [1, 2], "other": b"".hex()}
        for n in range(7)
    ]
    source = await open_prompts(name="easy", path=write(tmp_path / f"easy.{suffix}", *rows), epochs=3)
    assert (source.name, source.epochs, len(source)) == ("easy", 3, 7)
    order = [source.row_at(2, position) for position in range(7)]
    assert sorted(order) == list(range(7))
    for row in order:
        assert await source.read(row, 2) == Prompt("easy", row, 2, f"{row}+1?", str(row + 1), {"level": row})


@WRITERS
def test_chat_messages(write: Any, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"chat.{suffix}", {"prompt": CHAT}, {"prompt": CHAT[1:]})
    first, second = read_all(load_prompts(name="chat", path=path))
    assert (first.content, first.tokens, second.content) == (CHAT, None, CHAT[1:])


@WRITERS
def test_nulls_of_a_fixed_schema_are_not_part_of_a_message(write: Any, suffix: str, tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
    path = write(tmp_path / f"chat.{suffix}", {"prompt": [{**CHAT[1], "tool_calls": None}, call]})
    assert read(load_prompts(name="chat", path=path), 0, 0).content == [CHAT[1], call]


@WRITERS
def test_token_ids(write: Any, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"ids.{suffix}", {"prompt": [5, 0, 2**31 - 1]})
    prompt = read(load_prompts(name="ids", path=path), 0, 0)
    assert (list(prompt.tokens or ()), prompt.content) == ([5, 0, 2**31 - 1], None)


@WRITERS
def test_labels_and_metadata_may_be_missing_unless_they_are_named(write: Any, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"bare.{suffix}", {"prompt": "a", "answer": 1, "info": {"x": 1}})
    prompt = read(load_prompts(name="bare", path=path), 0, 0)
    assert (prompt.label, prompt.metadata) == (None, {})
    prompt = read(load_prompts(name="bare", path=path, label_key="answer", metadata_key="info"), 0, 0)
    assert (prompt.label, prompt.metadata) == (1, {"x": 1})
    for keys in ({"label_key": "label"}, {"metadata_key": "metadata"}, {"input_key": "text"}):
        with pytest.raises(PromptFileError, match=rf"bare\.{suffix}.*no key '\w+'.*'prompt', 'answer', 'info'"):
            load_prompts(name="bare", path=path, **keys)


@WRITERS
def test_rows_may_bound_their_responses(write: Any, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"bounds.{suffix}", {"prompt": "a", "most": 3}, {"prompt": "b", "most": 9})
    source = load_prompts(name="bounds", path=path, max_new_tokens_key="most")
    assert [read(source, row, 0).max_new_tokens for row in range(2)] == [3, 9]
    assert read(load_prompts(name="bounds", path=path), 0, 0).max_new_tokens is None
    for bad in (0, "3", None, 1.5):
        path = write(tmp_path / f"bad.{suffix}", {"prompt": "a", "most": bad})
        with pytest.raises(PromptFileError, match=r"'most' is .*a whole number of at least 1"):
            load_prompts(name="bad", path=path, max_new_tokens_key="most")


@WRITERS
def test_the_order_of_the_file_without_shuffling(write: Any, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"x.{suffix}", *({"prompt": str(n)} for n in range(9)))
    source = load_prompts(name="x", path=path, shuffle=False)
    assert [read(source, source.row_at(1, n), 1).content for n in range(9)] == [str(n) for n in range(9)]


@WRITERS
@pytest.mark.parametrize("row", [-1, 2])
def test_rows_that_are_not_there(write: Any, suffix: str, tmp_path: Path, row: int) -> None:
    path = write(tmp_path / f"x.{suffix}", {"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(IndexError, match="only rows 0 to 1"):
        read(load_prompts(name="x", path=path), row, 0)


BAD_PROMPTS = [
    ("", "'prompt' is empty"),
    (None, "'prompt' is null"),
    (3, "'prompt' is a number"),
    ([], "'prompt' is empty"),
    ([1, -1], r"'prompt'\[1\] is not a token id"),
    ([1, 2**31], r"'prompt'\[1\] is not a token id"),
    (["a"], "a list that starts with a string"),
    ([{"content": "x"}], r"'prompt'\[0\] needs a 'role'"),
    ([{"role": "user", "content": 1}], "expected a string, a list of parts or null"),
]


@WRITERS
@pytest.mark.parametrize(("prompt", "said"), BAD_PROMPTS)
def test_what_is_not_a_prompt(write: Any, suffix: str, tmp_path: Path, prompt: Any, said: str) -> None:
    with pytest.raises(PromptFileError, match=said):
        load_prompts(name="bad", path=write(tmp_path / f"bad.{suffix}", {"prompt": prompt}))


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({"role": "user"}, "'prompt' is an object"),
        (True, "'prompt' is a boolean"),
        ([1, True], r"'prompt'\[1\] is not a token id"),
        ([1, 2.0], r"'prompt'\[1\] is not a token id"),
        ([{"role": "user"}], r"'prompt'\[0\] has no 'content'; its keys are 'role'"),
        ([{"role": "user", "content": "x"}, "y"], r"'prompt'\[1\] is a string"),
    ],
)
def test_what_is_not_a_prompt_in_json(tmp_path: Path, prompt: Any, said: str) -> None:
    with pytest.raises(PromptFileError, match=said):
        load_prompts(name="bad", path=write_jsonl(tmp_path / "bad.jsonl", {"prompt": prompt}))


@WRITERS
def test_at_most_twenty_bad_rows_are_named(write: Any, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"bad.{suffix}", *({"prompt": ""} for _ in range(30)))
    with pytest.raises(PromptFileError) as caught:
        load_prompts(name="bad", path=path)
    lines = caught.value.message.splitlines()
    assert [line.endswith("'prompt' is empty") for line in lines] == [True] * 20 + [False]
    assert "stopped reading after 20 bad" in lines[20]


async def test_opening_in_the_loop_says_the_same(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match="No such file"):
        await open_prompts(name="x", path=tmp_path / "absent.jsonl")


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet"])
def test_a_file_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(PromptFileError, match=rf"cannot read .*{name}: .*No such file"):
        load_prompts(name="x", path=tmp_path / name)


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(PromptFileError, match="Is a directory"):
        load_prompts(name="x", path=tmp_path / "dir.jsonl")


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x", "x.jsonl.gz"])
def test_unknown_formats_are_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text('{"prompt": "a"}\n')
    with pytest.raises(ValueError, match=r"the known ones are \.jsonl, \.parquet"):
        load_prompts(name="x", path=path)


@pytest.mark.parametrize("epochs", [0, -1])
def test_epochs_begin_at_one(tmp_path: Path, epochs: int) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        load_prompts(name="x", path=write_jsonl(tmp_path / "x.jsonl", {"prompt": "a"}), epochs=epochs)


# -- JSON lines -------------------------------------------------------------------------------------------------------


def test_blank_lines_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "x.JSONL"
    path.write_bytes(b'\xef\xbb\xbf\n{"prompt": "a"}\r\n  \n\n {"prompt": "b"} \n\n{"prompt": "c\xc3\xa9"}')
    assert [prompt.content for prompt in read_all(load_prompts(name="x", path=path))] == ["a", "b", "cé"]


def test_bad_lines_are_all_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'{"prompt": "good"}\n\n{"prompt": \n[1]\n{"prompt": "\xff"}\n{"text": "a"}\n'
        b'{"prompt": "a", "metadata": "{}"}\n{"prompt": NaN}\nnull\n{"prompt": "good"}\n'
    )
    with pytest.raises(PromptFileError) as caught:
        load_prompts(name="bad", path=path)
    lines = caught.value.message.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in (3, 4, 5, 6, 7, 8, 9)]
    for line, said in zip(
        lines,
        [
            "not JSON",
            "expected an object, got a list",
            "not JSON",
            "no key 'prompt'",
            "'metadata' is a string",
            "not JSON",
            "got null",
        ],
        strict=True,
    ):
        assert said in line


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_bytes(content)
    with pytest.raises(PromptFileError, match="is empty"):
        load_prompts(name="x", path=path)


def test_nesting_that_could_not_be_written_again_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    path.write_text('{"prompt": "a", "label": ' + "[" * 500 + "]" * 500 + "}\n")
    with pytest.raises(PromptFileError, match="'label' cannot be written as JSON"):
        load_prompts(name="x", path=path)


def test_lines_up_to_the_limit_and_not_beyond(tmp_path: Path) -> None:
    frame = len('{"prompt": ""}')
    longest = '{"prompt": "' + "x" * (MAX_LINE_BYTES - frame) + '"}'
    path = tmp_path / "long.jsonl"
    path.write_text(f'{longest}\n{{"prompt": "a"}}\n')
    assert [len(str(prompt.content)) for prompt in read_all(load_prompts(name="x", path=path))] == [
        MAX_LINE_BYTES - frame,
        1,
    ]
    for too_long in (longest.replace("x", "xx", 1), longest + longest + longest):
        path.write_text(f'{{"prompt": "a"}}\n{too_long}\nbad\n')
        with pytest.raises(PromptFileError) as caught:
            load_prompts(name="x", path=path)
        first, second = caught.value.message.splitlines()
        assert first == f"{path}:2: the line is longer than {MAX_LINE_BYTES} bytes"
        assert second.startswith(f"{path}:3: not JSON")


def test_a_blank_line_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "blank.jsonl"
    path.write_text(" " * (2 * MAX_LINE_BYTES) + '\n{"prompt": "a"}\n')
    with pytest.raises(PromptFileError, match=r"blank\.jsonl:1: "):
        load_prompts(name="x", path=path)


def test_a_file_renamed_over_it_changes_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "old"})
    source = load_prompts(name="x", path=path)
    os.replace(write_jsonl(tmp_path / "new.jsonl", {"prompt": "new"}), path)
    assert read(source, 0).content == "old"


def test_appended_rows_are_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a"}')
    source = load_prompts(name="x", path=path)
    with path.open("a") as file:
        file.write('\n{"prompt": "b"}\n')
    assert (len(source), read(source, 0).content) == (1, "a")


@pytest.mark.parametrize("now", ["", '{"prompt": "a"}\n{"prompt": "b"}\n', '{"prompt": "b"}\n', '{"prompt"'])
def test_a_row_that_has_changed_is_an_error_and_not_another_prompt(tmp_path: Path, now: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "a"}, {"prompt": "a"})
    source = load_prompts(name="x", path=path)
    path.write_text(now)
    with pytest.raises(PromptFileError, match=r"row 1 .* has changed since the file was opened"):
        read(source, 1)


def test_a_source_lets_go_of_its_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", {"prompt": "a"})
    before = len(os.listdir("/proc/self/fd"))
    sources = [load_prompts(name="x", path=path) for _ in range(5)]
    assert len(os.listdir("/proc/self/fd")) == before + 5
    sources.clear()
    assert len(os.listdir("/proc/self/fd")) == before


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": st.text(min_size=1) | st.lists(st.integers(0, 2**31 - 1), min_size=1)},
            optional={"label": JSON, "metadata": st.dictionaries(st.text(max_size=3), JSON, max_size=3)},
        ),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["\n", "\r\n", "\n\n \n"]),
)
def test_whatever_json_can_say_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], line_end: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(line_end.join(json.dumps(row) for row in rows).encode())
    for row, prompt in zip(rows, read_all(load_prompts(name="x", path=path)), strict=True):
        content = prompt.content if prompt.tokens is None else list(prompt.tokens)
        assert (content, prompt.label, prompt.metadata) == (row["prompt"], row.get("label"), row.get("metadata", {}))


# -- Parquet ----------------------------------------------------------------------------------------------------------


def test_metadata_as_a_string_of_json(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"prompt": "a", "metadata": '{"x": [1]}'}, {"prompt": "b"})
    assert [prompt.metadata for prompt in read_all(load_prompts(name="x", path=path))] == [{"x": [1]}, {}]


def test_bad_rows_are_all_named_by_file_and_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "metadata": text} for text in ("{}", "{", "[1]", "{}", None)]
    path = write_parquet(tmp_path / "bad.parquet", *rows, {"prompt": None})
    with pytest.raises(PromptFileError) as caught:
        load_prompts(name="bad", path=path)
    lines = caught.value.message.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [[str(path), f"row {row}"] for row in (1, 2, 5)]


def test_what_json_cannot_say_is_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"prompt": "a", "label": b"\x00"})
    with pytest.raises(PromptFileError, match="row 0: 'label' cannot be written as JSON"):
        load_prompts(name="x", path=path)


def test_columns_that_no_prompt_takes_are_not_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"prompt": "a", "label": "b", "image": b"\x00" * 100_000})
    source = load_prompts(name="x", path=path)
    assert source._rows._table.column_names == ["prompt", "label"]  # type: ignore[attr-defined]


def test_a_parquet_file_without_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), tmp_path / "x.parquet")
    with pytest.raises(PromptFileError, match="no rows"):
        load_prompts(name="x", path=tmp_path / "x.parquet")


def test_what_is_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("prompt\n")
    with pytest.raises(PromptFileError, match="not a Parquet file"):
        load_prompts(name="x", path=tmp_path / "x.parquet")


def test_pyarrow_is_needed_for_parquet_alone(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", {"prompt": "a"})
    write_parquet(tmp_path / "x.parquet", {"prompt": "a"})
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"  # what an import of a missing package looks like
        "from pathlib import Path; from tests.support.specs import load_prompts\n"
        f"here = Path({str(tmp_path)!r})\n"
        "import asyncio; source = load_prompts(name='x', path=here / 'x.jsonl')\n"
        "print(asyncio.run(source.read(0, 0)).content)\n"
        "load_prompts(name='x', path=here / 'x.parquet')\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.stdout == "a\n"
    assert "PromptFileError" in answer.stderr
    assert "pip install 'rollout-orchestrator[prompts]'" in answer.stderr
