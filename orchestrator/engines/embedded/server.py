"""The child process of the embedded engine: a llama.cpp server of the package ``xllamacpp``.

    python -P server.py MODEL SLOTS CONTEXT_TOKENS THREADS

Imports nothing of this project, so that it starts within 60 ms (``child``).

Prints its address as one line, then waits for its standard input to end: the parent holds the other end of that pipe,
so that this process never outlives it. It ends by ``os._exit``, because the server's destructor can hang while a stream
is in flight.
"""

from __future__ import annotations

import os
import sys
from typing import Final

HTTP_THREADS: Final = 64
"""Well above the connections of the parent: with fewer than connections the server stalls for seconds."""

GGUF: Final = b"GGUF"
"""What a model file of llama.cpp begins with."""


def main(model: str, slots: int, context_tokens: int, threads: int) -> None:
    """Serve until the parent is gone."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = slots * context_tokens
    params.cpuparams.n_threads = threads
    params.n_threads_http = max(HTTP_THREADS, 2 * slots)
    params.endpoint_metrics = True
    params.endpoint_slots = True
    params.endpoint_props = True
    params.warmup = False
    params.ui = False
    params.verbosity = 0
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:  # llama.cpp says the same whatever it was
        sys.exit(_why_not(model) or f"{str(error).rstrip('.')} ({slots} slots of {context_tokens} tokens)")
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    os.dup2(2, 1)  # nobody reads standard output from here on; a full pipe would block the server
    sys.stdin.buffer.read()
    os._exit(0)


def _why_not(model: str) -> str | None:
    """What is wrong with the file itself, if it is the file."""
    try:
        with open(model, "rb") as file:
            return None if file.read(len(GGUF)) == GGUF else "this is not a GGUF file"
    except OSError as error:
        return f"cannot read it: {error.strerror}"


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
