"""A llama with one layer in numpy and autograd, small enough to learn on a laptop, and its GGUF file for llama.cpp.

43,200 parameters: width 64, 4 heads, feed-forward 128, an untied output head, a vocabulary of 16. The forward pass
computes the same as llama.cpp: its log-probabilities and the server's agree to about 1e-3. The difference comes from
the server's 16-bit key-value cache.

Invariants:

* float32 throughout. One float64 *array or scalar* (not a Python float) makes numpy promote to float64: there is none.
* Tensors are (out, in), row-major, with the names of the file. RoPE rotates neighbouring channels (0, 1), (2, 3), …, as
  llama.cpp does for this architecture, so nothing has to be permuted.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import autograd.numpy as np
import gguf
import numpy

__all__ = [
    "PAD",
    "SYMBOLS",
    "VOCABULARY",
    "Array",
    "Parameters",
    "initial_parameters",
    "log_probabilities",
    "one_hot",
    "write_gguf",
]

Array = numpy.ndarray[Any, Any]
Parameters = dict[str, Array]

SYMBOLS: Final = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9", ".", "=", "r", "s", "<|begin|>", "<|end|>")
"""By token id; the last two are control tokens. `r` and `s` are free for tasks of your own."""

BEGIN: Final = 14
END: Final = 15
PAD: Final = END

VOCABULARY: Final = len(SYMBOLS)
WIDTH: Final = 64
HEADS: Final = 4
HEAD_WIDTH: Final = WIDTH // HEADS
FEED_FORWARD: Final = 128
CONTEXT_TOKENS: Final = 64
ROPE_BASE: Final = 10_000.0
NORM_EPSILON: Final = 1e-5


def initial_parameters(seed: int) -> Parameters:
    """Random parameters; the small output head makes all tokens about equally likely."""
    draw = numpy.random.Generator(numpy.random.PCG64(seed))

    def normal(rows: int, columns: int, deviation: float | None = None) -> Array:
        scale = 1 / math.sqrt(columns) if deviation is None else deviation
        return (draw.standard_normal((rows, columns)) * scale).astype(numpy.float32)

    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    return {
        "token_embd.weight": normal(VOCABULARY, WIDTH, 0.5),
        **{f"blk.0.attn_{name}.weight": normal(WIDTH, WIDTH) for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": normal(FEED_FORWARD, WIDTH),
        "blk.0.ffn_up.weight": normal(FEED_FORWARD, WIDTH),
        "blk.0.ffn_down.weight": normal(WIDTH, FEED_FORWARD),
        "output.weight": normal(VOCABULARY, WIDTH, 0.02),
        **{name: numpy.ones(WIDTH, numpy.float32) for name in norms},
    }


# -- the forward pass --------------------------------------------------------------------------------------------------


def log_probabilities(parameters: Parameters, tokens: Array) -> Any:
    """[S, L, 16] float32: at each position the log-probabilities of the next token.

    Args:
        parameters: arrays, or autograd's replacements for them.
        tokens: [S, L] token ids; padding on the right does not affect what comes before it.
    """
    x = one_hot(tokens) @ parameters["token_embd.weight"]
    x = x + _attention(parameters, _norm(x, parameters["blk.0.attn_norm.weight"]))
    x = x + _feed_forward(parameters, _norm(x, parameters["blk.0.ffn_norm.weight"]))
    logits = _norm(x, parameters["output_norm.weight"]) @ parameters["output.weight"].T
    logits = logits - np.max(logits, axis=-1, keepdims=True)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def one_hot(tokens: Array) -> Array:
    """[…, 16] float32."""
    return numpy.eye(VOCABULARY, dtype=numpy.float32)[tokens]


def _norm(x: Any, weight: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPSILON) * weight


def _attention(parameters: Parameters, x: Any) -> Any:
    samples, length, _ = x.shape
    cos, sin = _angles(length)

    def heads(name: str) -> Any:  # [S, HEADS, L, HEAD_WIDTH]
        projected = x @ parameters[f"blk.0.attn_{name}.weight"].T
        return np.transpose(np.reshape(projected, (samples, length, HEADS, HEAD_WIDTH)), (0, 2, 1, 3))

    def turned(y: Any) -> Any:
        return y * cos + (y @ QUARTER_TURN) * sin

    scores = turned(heads("q")) @ np.transpose(turned(heads("k")), (0, 1, 3, 2)) / math.sqrt(HEAD_WIDTH)
    scores = scores + numpy.triu(numpy.full((length, length), -1e9, numpy.float32), 1)  # causal mask
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    weights = weights / np.sum(weights, axis=-1, keepdims=True)
    mixed = np.reshape(np.transpose(weights @ heads("v"), (0, 2, 1, 3)), (samples, length, WIDTH))
    return mixed @ parameters["blk.0.attn_output.weight"].T


def _feed_forward(parameters: Parameters, x: Any) -> Any:
    gate = x @ parameters["blk.0.ffn_gate.weight"].T
    gate = gate / (1 + np.exp(-gate))  # SiLU
    return (gate * (x @ parameters["blk.0.ffn_up.weight"].T)) @ parameters["blk.0.ffn_down.weight"].T


def _angles(length: int) -> tuple[Array, Array]:
    """Cosine and sine, [L, HEAD_WIDTH]: the angle per token falls from 1 to 1 / base over the pairs of channels."""
    frequency = ROPE_BASE ** (-numpy.arange(0, HEAD_WIDTH, 2) / HEAD_WIDTH)
    angles = numpy.repeat(numpy.outer(numpy.arange(length), frequency), 2, axis=1)
    return numpy.cos(angles).astype(numpy.float32), numpy.sin(angles).astype(numpy.float32)


def _quarter_turn() -> Array:
    """[HEAD_WIDTH, HEAD_WIDTH]: (a, b) → (−b, a) for each pair of neighbouring channels."""
    matrix = numpy.zeros((HEAD_WIDTH, HEAD_WIDTH), numpy.float32)
    even = numpy.arange(0, HEAD_WIDTH, 2)
    matrix[even + 1, even], matrix[even, even + 1] = -1, 1
    return matrix


QUARTER_TURN: Final = _quarter_turn()


# -- the file ----------------------------------------------------------------------------------------------------------


def write_gguf(parameters: Parameters, path: Path) -> None:
    """Write the parameters for llama.cpp atomically: a reader of an earlier file of that name keeps it."""
    unfinished = path.with_suffix(".unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_name("tiny-copyist")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HEAD_WIDTH)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(NORM_EPSILON)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(SYMBOLS))
    writer.add_token_types([gguf.TokenType.NORMAL] * BEGIN + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["0 1"])  # the loader requires one; it matches no token
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_add_bos_token(False)
    for name, tensor in parameters.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)
