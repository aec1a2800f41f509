"""Text to tokens and back, as a llama.cpp server does it.

A stream leaves control tokens (such as the end of the sequence) out of its text, ``/detokenize`` writes them out as
``<|end|>`` and the like. A response that was continued would then have another text, and another reward, than one that
came in one stream. So control tokens are found and left out here.

Invariants:

* A token is left out only if the server itself knows its piece as a control token: the piece becomes that very id where
  special tokens are parsed, and something else where they are not.
* What was found about a token is remembered; a server keeps its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.engines.http.client import EngineHttp
from orchestrator.records import Message

from .wire import Content, Prompt, Tokens

__all__ = ["LlamaCppText"]


class LlamaCppText:
    """See the module's docstring.

    Args:
        http: the server.
    """

    def __init__(self, http: EngineHttp) -> None:
        self._http = http
        self._is_control: dict[int, bool] = {}

    async def tokenize(self, text: str) -> list[int]:
        """Token ids, with the special tokens that a text begins with; what looks like one in the text is text."""
        return await self._tokenize(text, add_special=True, parse_special=False)

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """``/apply-template``, then ``/tokenize``; the template writes the special tokens itself, all of them."""
        body = {"messages": list(messages), "chat_template_kwargs": template_kwargs}
        prompt = (await self._http.ask("/apply-template", Prompt, body)).prompt
        return await self._tokenize(prompt, add_special=False, parse_special=True)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text that a stream of these tokens has."""
        while True:
            tokens = [token for token in tokens if not self._is_control.get(token, False)]
            text = await self._pieces(tokens)
            with_special = await self._tokenize(text, add_special=False, parse_special=True)
            without = await self._tokenize(text, add_special=False, parse_special=False)
            suspects = (set(with_special) - set(without)) & set(tokens) - self._is_control.keys()
            if not suspects:
                return text
            for token in suspects:
                self._is_control[token] = await self._is_control_token(token)

    async def special(self, piece: str) -> int | None:
        """The token that a piece is written for as a whole; ``None``: there is none."""
        tokens = await self._tokenize(piece, add_special=False, parse_special=True)
        return tokens[0] if len(tokens) == 1 else None

    async def _is_control_token(self, token: int) -> bool:
        piece = await self._pieces([token])
        with_special = await self._tokenize(piece, add_special=False, parse_special=True)
        without = await self._tokenize(piece, add_special=False, parse_special=False)
        return with_special == [token] != without

    async def _pieces(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        return (await self._http.ask("/detokenize", Content, {"tokens": list(tokens)})).content

    async def _tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": parse_special}
        return list((await self._http.ask("/tokenize", Tokens, body)).tokens)
