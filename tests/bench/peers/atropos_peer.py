"""Atropos: an environment posts groups as JSON to its server of trajectories, a trainer asks that one for batches.

atropos_peer.py produce|consume SOCKET TOKENS SAMPLES TEXT_BYTES
atropos_peer.py serve SOCKET      becomes the server, and writes its port to that path

As its own environments do, the producer compresses what it posts; answers come compressed. The text goes as messages.
"""

import gzip
import json
import os
import socket
import sys
import time

import numpy as np
import requests
from groups import columns, looked_at, serve

GROUPS_A_BATCH = 32
IDLE_S = 0.1


def become_server(path: str) -> None:
    import uvicorn
    from atroposlib.api import app

    listening = socket.create_server(("127.0.0.1", 0))
    with open(f"{path}.new", "w") as file:
        file.write(str(listening.getsockname()[1]))
    os.rename(f"{path}.new", path)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])


def main() -> None:
    if sys.argv[1] == "serve":
        become_server(sys.argv[2])
        return
    role, (tokens, samples, text_bytes) = sys.argv[1], map(int, sys.argv[3:])
    with open(sys.argv[2]) as file:
        address = f"http://127.0.0.1:{file.read()}"
    session = requests.Session()
    if role == "produce":
        group, known = columns(tokens, samples, text_bytes), {}
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}

        def register() -> None:
            wanted = {"max_token_length": tokens, "desired_name": "bench", "weight": 1.0, "group_size": samples}
            while "env_id" not in known:
                known.update(session.post(f"{address}/register-env", json=wanted).json())
                time.sleep(IDLE_S)

        def produce(groups: int) -> None:
            register()
            for _ in range(groups):
                data = {
                    "tokens": [tokens for tokens, _, _ in group],
                    "masks": [[1] * len(tokens) for tokens, _, _ in group],
                    "inference_logprobs": [logprobs for _, logprobs, _ in group],
                    "messages": [[{"role": "assistant", "content": text}] for _, _, text in group],
                    "scores": [1.0] * samples,
                    "env_id": known["env_id"],
                }
                body = gzip.compress(json.dumps(data).encode())
                session.post(f"{address}/scored_data", data=body, headers=headers).raise_for_status()

        serve(produce)
    else:
        wanted = {
            "wandb_group": "bench",
            "wandb_project": "bench",
            "batch_size": GROUPS_A_BATCH * samples,
            "max_token_len": tokens,
            "checkpoint_dir": "",
            "save_checkpoint_interval": 0,
            "starting_step": 0,
            "num_steps": 1_000_000,
        }
        session.post(f"{address}/register", json=wanted).raise_for_status()

        def consume(groups: int) -> None:
            while groups:
                batch = session.get(f"{address}/batch").json()["batch"]
                if batch is None:
                    time.sleep(IDLE_S)
                    continue
                for group in batch:
                    for name, dtype in (("tokens", "i4"), ("inference_logprobs", "f4"), ("masks", "u1")):
                        for column in group[name]:
                            assert looked_at(np.array(column, dtype)) == tokens
                groups -= len(batch)

        serve(consume)


main()
