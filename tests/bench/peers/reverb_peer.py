"""Reverb's queue: a producer writes groups, an item each, to its server, a consumer samples each once, in their order.

reverb_peer.py produce|consume SOCKET TOKENS SAMPLES TEXT_BYTES
reverb_peer.py serve SOCKET      becomes the server, and writes its port to that path
"""

import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import reverb
from groups import NAMES, as_arrays, check, columns, serve

TABLE = "groups"
GROUPS_HELD = 64
ITEMS_ON_THE_WAY = 8


def become_server(path: str) -> None:
    server = reverb.Server([reverb.Table.queue(TABLE, GROUPS_HELD)])
    with open(f"{path}.new", "w") as file:
        file.write(str(server.port))
    os.rename(f"{path}.new", path)
    sys.stdin.read()
    server.stop()


def main() -> None:
    if sys.argv[1] == "serve":
        become_server(sys.argv[2])
        return
    role, (tokens, samples, text_bytes) = sys.argv[1], map(int, sys.argv[3:])
    with open(sys.argv[2]) as file:
        client = reverb.Client(f"127.0.0.1:{file.read()}")
    if role == "produce":
        group, writer = columns(tokens, samples, text_bytes), client.trajectory_writer(num_keep_alive_refs=1)

        def produce(groups: int) -> None:
            for _ in range(groups):
                writer.append(as_arrays(group))
                writer.create_item(TABLE, 1.0, {name: writer.history[name][-1:] for name in NAMES})
                writer.flush(block_until_num_items=ITEMS_ON_THE_WAY)
            writer.flush()

        serve(produce)
    else:

        def consume(groups: int) -> None:
            for item in client.sample(TABLE, groups, emit_timesteps=False):
                arrays = [array[0] for array in item.data]  # of an item's one step, in the order of their names
                check(dict(zip(sorted(NAMES), arrays, strict=True)), tokens, samples)

        serve(consume)


main()
