"""Text to tokens and back, as vLLM's ``/tokenize`` and ``/detokenize`` do it.

A stream leaves control tokens (such as the end of the sequence) out of its text, ``/detokenize`` writes them out. A
response that was continued would then have another text, and another reward, than one that came in one stream. So
control tokens are found and left out here.

Invariants:

* A token is left out only if the server itself leaves it out: a draw that may fall on that token alone has no text.
* What was found about a token is remembered; a server keeps its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from orchestrator.engines.http.client import EngineHttp
from orchestrator.errors import EngineRejected
from orchestrator.records import Message

from .wire import Choice, Completion, Prompt, Tokens

__all__ = ["Drawn", "OpenAIText"]

BRACKETS: Final = (("<", ">"), ("[", "]"))
"""What pieces of control tokens are written in; only such pieces are looked into."""

MISSING: Final = frozenset({404, 405})


class Drawn(msgspec.Struct):
    """One token that was drawn: ``None`` where the server does not give its id or its log-probability."""

    text: str
    token: int | None
    logprob: float | None


class OpenAIText:
    """See the module's docstring.

    Args:
        http: the server.
    """

    def __init__(self, http: EngineHttp) -> None:
        self._http = http
        self.model: str | None = None
        self._is_control: dict[int, bool] = {}

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids, with the special tokens that a text begins with."""
        return list((await self._tokenize({"prompt": text, "add_special_tokens": add_special})).tokens)

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """Token ids of chat messages; the template writes the special tokens itself, all of them."""
        body = {
            "messages": list(messages),
            "add_generation_prompt": True,
            "add_special_tokens": False,
            "chat_template_kwargs": template_kwargs,
        }
        return list((await self._tokenize(body)).tokens)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text that a stream of these tokens has."""
        text = await self._pieces(tokens)
        if not any(left in text and right in text for left, right in BRACKETS):
            return text
        body = {"prompt": text, "add_special_tokens": False, "return_token_strs": True}
        parsed = await self._tokenize(body)
        bracketed = {
            token
            for token, piece in zip(parsed.tokens, parsed.token_strs or [], strict=False)
            if len(piece) > 2 and (piece[0], piece[-1]) in BRACKETS
        }
        for token in bracketed & set(tokens) - self._is_control.keys():
            self._is_control[token] = not (await self.draw([token], only=token)).text
        plain = [token for token in tokens if not self._is_control.get(token, False)]
        return text if len(plain) == len(tokens) else await self._pieces(plain)

    async def draw(self, prompt: Sequence[int], *, only: int | None = None) -> Drawn:
        """One token after a prompt, ``only`` that one if the server can be told so.

        Raises:
            EngineRejected, EngineUnavailable, EngineStalled: see ``http``.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 1.0,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
        }
        if only is not None:
            body["allowed_token_ids"] = [only]
        completion = await self._http.ask("/v1/completions", Completion, body)
        choice = completion.choices[0] if completion.choices else Choice()
        logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else []
        return Drawn(
            text=choice.text,
            token=choice.token_ids[0] if choice.token_ids else None,
            logprob=logprobs[0] if logprobs else None,
        )

    async def _tokenize(self, body: dict[str, Any]) -> Tokens:
        try:
            return await self._http.ask("/tokenize", Tokens, body | {"model": self.model})
        except EngineRejected as error:
            raise self._explained(error, "/tokenize") from error

    async def _pieces(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        try:
            answer = await self._http.ask("/detokenize", Prompt, {"model": self.model, "tokens": list(tokens)})
        except EngineRejected as error:
            raise self._explained(error, "/detokenize") from error
        return answer.prompt

    def _explained(self, error: EngineRejected, path: str) -> EngineRejected:
        if error.data.get("status") not in MISSING:
            return error
        advice = f"it has no {path} like vLLM's, and cannot be used without it"
        return EngineRejected(self._http.name, f"{advice} ({error.message})", data=error.data)
