"""A llama.cpp server on a tiny random model made on the spot, for the scripts of this folder.

Token id = byte for ids below 256; 256 begins a text, 257 ends it, 258 pads. Needs xllamacpp, gguf and numpy.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import xllamacpp

WIDTH, HEADS, LAYERS, FEED_FORWARD, VOCABULARY = 64, 4, 2, 128, 259
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

Ask = Callable[..., tuple[int, Any]]
"""``ask(path, body)`` gives the status and the answer, decoded where it is JSON."""


def write_model(path: str, template: str) -> None:
    draw = np.random.default_rng(0)
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    symbols = [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(4096)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FEED_FORWARD)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(VOCABULARY)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([*symbols, "<|begin|>", "<|end|>", "<|pad|>"])
    out.add_token_types([1] * 256 + [3] * 3)
    out.add_token_merges([f"{symbols[0]} {symbols[1]}"])
    out.add_bos_token_id(256)
    out.add_eos_token_id(257)
    out.add_pad_token_id(258)
    out.add_add_bos_token(False)
    out.add_chat_template(template)

    def normal(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return (draw.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    out.add_tensor("token_embd.weight", draw.standard_normal((VOCABULARY, WIDTH)).astype(np.float32))
    for layer in range(LAYERS):
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            out.add_tensor(f"blk.{layer}.{name}.weight", normal(WIDTH, WIDTH))
        for name, rows, columns in (
            ("ffn_gate", FEED_FORWARD, WIDTH),
            ("ffn_up", FEED_FORWARD, WIDTH),
            ("ffn_down", WIDTH, FEED_FORWARD),
        ):
            out.add_tensor(f"blk.{layer}.{name}.weight", normal(rows, columns))
    out.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    head = 2 * normal(VOCABULARY, WIDTH)
    head[:32] = head[127:] = 0  # printable ASCII alone is likely
    out.add_tensor("output.weight", head)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def with_server(check: Callable[[Ask], None], *, template: str = TEMPLATE) -> None:
    """Call ``check(ask)`` on a new server and end the process: with 0, or with 1 where it raised."""
    path = os.path.join(os.environ["TMPDIR"], "tiny.gguf")
    write_model(path, template)
    options = xllamacpp.CommonParams()
    options.model.path = path
    options.hostnames = ["127.0.0.1"]
    options.port = 0
    options.n_parallel = 1
    options.n_ctx = 4096
    options.endpoint_metrics = True
    options.warmup = False
    options.ui = False
    options.cpuparams.n_threads = 1
    server = xllamacpp.Server(options)

    def ask(path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        request = urllib.request.Request(  # noqa: S310 - our own server, on loopback
            server.listening_address + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                status, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        return status, json.loads(text) if text.startswith(("{", "[")) else text

    code = 0
    try:
        check(ask)
    except BaseException:  # noqa: BLE001 - the process ends here
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the server has threads of its own
