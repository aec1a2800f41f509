"""A tiny random byte-level llama in GGUF, made on the spot: so that a first run needs no download and no GPU.

It knows nothing. What it is good for: a real server with a real sampler, log-probabilities and end-of-sequence tokens.

Invariants:

* Token id = byte for ids below 256; 256 begins a text, 257 ends it, 258 pads. Token ids of a text are its UTF-8 bytes.
* Same arguments, same file.
* One channel of the residual stream is the same constant at every position (nothing writes to it), so that a row of the
  output head can add a constant to its token's logit. That is how bytes that are not printable ASCII are made
  improbable (``ascii_only``), and how often a response ends is set (``mean_tokens``).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np

from orchestrator.errors import StateError

__all__ = ["BEGIN", "CHAT_TEMPLATE", "END", "PAD", "byte_symbols", "write_tiny_model"]

BEGIN: Final = 256
END: Final = 257
PAD: Final = 258
VOCABULARY: Final = 259

WIDTH: Final = 64
HEADS: Final = 4
LAYERS: Final = 2
FEED_FORWARD: Final = 128
CONTEXT_TOKENS: Final = 8192

LOGIT_SPREAD: Final = 1.0
"""Standard deviation of the logits: the likeliest of 96 tokens then has a probability of about 8 %."""

SUPPRESSED_LOGIT: Final = -40.0
"""A probability of e^-40: never seen, and still a finite log-probability."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_tiny_model(path: Path, *, seed: int = 0, ascii_only: bool = True, mean_tokens: float = 48.0) -> None:
    """Write the model.

    Args:
        path: of the GGUF file.
        seed: of the weights.
        ascii_only: make bytes other than printable ASCII and newline improbable; otherwise all bytes are alike.
        mean_tokens: expected length of a response at temperature 1.

    Raises:
        StateError: the package ``gguf`` is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise StateError(
            "creating a model needs the package gguf: pip install 'rollout-orchestrator[demo]', or give a model file"
        ) from error
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, gguf)
    for name, tensor in _tensors(np.random.Generator(np.random.PCG64(seed)), ascii_only, mean_tokens).items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, gguf: Any) -> None:
    writer.add_name("tiny-random-bytes")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    symbols = byte_symbols()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*symbols, "<|begin|>", "<|end|>", "<|pad|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 3)
    writer.add_token_merges([f"{symbols[0]} {symbols[1]}"])  # the loader wants one; this pair joins to no token
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(PAD)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in of each byte: printable Latin-1 stands for itself, the rest for U+0100 onwards."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    rest = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(rest)) for byte in range(256)]


def _tensors(draw: np.random.Generator, ascii_only: bool, mean_tokens: float) -> dict[str, np.ndarray[Any, Any]]:
    """The weights, (out, in); channel 0 of the residual stream is the constant."""

    def normal(rows: int, columns: int) -> np.ndarray[Any, Any]:
        return draw.standard_normal((rows, columns)) / math.sqrt(columns)

    embedding = draw.standard_normal((VOCABULARY, WIDTH))
    embedding[:, 0] = 1.0
    tensors: dict[str, np.ndarray[Any, Any]] = {"token_embd.weight": embedding}
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        tensors[f"{block}.attn_norm.weight"] = np.ones(WIDTH)
        tensors[f"{block}.ffn_norm.weight"] = np.ones(WIDTH)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            tensors[f"{block}.{name}.weight"] = normal(WIDTH, WIDTH)
        tensors[f"{block}.ffn_gate.weight"] = normal(FEED_FORWARD, WIDTH)
        tensors[f"{block}.ffn_up.weight"] = normal(FEED_FORWARD, WIDTH)
        tensors[f"{block}.ffn_down.weight"] = normal(WIDTH, FEED_FORWARD)
        tensors[f"{block}.attn_output.weight"][0] = 0.0
        tensors[f"{block}.ffn_down.weight"][0] = 0.0
    # The other channels grow with each layer and the last norm divides by their root mean square; a norm weight on
    # channel 0 makes up for it on average, so that the constant arrives as about 1.
    norm = np.ones(WIDTH)
    norm[0] = math.sqrt(1 + 2 * LAYERS * 0.5)
    tensors["output_norm.weight"] = norm
    tensors["output.weight"] = _head(normal(VOCABULARY, WIDTH) * LOGIT_SPREAD, ascii_only, mean_tokens)
    return tensors


def _head(head: np.ndarray[Any, Any], ascii_only: bool, mean_tokens: float) -> np.ndarray[Any, Any]:
    head[:, 0] = 0.0
    allowed = [10, *range(32, 127)] if ascii_only else list(range(256))
    suppressed = [token for token in range(VOCABULARY) if token not in allowed]
    head[suppressed, 1:] = 0.0
    head[suppressed, 0] = SUPPRESSED_LOGIT
    total = len(allowed) * math.exp(LOGIT_SPREAD**2 / 2)  # expected sum of exp(logit), logits being normal
    head[END, 0] = math.log(total / (mean_tokens - 1))
    return head
