"""SGLang: ``/generate`` by token ids, streamed.

Log-probabilities are of the distribution after temperature and before truncation, which is what the server gives; a
server that runs with ``SGLANG_RETURN_ORIGINAL_LOGPROB=1`` gives raw ones, and the config has to say ``logprobs: raw``.

The events of a stream repeat everything so far, unless the server runs with ``--incremental-streaming-output``; both
are understood (``stream``).

Invariants:

* What was streamed is handed over as it arrives, each token with its log-probability, and nothing twice.
* A generation that is left before its end is aborted by its own id as well as by closing the connection. The server
  aborts all ids that *begin* with the one it is told: ours are all of the same length, so that none begins another, and
  never empty.
* An aborted generation keeps what it had, and what the server then says that it had generated and not sent yet (with a
  large ``--stream-interval`` that is much); that is waited for ``ABORT_DEADLINE_S`` at most.
* No retries here; errors are those of ``http``.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final, Literal

import anyio
import msgspec
from anyio.abc import TaskStatus

from orchestrator.engines.http.client import EngineHttp, TokenId
from orchestrator.engines.http.instance import ProcessStart
from orchestrator.engines.http.parameters import NO_SUCH_PATH
from orchestrator.engines.port import (
    EngineInfo,
    GenerationEnd,
    GenerationRequest,
    ParameterUpdate,
    SamplingParams,
    TokenSink,
)
from orchestrator.errors import EngineError, EngineRejected, EngineUnavailable
from orchestrator.records import Message

from .abort import ABORT_DEADLINE_S, Abort
from .parameters import update_sglang_parameters
from .stream import Event, Reader

__all__ = ["SGLangEngine"]

LARGEST_SEED: Final = 0x7FFFFFFF
"""Seeds of a batch are held in one array of integers, in some versions of 4 bytes."""

NOT_UNDERSTOOD: Final = NO_SUCH_PATH | {400, 422}


class _ModelInfo(msgspec.Struct):
    model_path: str
    weight_version: str | int | None = None


class _Model(msgspec.Struct):
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Tokens(msgspec.Struct):
    tokens: list[TokenId]


class _Text(msgspec.Struct):
    text: str


class SGLangEngine:
    """See the module's docstring.

    Args:
        name: unique among the engines.
        url: ``http://host:port``.
        max_in_flight: requests at a time; the server queues what it does not run.
        logprobs: ``temperature``, or ``raw`` for a server with ``SGLANG_RETURN_ORIGINAL_LOGPROB=1``.
        api_key_env: environment variable with the key of the server.
        connect_timeout_s: to connect.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        max_in_flight: int = 256,
        logprobs: Literal["temperature", "raw"] = "temperature",
        api_key_env: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self._logprobs: Literal["temperature", "raw"] = logprobs
        self._http = EngineHttp(
            name=name,
            url=url,
            kind="SGLang server",
            max_streams=max_in_flight,
            connect_timeout_s=connect_timeout_s,
            api_key_env=api_key_env,
            keeps_connections=True,
        )
        self._start = ProcessStart(self._http)
        self._context_tokens: int | None = None
        self._end_ids: set[int] = set()

    # -- the port ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Nothing to own."""
        task_status.started()

    async def probe(self) -> EngineInfo:
        """Health, model, version and start; raises ``EngineUnavailable`` or ``EngineStalled``."""
        try:
            await self._http.ask_raw("/health")
            info = await self._model_info()
            models = await self._http.ask("/v1/models", _Models)
        except EngineRejected as error:
            raise EngineUnavailable(self.name, f"it is not an SGLang server: {error.message}") from error
        self._context_tokens = models.data[0].max_model_len if models.data else None
        version = str(info.weight_version)
        return EngineInfo(
            model=info.model_path,
            context_tokens=self._context_tokens,
            policy_version=int(version) if version.isascii() and version.isdecimal() else None,
            instance=await self._start.ask(),
            logprobs=self._logprobs,
            end_ids=tuple(sorted(self._end_ids)),
        )

    async def _model_info(self) -> _ModelInfo:
        try:
            return await self._http.ask("/model_info", _ModelInfo)
        except EngineRejected as error:
            if error.data.get("status") != 404:
                raise
        return await self._http.ask("/get_model_info", _ModelInfo)  # its name in older versions

    def supports(self, sampling: SamplingParams) -> str | None:
        """Why these parameters cannot be used with these log-probabilities: there is no such reason."""
        return None

    async def tokenize(self, text: str) -> list[int]:
        """``/tokenize``, with the special tokens that a text begins with."""
        with self._explained(
            NO_SUCH_PATH, "its version has no /tokenize: update the server, or give prompts as token ids"
        ):
            return await self._tokenize({"prompt": text, "add_special_tokens": True})

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """``/tokenize`` of ``messages``, which not all versions know."""
        body = {
            "messages": list(messages),
            "add_generation_prompt": True,
            "add_special_tokens": False,
            "chat_template_kwargs": template_kwargs,
        }
        with self._explained(NOT_UNDERSTOOD, "it cannot apply a chat template: give prompts as text or as token ids"):
            return await self._tokenize(body)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """``/detokenize``, without control tokens."""
        body = {"tokens": list(tokens), "skip_special_tokens": True}
        with self._explained(NO_SUCH_PATH, "its version has no /detokenize: update the server"):
            return (await self._http.ask("/detokenize", _Text, body)).text

    async def _tokenize(self, body: dict[str, Any]) -> list[int]:
        return list((await self._http.ask("/tokenize", _Tokens, body)).tokens)

    @contextmanager
    def _explained(self, statuses: frozenset[int], advice: str) -> Iterator[None]:
        """Say what a refusal with one of these statuses means."""
        try:
            yield
        except EngineRejected as error:
            if error.data.get("status") not in statuses:
                raise
            raise EngineRejected(self.name, f"{advice} ({error.message})", data=error.data) from error

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """Pause, load, flush, continue; see ``parameters``."""
        await update_sglang_parameters(self._http, update)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """Stream a piece; see the port."""
        abort = Abort(self._http, uuid.uuid4().hex)
        reader = Reader(self._http, request.sampling, sink, self._end_ids)
        try:
            with await self._http.begin_stream(
                "/generate", Event, self.body(request, abort.rid), reader.take
            ) as stream:
                try:
                    await stream.ended()
                except anyio.get_cancelled_exc_class():
                    with anyio.CancelScope(deadline=anyio.current_time() + ABORT_DEADLINE_S, shield=True):
                        await abort.tell()
                        if stream.has_begun:  # otherwise it may be long in coming, and the slot waits with it
                            with suppress(EngineError):
                                await stream.ended()
                    raise
            if reader.end is None:
                raise EngineUnavailable(self.name, "the stream ended before the generation did")
        except EngineError as error:
            if not error.data:  # with a status the server itself has ended it
                await abort.tell()
            raise
        except anyio.get_cancelled_exc_class():
            await abort.tell()
            raise
        return reader.end

    def body(self, request: GenerationRequest, rid: str) -> dict[str, Any]:
        """The JSON of a ``/generate`` request."""
        sampling = request.sampling
        params: dict[str, Any] = {
            "max_new_tokens": self._room(request),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop": list(sampling.stop),
            "stop_token_ids": list(sampling.stop_token_ids),
            # neutral, whatever the server was told to prefer
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
        }
        if request.seed is not None:
            params["sampling_seed"] = request.seed & LARGEST_SEED
        return {
            "input_ids": list(request.tokens),
            "sampling_params": params,
            "return_logprob": True,
            "stream": True,
            "rid": rid,
        }

    def _room(self, request: GenerationRequest) -> int:
        """The server refuses to be asked for more tokens than fit; a response that fills its context is truncated."""
        if self._context_tokens is None:
            return request.max_new_tokens
        return max(1, min(request.max_new_tokens, self._context_tokens - len(request.tokens)))
