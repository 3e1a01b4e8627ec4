#!/usr/bin/env python3
"""Writes a GGUF of random weights in a Llama's shape, for llama.cpp's llama-bench beside mobi-bench.

usage: llama_gguf.py SHAPE Q4_0|Q8_0 OUT.gguf     (needs the package gguf; SHAPE as for mobi-bench)

Every matrix has the type asked for, the tied output embedding included, which llama.cpp's own
quantizer would keep in 6 bits beside Q4_0. Then, with the same threads and context:
  llama-bench -m OUT.gguf -t 2 -p 0 -n 32 -d 512 -r 5
  mobi-bench step --model SHAPE --threads 2 --context 512 --bits 4,8 --sequences 1
"""
import sys

import gguf
import numpy as np

# hidden, intermediate, layers, heads, KV heads, vocabulary, context
SHAPES = {
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256, 4096),
    "wiki-llama": (512, 1408, 8, 8, 4, 8192, 1024),
}


def random_matrix(rng, rows, cols, kind):
    """Blocks of an fp16 scale and 32 codes, all small enough for logits to stay finite."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, size=(rows, cols // block, size), dtype=np.uint8)
    data[:, :, :2] = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)
    return data.reshape(rows, -1)


def main():
    shape, kind_name, path = sys.argv[1:]
    hidden, intermediate, layers, heads, kv_heads, vocab, context = SHAPES[shape]
    kind = gguf.GGMLQuantizationType[kind_name]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(1)

    def matrix(name, rows, cols):
        writer.add_tensor(name, random_matrix(rng, rows, cols, kind), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, np.ones(hidden, dtype=np.float32))

    matrix("token_embd.weight", vocab, hidden)
    norm("output_norm.weight")
    kv_size = kv_heads * (hidden // heads)
    for i in range(layers):
        for name, rows, cols in [("attn_q", hidden, hidden), ("attn_k", kv_size, hidden),
                                 ("attn_v", kv_size, hidden), ("attn_output", hidden, hidden),
                                 ("ffn_gate", intermediate, hidden),
                                 ("ffn_up", intermediate, hidden),
                                 ("ffn_down", hidden, intermediate)]:
            matrix(f"blk.{i}.{name}.weight", rows, cols)
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main()
