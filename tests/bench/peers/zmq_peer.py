"""Raw ZeroMQ: one process pushes groups as multipart messages, another pulls and looks at them as arrays.

zmq_peer.py produce|consume SOCKET TOKENS SAMPLES TEXT_BYTES
"""

import sys

import numpy as np
import zmq
from groups import as_bytes, columns, serve


def main() -> None:
    role, address, (tokens, samples, text_bytes) = sys.argv[1], f"ipc://{sys.argv[2]}", map(int, sys.argv[3:])
    context = zmq.Context()
    if role == "produce":
        push, group = context.socket(zmq.PUSH), columns(tokens, samples, text_bytes)
        push.bind(address)

        def produce(groups: int) -> None:
            for _ in range(groups):
                push.send_multipart([part for sample in as_bytes(group) for part in sample])

        serve(produce)
    else:
        pull = context.socket(zmq.PULL)
        pull.connect(address)

        def consume(groups: int) -> None:
            for _ in range(groups):
                parts = pull.recv_multipart(copy=False)
                for i in range(0, len(parts), 4):
                    for part, dtype in zip(parts[i : i + 3], ("i4", "f4", "u1"), strict=True):
                        assert len(np.frombuffer(part.buffer, dtype)) == tokens

        serve(consume)


main()
