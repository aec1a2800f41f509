"""A fake built from what was run and read of vLLM 0.32 and 0.33; not the real server.

What it does as they do: ``/v1/completions`` by token ids with ``token_ids`` and ``logprobs`` of what each event adds;
text that waits for stop texts; a draw that ``allowed_token_ids`` forces, raw log-probabilities not knowing of it; an
abort that ends a stream with 200 and ``finish_reason: abort``; pauses during which new requests wait (0.32) or get 503
(0.33); ``/detokenize`` that writes control tokens out. ``lacks`` makes a server of it that gives less.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.support.fake_server import (
    END_OF_SEQUENCE,
    END_PIECE,
    FAULT_AFTER_TOKENS,
    FakeServer,
    Piece,
    Run,
    event_of,
    json_answer,
    text_of,
    tokens_of,
)

MODEL = "fake/model"


class FakeOpenAI(FakeServer):
    def __init__(
        self,
        *,
        is_vllm: bool = True,
        lacks: frozenset[str] = frozenset(),
        is_processed: bool = False,
        pause_status: int | None = None,
        dev_mode: bool = True,
        key: str | None = None,
        **script: Any,
    ) -> None:
        super().__init__(**script)
        self.is_vllm = is_vllm
        self.lacks = lacks
        self.is_processed = is_processed
        self.pause_status = pause_status
        self.dev_mode = dev_mode
        self.weights = MODEL
        self.key = key
        self.drawn: list[dict[str, Any]] = []
        self.pause_checks = 0
        self.left: list[str] = []

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 24, middlewares=[self.seen, self._authorised])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        if "completions" not in self.lacks:
            app.router.add_post("/v1/completions", self._completions)
        if "chat" not in self.lacks:
            app.router.add_post("/v1/chat/completions", self._chat)
        if self.is_vllm:
            app.router.add_get("/version", self._version)
        if self.is_vllm and self.dev_mode:
            app.router.add_post("/pause", self._pause)
            app.router.add_post("/resume", self._resume)
            app.router.add_get("/is_paused", self._is_paused)
            app.router.add_post("/collective_rpc", self._collective_rpc)
            app.router.add_post("/reset_prefix_cache", self._reset_prefix_cache)
        app.router.add_get("/metrics", self.metrics)
        for path, handler in (("tokenize", self._tokenize), ("detokenize", self._detokenize)):
            if path not in self.lacks:
                app.router.add_post(f"/{path}", handler)
        if "props" not in self.lacks and not self.is_vllm:
            app.router.add_get("/props", self._props)
        return app

    @web.middleware
    async def _authorised(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return json_answer({"error": "Unauthorized"}, 401)
        response: web.StreamResponse = await handler(request)
        return response

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _version(self, request: web.Request) -> web.Response:
        return json_answer({"version": "0.33.0"})

    async def _props(self, request: web.Request) -> web.Response:
        return json_answer({"default_generation_settings": {"n_ctx": 1024}, "model_path": "x.gguf"})

    async def _models(self, request: web.Request) -> web.Response:
        data = [{"id": MODEL, "max_model_len": self.context_tokens}, {"id": "fake/other", "max_model_len": 64}]
        return json_answer({"object": "list", "data": data})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        text = body.get("prompt")
        if text is None:
            assert body["add_generation_prompt"] is True
            assert body["add_special_tokens"] is False
            text = "".join(f"{message['role']}: {message['content']}\n" for message in body["messages"]) + "assistant: "
        tokens = tokens_of(text)
        pieces = [END_PIECE if token == END_OF_SEQUENCE else chr(token) for token in tokens]
        strings = pieces if body.get("return_token_strs") else None
        return json_answer({"tokens": tokens, "count": len(tokens), "max_model_len": 1, "token_strs": strings})

    async def _detokenize(self, request: web.Request) -> web.Response:
        pieces: list[str] = []
        plain: list[int] = []
        for token in [*(await request.json())["tokens"], END_OF_SEQUENCE]:
            if token == END_OF_SEQUENCE:
                pieces.append(text_of(plain))
                plain = []
            else:
                plain.append(token)
        return json_answer({"prompt": END_PIECE.join(pieces)})

    # -- pauses --------------------------------------------------------------------------------------------------------

    async def _pause(self, request: web.Request) -> web.Response:
        self.resumed.clear()
        if request.query.get("mode") == "abort":
            for run in self.running.values():
                run.aborted.set()
        return json_answer({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        self.resumed.set()
        return json_answer({"status": "resumed"})

    async def _is_paused(self, request: web.Request) -> web.Response:
        self.pause_checks += 1
        return json_answer({"is_paused": not self.resumed.is_set()})

    async def _collective_rpc(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["method"] == "reload_weights"
        path = body["kwargs"]["weights_path"]
        if path.startswith("missing"):
            return json_answer({"error": {"message": "no such directory", "code": 500}}, 500)
        self.weights = path
        return json_answer({"results": [None]})

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        is_busy = bool(self.running) and request.query.get("reset_running_requests") != "true"
        return json_answer({"success": not is_busy}) if self.pause_status is not None else web.Response()

    # -- generation ----------------------------------------------------------------------------------------------------

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            return self._draw(body)
        return await self._generate(request, body)

    async def _generate(
        self, request: web.Request, body: dict[str, Any], *, is_chat: bool = False
    ) -> web.StreamResponse:
        if not self.resumed.is_set() and self.pause_status is not None:
            return json_answer({"error": {"message": "generation is paused", "code": 503}}, self.pause_status)
        self.requests.append(body)
        fault = self.take_fault()
        if fault == "never answers":
            await self.released.wait()
        if fault.isdecimal():
            return json_answer({"error": {"message": "so it was wanted", "type": "x", "code": int(fault)}}, int(fault))
        await self.resumed.wait()
        refusal = self.refusal(body["prompt"], body["max_tokens"])
        if refusal is not None:
            return json_answer({"error": {"message": refusal, "type": "BadRequestError", "code": 400}}, 400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.force_close()
        await response.prepare(request)
        run = Run(str(len(self.requests)))
        self.running[run.rid] = run
        leaving = asyncio.ensure_future(self._watch(request, run))
        try:
            await self._stream(request, response, run, body, fault, is_chat=is_chat)
        except ConnectionError:
            pass  # the client left, as clients do
        finally:
            leaving.cancel()
            del self.running[run.rid]
        return response

    async def _watch(self, request: web.Request, run: Run) -> None:
        """A generation ends when its client leaves."""
        while request.transport is not None and not request.transport.is_closing():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.001)
        self.left.append(run.rid)
        run.aborted.set()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        """Text alone: the same as by tokens, its prompt being what the template makes of the messages."""
        body = await request.json()
        if not body.get("stream"):
            self.drawn.append(body)
            return json_answer({"choices": [{"message": {"role": "assistant", "content": "z"}}]})
        text = "".join(f"{message['role']}: {message['content']}\n" for message in body["messages"]) + "assistant: "
        return await self._generate(request, body | {"prompt": tokens_of(text)}, is_chat=True)

    def _draw(self, body: dict[str, Any]) -> web.Response:
        self.drawn.append(body)
        token = (body.get("allowed_token_ids") or [ord("z")])[0] if self.is_vllm else ord("z")
        choice = {
            "text": text_of([token]),
            "token_ids": [token],
            "logprobs": {"token_logprobs": [0.0 if self.is_processed else -4.5], "tokens": ["z"]},
            "finish_reason": "length",
        }
        return json_answer({"choices": [self._without(choice)]})

    def _without(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {key: None if key in self.lacks else value for key, value in choice.items()}

    async def _stream(
        self,
        request: web.Request,
        response: web.StreamResponse,
        run: Run,
        body: dict[str, Any],
        fault: str,
        *,
        is_chat: bool,
    ) -> None:
        event_at = self._chat_event if is_chat else self._event
        piece = self.piece(
            body["prompt"],
            stop=body.get("stop", []),
            stop_ids=body.get("stop_token_ids", []),
            seed=body.get("seed"),
            greedy=body["temperature"] == 0,
            n=body["max_tokens"],
        )
        sent = 0
        while True:
            upto = min(sent + self.chunk, len(piece.tokens))
            is_over = upto == len(piece.tokens)
            if fault and upto > FAULT_AFTER_TOKENS:
                await self._strike(request, response, event_at(piece, sent, sent + 1, None), fault)
                return
            await response.write(event_of(event_at(piece, sent, upto, piece.reason if is_over else None)))
            sent = upto
            if is_over:
                break
            await self.held(run, sent)
            if run.aborted.is_set():
                await response.write(event_of(event_at(piece, sent, sent, "abort")))
                break
        await response.write(b"data: [DONE]\n\n")

    def _event(self, piece: Piece, sent: int, upto: int, reason: str | None) -> dict[str, Any]:
        # what might become a stop text, or has become one, is never said
        before, after = (len(piece.text_until(n)) for n in (sent, upto))
        choice = {
            "index": 0,
            "text": piece.text[before:after],
            "token_ids": piece.tokens[sent:upto],
            "logprobs": {"token_logprobs": piece.logprobs[sent:upto], "top_logprobs": [], "tokens": []},
            "finish_reason": reason,
            "stop_reason": piece.matched if reason == "stop" else None,
        }
        return {"id": "cmpl-1", "object": "text_completion", "model": MODEL, "choices": [self._without(choice)]}

    def _chat_event(self, piece: Piece, sent: int, upto: int, reason: str | None) -> dict[str, Any]:
        before, after = (len(piece.text_until(n)) for n in (sent, upto))
        choice = {"index": 0, "delta": {"content": piece.text[before:after]}, "finish_reason": reason}
        return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}

    async def _strike(
        self, request: web.Request, response: web.StreamResponse, event: dict[str, Any], fault: str
    ) -> None:
        choice = event["choices"][0]
        match fault:
            case "error 400" | "error 503":
                event = {"error": {"message": "so it was wanted", "type": "x", "code": int(fault[-3:])}}
            case "other reason":
                choice |= {"finish_reason": "whim", "token_ids": [], "logprobs": None, "text": ""}
            case "no log-probability":
                choice["logprobs"] = {"token_logprobs": [None]}
            case "no token ids":
                choice["token_ids"] = None
            case "ends early":
                await response.write(b"data: [DONE]\n\n")
                return
            case _:
                await self.break_off(fault, request, response)
                return
        await response.write(event_of(event))


@asynccontextmanager
async def fake_openai(**how: Any) -> AsyncIterator[FakeOpenAI]:
    server = FakeOpenAI(**how)
    async with server.serving(server.app()):
        yield server
