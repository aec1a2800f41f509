"""Where a server is: connections to it, and what every request begins with.

Invariants:

* All addresses of a host name are tried in turn, each within the connect timeout; which they are is remembered for
  ``RESOLVED_S``, so that a name server is not asked once a request.
* A connection that was kept is used before a new one is made (``kept``), where they are kept at all.
* A certificate has to be valid for the host of the URL.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Final
from urllib.parse import SplitResult, urlsplit

import anyio

from .errors import said
from .kept import KeptConnections

__all__ = ["Origin", "OriginUnreachable"]

RESOLVED_S: Final = 10.0
"""As aiohttp, which the other requests go through, remembers addresses."""


class OriginUnreachable(ConnectionError):
    """None of the addresses could be connected to; its text says what happened at the last."""


class Origin:
    """See the module's invariants.

    Args:
        url: ``http://host:port``, which may go on with a path that all others are below.
        headers: of each request.
        connect_timeout_s: for one address.
        keeps: whether the server asks for connections to be used again.
    """

    def __init__(self, url: str, headers: Mapping[str, str], *, connect_timeout_s: float, keeps: bool) -> None:
        parts = urlsplit(url)
        self._is_secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port or (443 if self._is_secure else 80)
        self._base = parts.path.rstrip("/")
        self._connect_timeout_s = connect_timeout_s
        self.kept = KeptConnections() if keeps else None
        self._connecting: set[anyio.CancelScope] = set()
        self._tls: ssl.SSLContext | None = None
        self._addresses: Sequence[str] = (self._host,) if _is_address(self._host) else ()
        self._known_until = math.inf if self._addresses else -math.inf
        self._head = "".join(
            f"{name}: {value}\r\n"
            for name, value in (
                {"Host": _authority(parts)}
                | {"Accept": "*/*", "Accept-Encoding": "identity", "Connection": "keep-alive" if keeps else "close"}
                | dict(headers)
            ).items()
        )

    def request(self, path: str, body: bytes) -> bytes:
        """All bytes of a POST."""
        head = f"POST {self._base}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        return head.encode("latin-1") + body

    def close(self) -> None:
        """Give up connecting, and what was kept."""
        for scope in self._connecting:
            scope.cancel()
        if self.kept is not None:
            self.kept.close()

    async def connect(self, protocol: asyncio.Protocol) -> None:
        """A new connection for a protocol.

        Raises:
            OriginUnreachable: there is none.
        """
        problem = "cannot connect: the host name has no address"
        for address in self._addresses if self._is_known() else await self._resolve():
            with anyio.move_on_after(self._connect_timeout_s) as scope:
                self._connecting.add(scope)
                try:
                    await self._connect_to(address, protocol)
                except OSError as error:
                    problem = f"cannot connect: {said(error)}"
                    continue
                finally:
                    self._connecting.discard(scope)
                return
            problem = f"cannot connect: no answer within {self._connect_timeout_s:g} s"
        raise OriginUnreachable(problem)

    async def _connect_to(self, address: str, protocol: asyncio.Protocol) -> None:
        if self._is_secure and self._tls is None:
            self._tls = ssl.create_default_context()
        host = self._host if self._is_secure else None
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: protocol, address, self._port, ssl=self._tls, server_hostname=host)

    def _is_known(self) -> bool:
        return asyncio.get_running_loop().time() < self._known_until

    async def _resolve(self) -> Sequence[str]:
        loop = asyncio.get_running_loop()
        if self._addresses:  # others go on with what was known, and do not all ask again
            self._known_until = loop.time() + self._connect_timeout_s
        try:
            with anyio.fail_after(self._connect_timeout_s):
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except TimeoutError as error:
            raise OriginUnreachable("cannot connect: the host name was not resolved in time") from error
        except (OSError, UnicodeError) as error:
            raise OriginUnreachable(f"cannot connect: unknown host name: {error}") from error
        self._addresses = list(dict.fromkeys(str(address[0]) for *_, address in found))
        self._known_until = loop.time() + RESOLVED_S
        return self._addresses


def _authority(parts: SplitResult) -> str:
    """Host and port as a header has them. Only the host is encoded: with a port behind it a label may be too long."""
    port = "" if parts.port is None else f":{parts.port}"
    host = parts.netloc.rpartition("@")[2].removesuffix(port)
    return (host if host.isascii() else host.encode("idna").decode()) + port


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
