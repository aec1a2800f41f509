"""The tiny random model as a folder that vLLM and SGLang load: weights and bytes are those of the embedded GGUF file.

``python -m tests.support.hf_model FOLDER`` writes ``FOLDER/first`` and ``FOLDER/second``, which answer differently.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from orchestrator.engines.embedded import tiny_model
from orchestrator.engines.embedded.tiny_model import BEGIN, END, PAD

HEADS = 2
"""Of 32 channels: vLLM has no attention on CPUs for the 16 of the original. It is another model by that, as random."""

SPECIAL = {BEGIN: "<|begin|>", END: "<|end|>", PAD: "<|pad|>"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def their_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{IN_BLOCK[part]}.weight"


def write_weights(path: Path, *, seed: int = 0, mean_tokens: float = 48.0) -> None:
    """A safetensors file: the length of a JSON header, the header, the tensors."""
    drawn = tiny_model._tensors(np.random.Generator(np.random.PCG64(seed)), ascii_only=True, mean_tokens=mean_tokens)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    parts, at = [], 0
    for name, tensor in drawn.items():
        data = tensor.astype("<f4").tobytes()
        header[their_name(name)] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [at, at + len(data)]}
        parts.append(data)
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def tokenizer() -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    symbols = tiny_model.byte_symbols()
    return {
        "version": "1.0",
        "added_tokens": [{"id": id_, "content": text, "special": True} | flags for id_, text in SPECIAL.items()],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {symbol: id_ for id_, symbol in enumerate(symbols)}, "merges": []},
    }


def write_model(folder: Path, *, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / "model.safetensors", seed=seed)
    files: dict[str, object] = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": tiny_model.VOCABULARY,
            "hidden_size": tiny_model.WIDTH,
            "intermediate_size": tiny_model.FEED_FORWARD,
            "num_hidden_layers": tiny_model.LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "max_position_embeddings": tiny_model.CONTEXT_TOKENS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": BEGIN,
            "eos_token_id": END,
            "pad_token_id": PAD,
        },
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[BEGIN],
            "eos_token": SPECIAL[END],
            "pad_token": SPECIAL[PAD],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": tiny_model.CONTEXT_TOKENS,
            "chat_template": tiny_model.CHAT_TEMPLATE,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    write_model(Path(sys.argv[1]) / "first")
    write_model(Path(sys.argv[1]) / "second", seed=1)
