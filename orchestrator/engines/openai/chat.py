"""OpenAI-compatible servers that give text alone: ``/v1/chat/completions``, streamed.

Messages in, text out: no token ids, no log-probabilities. A response that was interrupted begins anew, because there is
no way to ask for the rest of an assistant's turn that all such servers share.

Of a model that reasons in a field of its own, the response is what comes after that.

Invariants:

* What was streamed is handed over as it arrives, without tokens.
* Only what differs from the server's own defaults is sent, beside length and temperature: strict servers refuse options
  that they do not know.
* Closing the connection ends the generation. A paused vLLM is no failed one (``vllm_pause``).
* No retries here; errors are those of ``http``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from anyio.abc import TaskStatus

from orchestrator.engines.http.client import EngineHttp
from orchestrator.engines.http.instance import ProcessStart
from orchestrator.engines.http.parameters import CANNOT_LOAD
from orchestrator.engines.port import EngineInfo, GenerationEnd, GenerationRequest, ParameterUpdate, TokenSink
from orchestrator.errors import EngineRejected, EngineUnavailable
from orchestrator.records import Message

from .vllm_pause import Listener, PauseWatch
from .wire import REASONS, ChatCompletion, ChatEvent, found_model, refuse

__all__ = ["OpenAIChat"]

PATH = "/v1/chat/completions"


class OpenAIChat:
    """See the module's docstring.

    Args:
        name: unique among the engines.
        url: ``http://host:port``.
        model: to ask for; ``None``: the first of ``/v1/models``.
        max_in_flight: requests at a time; the server queues what it does not run.
        api_key_env: environment variable with the key of the server.
        connect_timeout_s: to connect.
    """

    def __init__(
        self,
        *,
        name: str,
        url: str,
        model: str | None = None,
        max_in_flight: int = 256,
        api_key_env: str | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self.name = name
        self.max_in_flight = max_in_flight
        self._wanted = model
        self._model = model
        self._http = EngineHttp(
            name=name,
            url=url,
            kind="chat server",
            max_streams=max_in_flight,
            connect_timeout_s=connect_timeout_s,
            api_key_env=api_key_env,
        )
        self._pauses = PauseWatch(self._http)
        self._start = ProcessStart(self._http)
        self._has_answered = False

    # -- the port ------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: TaskStatus[None]) -> None:
        """Watch for pauses of the server while requests hear nothing."""
        task_status.started()
        await self._pauses.run()

    async def probe(self) -> EngineInfo:
        """``/v1/models``; the first time also that it answers a chat.

        Raises:
            EngineUnavailable, EngineStalled: the server cannot be used.
        """
        try:
            model = await found_model(self._http, self._wanted)
            self._model = model.id
            if not self._has_answered:
                question = {"model": model.id, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
                await self._http.ask(PATH, ChatCompletion, question)
                self._has_answered = True
        except EngineRejected as error:
            raise EngineUnavailable(self.name, f"it cannot be used: {error.message}") from error
        return EngineInfo(
            model=model.id,
            context_tokens=model.max_model_len,
            instance=await self._start.ask(),
            text_only=True,
        )

    async def tokenize(self, text: str) -> list[int]:
        """Refused: it gives text alone."""
        self._refuse_tokens()

    async def tokenize_chat(self, messages: Sequence[Message], template_kwargs: dict[str, Any]) -> list[int]:
        """Refused: it gives text alone."""
        self._refuse_tokens()

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """Refused: it gives text alone."""
        self._refuse_tokens()

    def _refuse_tokens(self) -> NoReturn:
        raise EngineRejected(self.name, "it has no token ids, because dialect: chat uses text only")

    async def update_parameters(self, update: ParameterUpdate) -> None:
        """Refused: there is no way that all such servers share."""
        raise EngineRejected(self.name, CANNOT_LOAD)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    # -- generation ----------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest, sink: TokenSink) -> GenerationEnd:
        """Stream the response to ``request.messages``; see the port."""
        body = self.body(request)
        return await self._pauses.outlast(lambda: self._stream(body, sink), sink)

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The JSON of a ``/v1/chat/completions`` request.

        Raises:
            EngineRejected: what is asked for cannot be said in it.
        """
        sampling = request.sampling
        if request.messages is None:
            self._refuse_tokens()
        if sampling.stop_token_ids:
            raise EngineRejected(self.name, "stop_token_ids need token ids, which it does not have: use stop")
        options = {
            "top_p": (sampling.top_p, 1),
            "top_k": (sampling.top_k, 0),
            "min_p": (sampling.min_p, 0),
            "stop": (list(sampling.stop), []),
            "seed": (request.seed, None),
            "chat_template_kwargs": (sampling.chat_template_kwargs, {}),
        }
        return {
            "model": self._model,
            "messages": list(request.messages),
            "max_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "stream": True,
        } | {key: value for key, (value, neutral) in options.items() if value != neutral}

    async def _stream(self, body: dict[str, Any], sink: TokenSink) -> GenerationEnd:
        ends: list[GenerationEnd] = []
        with self._pauses.listening(sink) as listener:
            await self._http.stream(PATH, ChatEvent, body, partial(self._take, listener, ends))
        if not ends:
            raise EngineUnavailable(self.name, "the stream ended before the generation did")
        return ends[0]

    def _take(self, listener: Listener, ends: list[GenerationEnd], event: ChatEvent) -> bool:
        """Hand over what an event adds; whether the generation has ended."""
        listener.heard = True
        if event.error is not None:
            refuse(self._http, PATH, event.error)
        for choice in event.choices[:1]:
            listener.sink((), None, choice.delta.content or "")
            if choice.finish_reason is not None:
                ends.append(self._end(choice.finish_reason))
        return bool(ends)

    def _end(self, finish_reason: str) -> GenerationEnd:
        reason = REASONS.get(finish_reason)
        if reason is None:
            raise self._http.wrong(PATH, f"unknown finish reason {finish_reason!r}")
        return GenerationEnd(reason, text_complete=reason != "abort")
