"""A fake built from what was read of SGLang 0.5; not the real server.

What it does as the source does: streams that repeat everything, or go on (``incremental``); ids of ``/abort_request``
that match by prefix, an empty one all; an empty 200 whatever it is told to abort; an aborted generation that ends as
any other, with its tokens; refusals as an event of a stream that has answered 200; pauses that let new requests wait.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from tests.support.fake_server import (
    FAULT_AFTER_TOKENS,
    FakeServer,
    Piece,
    Run,
    event_of,
    json_answer,
    text_of,
    tokens_of,
)

KNOWN_PARAMS = {
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "stop",
    "stop_token_ids",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "sampling_seed",
}


class FakeSGLang(FakeServer):
    def __init__(
        self,
        *,
        incremental: bool = False,
        has_chat: bool = True,
        has_tokenize: bool = True,
        old_names: bool = False,
        weight_version: str = "default",
        is_deaf: bool = False,
        can_pause: bool = True,
        unsent: int = 0,
        **script: Any,
    ) -> None:
        super().__init__(**script)
        self.incremental = incremental
        self.has_chat = has_chat
        self.has_tokenize = has_tokenize
        self.old_names = old_names
        self.weight_version = weight_version
        self.is_deaf = is_deaf
        self.can_pause = can_pause
        self.unsent = unsent
        self.model_path = "fake/model"
        self.is_dead = False
        self.paused_how: str | None = None
        self.aborts: list[dict[str, Any]] = []
        self.finished: list[tuple[str, str]] = []

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 24, middlewares=[self.seen])
        app.router.add_get("/health", self._health)
        app.router.add_get("/get_model_info" if self.old_names else "/model_info", self._model_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/abort_request", self._abort)
        if self.can_pause:
            app.router.add_post("/pause_generation", self._pause)
            app.router.add_post("/continue_generation", self._continue)
        app.router.add_post("/update_weights_from_disk", self._update_weights)
        app.router.add_post("/flush_cache", self._flush)
        app.router.add_get("/metrics", self.metrics)
        if self.has_tokenize:
            app.router.add_post("/tokenize", self._tokenize)
            app.router.add_post("/detokenize", self._detokenize)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _model_info(self, request: web.Request) -> web.Response:
        return json_answer(
            {"model_path": self.model_path, "is_generation": True, "weight_version": self.weight_version}
        )

    async def _models(self, request: web.Request) -> web.Response:
        return json_answer({"object": "list", "data": [{"id": "fake", "max_model_len": self.context_tokens}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "messages" in body and self.has_chat:
            lines = "".join(f"{message['role']}: {message['content']}\n" for message in body["messages"])
            return json_answer({"tokens": tokens_of(lines + "assistant: "), "count": 0})
        if "prompt" not in body:
            return json_answer({"object": "error", "message": "prompt: field required"}, 400)
        return json_answer({"tokens": tokens_of(body["prompt"]), "count": 0, "max_model_len": -1})

    async def _detokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["skip_special_tokens"] is True
        return json_answer({"text": text_of(body["tokens"])})

    # -- pauses and aborts ---------------------------------------------------------------------------------------------

    async def _abort(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.aborts.append(body)
        if self.is_deaf:
            await self.released.wait()
        for rid, run in self.running.items():
            if body.get("abort_all") or rid.startswith(body.get("rid", "")):
                run.aborted.set()
        return web.Response()

    async def _pause(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.resumed.clear()
        self.paused_how = body.get("mode", "abort")
        if self.paused_how == "abort":
            for run in self.running.values():
                run.aborted.set()
        return json_answer({"status": "ok"})

    async def _continue(self, request: web.Request) -> web.Response:
        self.resumed.set()
        self.paused_how = None
        return json_answer({"status": "ok"})

    @property
    def _is_empty(self) -> bool:
        return self.paused_how == "retract" or all(run.aborted.is_set() for run in self.running.values())

    async def _update_weights(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["model_path"].startswith("missing"):
            return json_answer({"success": False, "message": "Failed to update weights: no such file"}, 400)
        if body["model_path"].startswith("unlucky"):
            return json_answer({"success": False, "message": "Failed to update weights: rolled back"})
        if body.get("flush_cache", True):
            # the server asserts that it could
            self.is_dead = self.is_dead or self.paused_how == "retract" or not self._is_empty
        self.model_path, self.weight_version = body["model_path"], body["weight_version"]
        return json_answer({"success": True, "message": "Succeeded to update model weights."})

    async def _flush(self, request: web.Request) -> web.Response:
        return web.Response(text="Cache flushed.", status=200 if self._is_empty else 400)

    # -- generation ----------------------------------------------------------------------------------------------------

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        fault = self.take_fault()
        if fault == "never answers":
            await self.released.wait()
        if fault.isdecimal():
            return json_answer({"error": {"message": "so it was wanted"}}, int(fault))
        await self.resumed.wait()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        response.force_close()
        await response.prepare(request)
        run = Run(body["rid"])
        self.running[run.rid] = run
        try:
            await self._stream(request, response, run, body, fault)
        except ConnectionError:
            pass  # the client left, as clients do
        finally:
            del self.running[run.rid]
        return response

    async def _stream(
        self, request: web.Request, response: web.StreamResponse, run: Run, body: dict[str, Any], fault: str
    ) -> None:
        params = body["sampling_params"]
        unknown = set(params) - KNOWN_PARAMS
        refusal = f"unknown {unknown}" if unknown else self.refusal(body["input_ids"], params["max_new_tokens"])
        if params["top_k"] == 0:
            refusal = "top_k must be -1 (disable) or at least 1"
        if refusal is not None:
            await response.write(event_of({"error": {"message": refusal}}) + b"data: [DONE]\n\n")
            return
        piece = self.piece(
            body["input_ids"],
            stop=params["stop"],
            stop_ids=params["stop_token_ids"],
            seed=params.get("sampling_seed"),
            greedy=params["temperature"] == 0,
            n=params["max_new_tokens"],
        )
        sent = 0
        while True:
            upto = min(sent + self.chunk, len(piece.tokens))
            is_over = upto == len(piece.tokens)
            if fault and upto > FAULT_AFTER_TOKENS:
                await self._strike(request, response, piece, sent, fault)
                return
            finish: dict[str, Any] | None = None
            if is_over:
                last = piece.tokens[-1] if piece.tokens else None  # none: it was asked to go on after the end
                matched = piece.matched if piece.matched is not None else last
                finish = {"type": piece.reason} | ({"matched": matched} if piece.reason == "stop" else {})
            await response.write(event_of(self._event(run.rid, piece, sent, upto, finish)))
            sent = upto
            if is_over:
                break
            await self.held(run, sent)
            if run.aborted.is_set():
                finish = {"type": "abort", "message": "Abort by request"}
                upto = min(sent + self.unsent, len(piece.tokens) - 1)  # generated, and not sent yet
                await response.write(event_of(self._event(run.rid, piece, sent, max(sent, upto), finish)))
                break
        assert finish is not None
        self.finished.append((run.rid, finish["type"]))
        await response.write(b"data: [DONE]\n\n")

    def _event(self, rid: str, piece: Piece, sent: int, upto: int, finish: dict[str, Any] | None) -> dict[str, Any]:
        begin = sent if self.incremental else 0
        entries = zip(piece.logprobs[begin:upto], piece.tokens[begin:upto], strict=True)
        is_end = finish is not None and upto == len(piece.tokens)
        text = piece.text if is_end else piece.text_until(upto)
        before = piece.text_until(sent) if self.incremental else ""
        return {
            "text": text[len(before) :],
            "output_ids": piece.tokens[begin:upto],
            "meta_info": {
                "id": rid,
                "finish_reason": finish,
                "prompt_tokens": 1,
                "completion_tokens": upto,
                "weight_version": self.weight_version,
                "output_token_logprobs": [[logprob, token, None] for logprob, token in entries],
            },
        }

    async def _strike(
        self, request: web.Request, response: web.StreamResponse, piece: Piece, sent: int, fault: str
    ) -> None:
        event = self._event("x", piece, sent, sent, None)
        match fault:
            case "abort 400" | "abort 503":
                message = {"type": "abort", "message": "so it was wanted", "status_code": int(fault[-3:])}
                event["meta_info"]["finish_reason"] = message
            case "abort in queue":
                event = {"text": piece.text_until(sent), "meta_info": {"finish_reason": {"type": "abort"}}}
            case "other reason":
                event["meta_info"]["finish_reason"] = {"type": "whim"}
            case "miscounts":
                event["meta_info"]["completion_tokens"] = sent + 1
            case "no count":  # an end that tells of no tokens at all
                event["meta_info"] = {"id": "x", "finish_reason": {"type": "length", "length": 8}}
            case "no log-probability":
                event["meta_info"]["output_token_logprobs"] = [[None, 97, None]]
            case "ends early":
                await response.write(b"data: [DONE]\n\n")
                return
            case _:
                await self.break_off(fault, request, response)
                return
        await response.write(event_of(event))


@asynccontextmanager
async def fake_sglang(**how: Any) -> AsyncIterator[FakeSGLang]:
    server = FakeSGLang(**how)
    async with server.serving(server.app()):
        yield server
