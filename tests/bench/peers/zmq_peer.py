"""Raw ZeroMQ: one process pushes groups as messages of a part a column, another pulls and looks at them as arrays.

zmq_peer.py produce|consume SOCKET TOKENS SAMPLES TEXT_BYTES
"""

import sys

import numpy as np
import zmq
from groups import DTYPES, as_bytes, check, columns, serve


def main() -> None:
    role, address, (tokens, samples, text_bytes) = sys.argv[1], f"ipc://{sys.argv[2]}", map(int, sys.argv[3:])
    context = zmq.Context()
    if role == "produce":
        push, group = context.socket(zmq.PUSH), columns(tokens, samples, text_bytes)
        push.bind(address)

        def produce(groups: int) -> None:
            for _ in range(groups):
                push.send_multipart(list(as_bytes(group).values()))

        serve(produce)
    else:
        pull = context.socket(zmq.PULL)
        pull.connect(address)

        def consume(groups: int) -> None:
            for _ in range(groups):
                parts = pull.recv_multipart(copy=False)
                named = zip(DTYPES.items(), parts, strict=True)
                check({name: np.frombuffer(part.buffer, dtype) for (name, dtype), part in named}, tokens, samples)

        serve(consume)


main()
