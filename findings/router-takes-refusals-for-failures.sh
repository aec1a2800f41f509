#!/usr/bin/env bash
# Package:   sglang-router 0.3.2 (and its successor smg 1.13.0 for comparison), before a stand-in worker made with aiohttp
# Guess:     a 400 of the worker is the client's fault and passed on; a 500 to a POST is passed on too, since repeating a
#            generation is the client's decision.
# Behaviour: ten 400s in a row (prompts that are too long) open the worker's circuit: good requests then get 503
#            no_available_workers without a Retry-After, for a minute. A 500 (429, 503) is asked for five times in all, so
#            that two of them do the same. smg counts no 400 and repeats no 500.
# Seen:      sglang-router: one 500 took 5 calls, after ten 400s a good request got 503 and took none; smg: 1 call, 200
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3}
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$work/lib" \
    sglang-router==0.3.2 smg==1.13.0 aiohttp==3.14.5 2> "$work/log" || { cat "$work/log" >&2; exit 1; }
PYTHONPATH=$work/lib timeout 120 "$python" -B - 2> "$work/log" <<'PYTHON' || { tail -n 20 "$work/log" >&2; exit 1; }
import asyncio
import socket
import subprocess
import sys

from aiohttp import ClientError, ClientSession, web

state = {"status": 200, "calls": 0}


async def generate(_):
    state["calls"] += 1
    body = {"text": "x", "output_ids": [1], "meta_info": {"id": "1", "finish_reason": {"type": "stop"}}}
    return web.json_response(body if state["status"] == 200 else {"error": "no"}, status=state["status"])


async def describe(_):
    return web.json_response({"model_path": "m", "served_model_name": "m", "tp_size": 1, "dp_size": 1})


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


async def try_router(module, worker, client):
    port = free_port()
    command = [sys.executable, "-m", module, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", worker]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    async def ask(status):
        state.update(status=status, calls=0)
        body = {"input_ids": [1], "sampling_params": {}}
        async with client.post(f"http://127.0.0.1:{port}/generate", json=body) as answer:
            return answer.status, state["calls"], answer.headers.get("X-SMG-Error-Code", "")

    async def ready():
        while True:
            try:
                if (await ask(200))[0] == 200:
                    return
            except ClientError:
                pass
            await asyncio.sleep(0.1)

    try:
        await asyncio.wait_for(ready(), 40)
        repeated = (await ask(500))[1]
        await ask(200)
        refused = [await ask(400) for _ in range(10)]
        good = await ask(200)
        print(f"{module}: one 500 took {repeated} calls; {refused.count((400, 1, ''))} of 10 refusals passed on; then {good}")
        return repeated, good
    finally:
        router.terminate()
        try:
            router.wait(15)
        except subprocess.TimeoutExpired:
            router.kill()
            router.wait()


async def main():
    app = web.Application()
    app.router.add_post("/generate", generate)
    app.router.add_get("/{rest:.*}", describe)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    worker = "http://{}:{}".format(*runner.addresses[0])
    async with ClientSession() as client:
        old = await try_router("sglang_router.launch_router", worker, client)
        new = await try_router("smg.launch_router", worker, client)
    await runner.cleanup()
    assert old == (5, (503, 0, "no_available_workers")), old
    assert new == (1, (200, 1, "")), new


asyncio.run(asyncio.wait_for(main(), 110))
PYTHON
