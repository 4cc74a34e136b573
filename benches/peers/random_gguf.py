"""A GGUF file of random weights in a named shape, to compare engines at sizes whose real weights are not at hand.

Needs `pip install gguf`. The tokenizer is that of another GGUF file; where the shape has more tokens, the rest are
unused ones, as converters write them.

    python benches/peers/random_gguf.py --shape qwen3-0.6b --dtype q8_0 \\
        --tokenizer SmolLM2-135M-Instruct.Q4_1.gguf OUT.gguf

The same --seed gives the same weights in every --dtype. Norms and routers are f32; embeddings, where --dtype has less
than 8 bits, Q8_0.
"""
import argparse

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, TokenType, quants
from gguf import GGMLQuantizationType as Kind

# `tied`: the head is the embedding. No `vocab`: as many tokens as the tokenizer has.
SHAPES = {
    "qwen3-0.6b": dict(
        arch="qwen3", layers=28, hidden=1024, ffn=3072, heads=16, kv_heads=8, head=128, vocab=151936, tied=True),
    "qwen3-moe-1b": dict(
        arch="qwen3moe", layers=12, hidden=1024, ffn=3072, heads=16, kv_heads=4, head=128, vocab=None, tied=True,
        experts=64, used=8, expert_ffn=384),
    # Small, to try this script with.
    "qwen3-moe-tiny": dict(
        arch="qwen3moe", layers=2, hidden=256, ffn=512, heads=4, kv_heads=2, head=64, vocab=None, tied=False,
        experts=8, used=2, expert_ffn=128),
}
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_1": LlamaFileType.MOSTLY_Q4_1, "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
CONTEXT, ROPE_BASE, EPSILON = 40960, 1e6, 1e-6
# Numbers that are made and quantised at once.
CHUNK = 1 << 23


def tensors(shape, kind):
    """Name, dimensions (the fastest last) and kind of every tensor; embeddings and norms first, as converters do."""
    hidden, head = shape["hidden"], shape["head"]
    wide = Kind.Q8_0 if kind in (Kind.Q4_0, Kind.Q4_1) else kind
    yield "token_embd.weight", (shape["vocab"], hidden), wide
    yield "output_norm.weight", (hidden,), Kind.F32
    if not shape["tied"]:
        yield "output.weight", (shape["vocab"], hidden), wide
    for i in range(shape["layers"]):
        def named(name):
            return f"blk.{i}.{name}.weight"
        yield named("attn_norm"), (hidden,), Kind.F32
        yield named("attn_q"), (shape["heads"] * head, hidden), kind
        yield named("attn_k"), (shape["kv_heads"] * head, hidden), kind
        yield named("attn_v"), (shape["kv_heads"] * head, hidden), kind
        yield named("attn_q_norm"), (head,), Kind.F32
        yield named("attn_k_norm"), (head,), Kind.F32
        yield named("attn_output"), (hidden, shape["heads"] * head), kind
        yield named("ffn_norm"), (hidden,), Kind.F32
        if "experts" in shape:
            experts, ffn = shape["experts"], shape["expert_ffn"]
            yield named("ffn_gate_inp"), (experts, hidden), Kind.F32
            yield named("ffn_gate_exps"), (experts, ffn, hidden), kind
            yield named("ffn_up_exps"), (experts, ffn, hidden), kind
            yield named("ffn_down_exps"), (experts, hidden, ffn), kind
        else:
            yield named("ffn_gate"), (shape["ffn"], hidden), kind
            yield named("ffn_up"), (shape["ffn"], hidden), kind
            yield named("ffn_down"), (hidden, shape["ffn"]), kind


def weights(dims, kind, seed):
    """The bytes of one tensor: ones for norms; else normal numbers, so small that what goes in comes out as large."""
    if len(dims) == 1:
        yield np.ones(dims, np.float32).view(np.uint8)
        return
    rows, columns = int(np.prod(dims[:-1])), dims[-1]
    random = np.random.default_rng(seed)
    at_once = max(1, CHUNK // columns)
    for begin in range(0, rows, at_once):
        part = random.standard_normal((min(at_once, rows - begin), columns), np.float32) / np.float32(columns) ** 0.5
        yield quants.quantize(part, kind).reshape(-1).view(np.uint8)


def size(dims, kind):
    block, bytes_of_block = GGML_QUANT_SIZES[kind]
    return int(np.prod(dims)) // block * bytes_of_block


def copy_tokenizer(writer, reader, n_tokens):
    """The tokenizer's fields, with unused tokens up to `n_tokens`; returns how many there are."""
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    n_tokens = n_tokens or len(tokens)
    if len(tokens) > n_tokens:
        raise SystemExit(f"the tokenizer has {len(tokens)} tokens, the shape only {n_tokens}")
    for key, field in reader.fields.items():
        if not key.startswith("tokenizer."):
            continue
        value = field.contents()
        spare = range(len(tokens), n_tokens)
        if key == "tokenizer.ggml.tokens":
            value = value + [f"[PAD{i}]" for i in spare]
        elif key == "tokenizer.ggml.token_type":
            value = value + [int(TokenType.UNUSED) for _ in spare]
        elif key == "tokenizer.ggml.scores":
            value = value + [-1000.0 for _ in spare]
        of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        writer.add_key_value(key, value, field.types[0], sub_type=of)
    return n_tokens


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--dtype", choices=FILE_TYPES, default="q8_0")
    parser.add_argument("--tokenizer", required=True, help="a GGUF file whose tokenizer is taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("out")
    options = parser.parse_args()
    shape, kind = dict(SHAPES[options.shape]), Kind[options.dtype.upper()]

    writer = GGUFWriter(options.out, shape["arch"])
    writer.add_name(f"random {options.shape}")
    writer.add_file_type(FILE_TYPES[options.dtype])
    writer.add_quantization_version(2)
    writer.add_block_count(shape["layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(shape["hidden"])
    writer.add_feed_forward_length(shape["ffn"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_key_length(shape["head"])
    writer.add_value_length(shape["head"])
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    if "experts" in shape:
        writer.add_expert_count(shape["experts"])
        writer.add_expert_used_count(shape["used"])
        writer.add_expert_feed_forward_length(shape["expert_ffn"])
    shape["vocab"] = copy_tokenizer(writer, GGUFReader(options.tokenizer), shape["vocab"])

    listed = list(tensors(shape, kind))
    n_weights = sum(int(np.prod(dims)) for _, dims, _ in listed)
    for name, dims, stored in listed:
        writer.add_tensor_info(name, dims, np.dtype(np.float32), size(dims, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for i, (_, dims, stored) in enumerate(listed):
        writer.write_tensor_data(np.concatenate(list(weights(dims, stored, [options.seed, i]))))
    writer.close()
    print(f"{options.out}: {n_weights / 1e6:.0f} million weights")


if __name__ == "__main__":
    main()
