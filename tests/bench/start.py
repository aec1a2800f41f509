"""How long it takes to begin: the trainer's import, the command's help, a daemon's first request to an engine."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

from tests.bench.daemons import write_config
from tests.bench.measure import Taken, cpu, cpu_of, cpu_ratio, exponent, interleave, run_to_end, wall, wall_ratio
from tests.bench.mixture import expression
from tests.bench.result import Figure, Goal, Options, Result, Unavailable

SIZES, QUICK_SIZES = (1, 16, 64), (1, 4, 16)
START_DEADLINE_S = 60.0


def imports(module: str) -> Taken:
    return run_to_end([sys.executable, "-c", f"import {module}"])


def first_request(folder: Path, sources: int) -> Taken:
    """From ``orchestrator run`` to the first byte that asks an engine for a generation."""
    server = Engine()
    weights: dict[str, float | str] = {f"source-{i}": expression(i) for i in range(sources)}
    folder.mkdir(exist_ok=True)
    state = f"state-{time.monotonic_ns()}"
    engines = [{"kind": "llamacpp", "url": f"http://127.0.0.1:{server.port}", "name": "engine"}]
    config = write_config(folder, weights=weights, engines=engines, run={"state_dir": state})
    began = time.perf_counter()
    log = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "orchestrator", "run", str(config)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)],
        setpgroup=0,
    )
    try:
        server.until_asked()
        return Taken(time.perf_counter() - began, cpu_of(pid))
    except TimeoutError:
        last = (folder / "stderr").read_text(errors="replace").splitlines()[-1:]
        raise Unavailable("; ".join([f"no request came within {START_DEADLINE_S:g} s", *last])) from None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(log)
        server.close()


ANSWERS = {
    b"/health": b'{"status":"ok"}',
    b"/props": b'{"default_generation_settings":{"n_ctx":4096},"model_path":"m.gguf","total_slots":16}',
    b"/v1/models": b'{"data":[{"id":"m","meta":{"n_ctx_train":4096}}]}',
    b"/tokenize": b'{"tokens":[1,2,3]}',
    b"/metrics": b"",
}


class Engine:
    """As much of a llama.cpp server as is asked before the first generation, one request a connection."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._socket.settimeout(START_DEADLINE_S)
        self.port = self._socket.getsockname()[1]

    def until_asked(self) -> None:
        """Answer until a generation is asked for."""
        while True:
            connection, _ = self._socket.accept()
            with connection:
                connection.settimeout(START_DEADLINE_S)
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65536)
                path = request.split(b" ", 2)[1]
                if path == b"/completion":
                    return
                body = ANSWERS.get(path, b"{}")
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
                connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def close(self) -> None:
        self._socket.close()


def run(options: Options) -> Result:
    result = Result("start", "Time to begin", "a start", "sources")
    orchestrator = str(Path(sys.executable).parent / "orchestrator")
    turns = {
        "nothing": lambda: imports("sys"),
        "numpy": lambda: imports("numpy"),
        "client": lambda: imports("orchestrator.client"),
        "help": lambda: run_to_end([orchestrator, "--help"]),
    }
    rounds = interleave(turns, options.rounds)
    name = "import orchestrator.client, of import numpy"
    result.goals.append(Goal(f"{name} (CPU)", cpu_ratio(rounds, "client", "numpy"), " x", at_most=1.5))
    result.goals.append(Goal(f"{name} (wall)", wall_ratio(rounds, "client", "numpy"), " x"))
    alone = (cpu(rounds["client"]) - cpu(rounds["nothing"])) / (cpu(rounds["numpy"]) - cpu(rounds["nothing"]))
    result.goals.append(Goal("the same without the interpreter's own start (CPU)", alone, " x"))
    result.goals.append(Goal("orchestrator --help", cpu(rounds["help"]) / 1e6, " s of CPU", at_most=0.4))
    result.goals.append(Goal("the same by the wall", wall(rounds["help"]) / 1e6, " s"))
    sizes = QUICK_SIZES if options.quick else SIZES
    starts = {str(n): lambda n=n: first_request(options.folder / str(n), n) for n in sizes}  # type: ignore[misc]
    taken = interleave(starts, options.rounds)
    result.figures += [Figure("to the first request", n, wall(taken[str(n)]), cpu(taken[str(n)])) for n in sizes]
    result.goals.append(Goal("run to first request, 1 source", cpu(taken["1"]) / 1e6, " s of CPU", at_most=1.5))
    result.goals.append(Goal("the same by the wall", wall(taken["1"]) / 1e6, " s"))
    growth = exponent([(n, cpu(taken[str(n)])) for n in sizes])
    result.growth = f"CPU time to the first request grows as sources^{growth:.2f}, from {sizes[0]} to {sizes[-1]}"
    return result
