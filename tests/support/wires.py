"""Every adapter that speaks HTTP, as what a proper server of its kind would say: to be broken by tests.

A *wire* makes an adapter, the replies of a server that is well, and the events of a response of any tokens; each token
has the log-probability -0.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.engines import Engine, GenerationRequest
from orchestrator.engines.llamacpp.engine import LlamaCppEngine
from orchestrator.engines.openai.chat import OpenAIChat
from orchestrator.engines.openai.tokens import OpenAITokens
from orchestrator.engines.sglang.engine import SGLangEngine
from tests.support.engine_pools import request
from tests.support.http_faults import WELL, Reply, answer, end_event, token_event

PROMPT = [1, 2, 3]
MESSAGES = [{"role": "user", "content": "Say something."}]
MODELS = answer({"data": [{"id": "m", "max_model_len": 512}]})


@dataclass(frozen=True)
class Wire:
    """``path`` is that of generations; ``events_of`` gives one event a token and the last one.

    ``drawn`` is the answer to the question by which a probe tries the server, on the same path. ``asked_tokens`` gives
    the token ids that a request went on from. A wire that is ``text_only`` hands over no tokens.
    """

    name: str
    make: Callable[[str], Engine]
    path: str
    events_of: Callable[[Sequence[int]], list[Any]]
    error_of: Callable[[int, str], Any]
    well: dict[str, Sequence[Reply]]
    asked_tokens: Callable[[dict[str, Any]], list[int]]
    drawn: Reply | None = None
    text_only: bool = False

    def request(self, n: int = 16) -> GenerationRequest:
        asked = request([] if self.text_only else PROMPT, n=n)
        if not self.text_only:
            return asked
        return GenerationRequest("0", [], n, asked.sampling, seed=0, messages=MESSAGES)

    def replies(self, *generations: Reply, probed: bool = False) -> dict[str, Any]:
        """A server that is well but for these; ``probed``: it is asked the question of a probe before."""
        first = [self.drawn] if probed and self.drawn is not None else []
        return {path.removeprefix("/"): row for path, row in self.well.items()} | {
            self.path.removeprefix("/"): [*first, *generations]
        }


def _llamacpp_events(tokens: Sequence[int]) -> list[Any]:
    events = [token_event(token, nth) for nth, token in enumerate(tokens, 1)]
    return [*events, end_event(len(tokens))]


def _sglang_events(tokens: Sequence[int], *, incremental: bool) -> list[Any]:
    def event(upto: int, finish: dict[str, str] | None) -> dict[str, Any]:
        begin = max(0, upto - 1) if incremental else 0
        begin = upto if incremental and finish else begin
        entries = [[-0.5, token, None] for token in tokens[begin:upto]]
        meta = {"completion_tokens": upto, "output_token_logprobs": entries, "finish_reason": finish}
        return {"text": bytes(tokens[begin:upto]).decode(), "meta_info": meta}

    return [*(event(n, None) for n in range(1, len(tokens) + 1)), event(len(tokens), {"type": "stop"})]


def _vllm_event(tokens: Sequence[int], reason: str | None = None) -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.5] * len(tokens)}
    choice = {"text": bytes(tokens).decode(), "token_ids": list(tokens), "logprobs": logprobs, "finish_reason": reason}
    return {"choices": [choice]}


def _vllm_events(tokens: Sequence[int]) -> list[Any]:
    return [*(_vllm_event([token]) for token in tokens), _vllm_event([], "stop")]


def _chat_events(tokens: Sequence[int]) -> list[Any]:
    events = [{"choices": [{"delta": {"content": chr(token)}, "finish_reason": None}]} for token in tokens]
    return [*events, {"choices": [{"delta": {}, "finish_reason": "stop"}]}]


def _error(status: int, message: str) -> Any:
    return {"error": {"message": message, "code": status}}


def _sglang_error(status: int, message: str) -> Any:
    finish = {"type": "abort", "status_code": status, "message": message}
    return {"text": "", "meta_info": {"finish_reason": finish}}


SGLANG_WELL: dict[str, Sequence[Reply]] = {
    "/health": (answer({}),),
    "/model_info": (answer({"model_path": "m", "weight_version": "default"}),),
    "/v1/models": (MODELS,),
    "/tokenize": (answer({"tokens": [1, 2, 3]}),),
    "/detokenize": (answer({"text": "text"}),),
    "/abort_request": (answer({}),),
}
VLLM_WELL: dict[str, Sequence[Reply]] = {
    "/health": (answer({}),),
    "/v1/models": (MODELS,),
    "/tokenize": (answer({"tokens": [1, 2, 3]}),),
    "/detokenize": (answer({"prompt": "text"}),),
}

WIRES = [
    Wire(
        "llamacpp",
        lambda url: LlamaCppEngine(name="faulty", url=url),
        "/completion",
        _llamacpp_events,
        _error,
        dict(WELL),
        lambda body: list(body["prompt"]),
    ),
    *(
        Wire(
            f"sglang {how}",
            lambda url: SGLangEngine(name="faulty", url=url),
            "/generate",
            lambda tokens, how=how: _sglang_events(tokens, incremental=how == "incremental"),  # type: ignore[misc]
            _sglang_error,
            SGLANG_WELL,
            lambda body: list(body["input_ids"]),
        )
        for how in ("cumulative", "incremental")
    ),
    *(
        Wire(
            dialect,
            lambda url, dialect=dialect: OpenAITokens(name="faulty", url=url, dialect=dialect),  # type: ignore[misc]
            "/v1/completions",
            _vllm_events,
            _error,
            VLLM_WELL,
            lambda body: list(body["prompt"]),
            answer(_vllm_event([3], "length")),
        )
        for dialect in ("vllm", "generic")
    ),
    Wire(
        "chat",
        lambda url: OpenAIChat(name="faulty", url=url),
        "/v1/chat/completions",
        _chat_events,
        _error,
        {"/v1/models": (MODELS,)},
        lambda body: [],
        answer({"choices": [{"message": {"content": "x"}}]}),
        text_only=True,
    ),
]
