"""The run's own tokenizer: real tokenizer files, real worker processes, a real llama.cpp server that has to agree."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers.models import BPE

from orchestrator.engines.embedded.tiny_model import CHAT_TEMPLATE, byte_symbols
from orchestrator.errors import TokenizerError
from orchestrator.tokenizer import PromptTokenizer, find_problem, prompt_tokenizer
from tests.support.daemon_process import daemon, write_config

CHAT = [{"role": "system", "content": "Größe"}, {"role": "user", "content": "1+1"}]
RENDERED = "<system>Größe\n<user>1+1\n<assistant>"


def write_tokenizer(folder: Path, *, shift: int = 0, **settings: Any) -> Path:
    """One whose token ids are bytes, as those of the tiny model are, or bytes and ``shift``."""
    folder.mkdir()
    vocabulary = {symbol: (byte + shift) % 256 for byte, symbol in enumerate(byte_symbols())}
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@asynccontextmanager
async def opened(path: Path, template: str | None = None, *, generation: bool = True) -> AsyncIterator[PromptTokenizer]:
    tokenizer = await PromptTokenizer.open(path, chat_template=template, add_generation_prompt=generation)
    try:
        yield tokenizer
    finally:
        await tokenizer.aclose()


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode()


async def test_texts_and_chats_become_token_ids(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t", chat_template=CHAT_TEMPLATE)
    async with opened(folder) as tokenizer:
        assert text_of(await tokenizer.tokenize("Größe 東京")) == "Größe 東京"
        assert text_of(await tokenizer.tokenize_chat(CHAT, {})) == RENDERED
    async with opened(folder / "tokenizer.json", generation=False) as tokenizer:
        assert text_of(await tokenizer.tokenize_chat(CHAT, {})) == RENDERED.removesuffix("<assistant>")


async def test_a_file_that_cuts_and_pads_does_neither_to_prompts(tmp_path: Path) -> None:
    """A tokenizer.json keeps the truncation and padding that its maker last used, and the library applies them."""
    folder = write_tokenizer(tmp_path / "t")
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(max_length=4)
    saved.enable_padding(length=16, pad_id=0)
    saved.save(str(folder / "tokenizer.json"))
    async with opened(folder) as tokenizer:
        assert text_of(await tokenizer.tokenize("a longer prompt than four")) == "a longer prompt than four"
        assert text_of(await tokenizer.tokenize("ab")) == "ab"


@pytest.mark.parametrize(
    ("template", "kwargs", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", {}, "<s>Größe1+1"),
        ("{% if think is defined and not think %}quick{% endif %}", {"think": False}, "quick"),
        ("{{ messages[0] | tojson }}", {}, '{"role": "system", "content": "Größe"}'),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", {}, "system"),
    ],
)
async def test_templates_have_what_they_are_written_for(
    tmp_path: Path, template: str, kwargs: dict[str, Any], expected: str
) -> None:
    folder = write_tokenizer(tmp_path / "t", bos_token={"content": "<s>"}, chat_template="not this one")
    async with opened(folder, template) as tokenizer:
        assert text_of(await tokenizer.tokenize_chat(CHAT, kwargs)) == expected


@pytest.mark.parametrize("place", ["file", "default of several"])
async def test_the_template_is_found_where_libraries_put_it(tmp_path: Path, place: str) -> None:
    several = [{"name": "tools", "template": "wrong"}, {"name": "default", "template": CHAT_TEMPLATE}]
    folder = write_tokenizer(tmp_path / "t", chat_template="wrong" if place == "file" else several)
    if place == "file":
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    async with opened(folder) as tokenizer:
        assert text_of(await tokenizer.tokenize_chat(CHAT, {})) == RENDERED


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange too big"),
        (None, "no chat template"),
    ],
)
async def test_what_a_template_may_not_or_will_not_do_costs_its_prompt_alone(
    tmp_path: Path, template: str | None, says: str
) -> None:
    async with opened(write_tokenizer(tmp_path / "t"), template) as tokenizer:
        with pytest.raises(TokenizerError, match=says):
            await tokenizer.tokenize_chat(CHAT, {})
        assert text_of(await tokenizer.tokenize("next")) == "next"


async def test_a_template_without_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_tokenizer, "CALL_TIMEOUT_S", 1.0)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    async with opened(write_tokenizer(tmp_path / "t"), endless) as tokenizer:
        with pytest.raises(TokenizerError, match="no answer within 1 s"):
            await tokenizer.tokenize_chat(CHAT, {})
        assert text_of(await tokenizer.tokenize("next")) == "next"


async def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "t")
    assert find_problem(folder) is None
    (folder / "tokenizer_config.json").write_text("[]")
    assert "is not a JSON object" in (find_problem(folder) or "")
    assert "gone/tokenizer.json does not exist" in (find_problem(tmp_path / "gone") or "")
    for damage in ("{}", "no JSON"):
        (write_tokenizer(tmp_path / damage) / "tokenizer.json").write_text(damage)
        with pytest.raises(TokenizerError, match="cannot load the tokenizer"):
            async with opened(tmp_path / damage):
                pass
    with pytest.raises(TokenizerError, match="cannot load the tokenizer"):
        async with opened(write_tokenizer(tmp_path / "template"), "{% if %}"):
            pass


def write_chats(path: Path) -> None:
    path.write_text("".join(json.dumps({"prompt": CHAT, "label": str(row)}) + "\n" for row in range(20)))


def test_a_daemon_and_a_real_server_agree_on_what_it_says(tmp_path: Path) -> None:
    for name in ("easy", "hard"):
        write_chats(tmp_path / f"{name}.jsonl")
    write_tokenizer(tmp_path / "t")
    template = CHAT_TEMPLATE.replace("<assistant>", "<reply>")
    config = write_config(
        tmp_path,
        engines=[{"kind": "embedded", "slots": 2, "context_tokens": 256, "threads": 1}],
        tokenizer={"path": "t", "chat_template": template},
    )
    with daemon(config) as process, process.connect() as client:
        batch = client.get_batch(timeout_s=30)
        prompts = {bytes(group.prompt_tokens.tolist()).decode() for group in batch.groups}
        assert prompts == {RENDERED.replace("<assistant>", "<reply>")}
        assert all(group.response_tokens.size for group in batch.groups)


def test_a_tokenizer_of_another_model_is_found_before_anything_is_generated(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "t", shift=1)
    config = write_config(
        tmp_path,
        engines=[{"kind": "embedded", "slots": 2, "context_tokens": 256, "threads": 1}],
        tokenizer={"path": "t"},
    )
    with daemon(config) as process:
        assert process.wait() == 1
        assert "differ from those of the tokenizer of the config" in process.stderr
