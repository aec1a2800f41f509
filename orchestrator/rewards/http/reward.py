"""Rewards that are servers: one POST of JSON a call, answered with JSON (``docs/configuration.md`` describes both).

Invariants:

* No retries. What says nothing of what was asked (no connection, a reset, 5xx, 408, 425, 429) is
  ``RewardUnavailable``; no whole answer within the deadline is ``RewardTimeout``; everything else that is no reward is
  ``RewardError``.
* Each call has a connection of its own, which ends with it: servers end idle ones at any moment, and one on which
  nothing comes must not be used again.
* Requests, answers and texts of errors are bounded, whatever the server sends. Redirects are not followed.
* The key of the server is never shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import aiohttp
import anyio
import orjson

from orchestrator.errors import RewardError, RewardTimeout
from orchestrator.records import Prompt, Sample
from orchestrator.rewards.bounded import BoundedReward
from orchestrator.rewards.port import RewardResult, RewardUnavailable
from orchestrator.rewards.verdict import to_results
from orchestrator.schema.keys import read_key

__all__ = ["HttpReward", "encode_request"]

MAX_REQUEST_BYTES: Final = 256 << 20
"""256 MiB, as for functions: a prompt of the largest row that a file may have, and the texts of a group."""

MAX_ANSWER_BYTES: Final = 32 << 20
"""32 MiB: the details of a group of 1,024 samples, each of the largest size that is kept."""

MAX_ERROR_BYTES: Final = 4096
MAX_ERROR_CHARS: Final = 300

COME_AGAIN: Final = frozenset({408, 425, 429})
"""4xx answers that do not speak of what was asked for, but of when."""


class HttpReward(BoundedReward):
    """A :class:`~orchestrator.rewards.port.Reward` that asks a server.

    Args:
        url: where to post, path included.
        key: which entry of an answer that is an object is the reward.
        timeout_s: deadline of one call in seconds, connecting included.
        concurrency: calls at a time.
        group: whether a call has all samples of a group.
        api_key_env: environment variable that holds the server's key; ``None``: it needs none.

    Raises:
        ValueError: that variable holds nothing.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None,
        timeout_s: float,
        concurrency: int,
        group: bool,
        api_key_env: str | None = None,
    ) -> None:
        super().__init__(url, "http", concurrency=concurrency, group=group)
        self._url = url
        self._key = key
        self._timeout_s = timeout_s
        self._connections = concurrency
        self._headers = {"Content-Type": "application/json"} | _authorization(api_key_env)
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    def _open(self) -> aiohttp.ClientSession:
        if self._closed:
            raise RewardError(f"reward {self._name}: it was closed")
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, force_close=True),
                timeout=aiohttp.ClientTimeout(total=None),  # the deadline of the call is held here
            )
        return self._session

    async def _score(self, samples: Sequence[Sample], prompt: Prompt) -> list[RewardResult]:
        try:
            body = encode_request(samples, prompt, group=self._group)
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self._name}: cannot send the request: {error}") from error
        session = self._open()
        with anyio.move_on_after(self._timeout_s):
            text = await self._post(session, body)
            try:
                value = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise self._error(f"its answer is not JSON: {error}") from error
            return to_results(self._name, value, self._key, len(samples) if self._group else None)
        raise RewardTimeout(f"reward {self._name}: no answer within {self._timeout_s:g} s; the connection was closed")

    async def _post(self, session: aiohttp.ClientSession, body: bytes) -> bytes:
        try:
            async with session.post(self._url, data=body, headers=self._headers, allow_redirects=False) as response:
                if response.status != 200:
                    await self._refuse(response)
                return await self._read(response)
        except RewardError:
            raise
        except Exception as error:  # whatever the library raises, UnicodeError for a host name among it
            raise RewardUnavailable(f"reward {self._name}: {error or type(error).__name__}") from error

    async def _refuse(self, response: aiohttp.ClientResponse) -> None:
        status, text = response.status, (await response.content.read(MAX_ERROR_BYTES)).decode("utf-8", "replace")
        said = text.strip()[:MAX_ERROR_CHARS] or "no message"
        if status >= 500 or status in COME_AGAIN:
            raise RewardUnavailable(f"reward {self._name}: the server answered {status}: {said}")
        if 300 <= status < 400:
            raise self._error(f"the server answered {status}; redirects are not followed: use the final address")
        raise self._error(f"the server rejected the request: {status}: {said}")

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > MAX_ANSWER_BYTES:
                raise self._error(f"the answer has more than {MAX_ANSWER_BYTES} bytes")
        return b"".join(parts)

    def _error(self, said: str) -> RewardError:
        return RewardError(f"reward {self._name}: {said}")

    async def aclose(self) -> None:
        """Close all connections; the daemon ends its producers first."""
        self._closed = True
        session, self._session = self._session, None
        if session is not None:
            await session.close()


def _authorization(api_key_env: str | None) -> dict[str, str]:
    key, wrong = read_key(api_key_env)
    if wrong is not None:
        raise ValueError(f"{wrong}; set it, or remove api_key_env")
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def encode_request(samples: Sequence[Sample], prompt: Prompt, *, group: bool) -> bytes:
    """The body of a request: one object; for a group with a list of ``samples``.

    Raises:
        TypeError: something in the metadata or the label is not JSON.
        ValueError: it would be larger than ``MAX_REQUEST_BYTES``.
    """
    body: dict[str, Any] = {
        "prompt": prompt.content,
        "label": prompt.label,
        "metadata": prompt.metadata,
        "source": prompt.source,
        "prompt_index": prompt.prompt_index,
        "epoch": prompt.epoch,
    }
    if prompt.content is None:
        body["prompt_tokens"] = list(prompt.tokens or ())
    if group:
        body["samples"] = [_sample(sample) for sample in samples]
    else:
        body |= _sample(samples[0])
    data = orjson.dumps(body)
    if len(data) > MAX_REQUEST_BYTES:
        raise ValueError(f"the request has {len(data)} bytes; at most {MAX_REQUEST_BYTES} are sent")
    return data


def _sample(sample: Sample) -> dict[str, Any]:
    return {
        "response": sample.text,
        "index": sample.index,
        "status": sample.status.value,
        "finish_reason": sample.finish_reason,
        "response_tokens": len(sample.tokens),
    }
