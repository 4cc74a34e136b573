"""Golden data for stored weight formats: bytes beside the values that other implementations make of them.

Run with Python 3.11, torch 2.15, transformers 5, gguf 0.19, compressed-tensors 0.11 (later ones have no activation order),
safetensors: `python make-weights.py weights`.

- ggml.safetensors: blocks of every GGUF type (`TYPE.raw`), and what gguf.quants.dequantize makes of them (`TYPE.values`).
  Types with a quantiser there are quantised noise; the k-quants are random bytes with finite scales.
- fp8, gptq4, gptq8, awq, packed, mxfp4: one or more quantised weights in the layout of their exporters, and
  `expected.NAME`, computed here by the formulas of those formats with numpy and torch (transformers for MXFP4).
- packed_order4, packed_order8: pack-quantized weights with `weight_g_idx`, packed and dequantised by compressed-tensors.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file

out = Path(sys.argv[1])
rng = np.random.default_rng(20261121)
LAYER = "model.layers.0."


def noise(*shape):
    return rng.normal(0, 0.1, shape).astype(np.float32)


def save(name, tensors):
    save_file({k: torch.as_tensor(v).contiguous() for k, v in tensors.items()}, out / f"{name}.safetensors")


# ---- GGUF block formats
tensors = {}
for kind in [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.MXFP4]:
    raw = np.frombuffer(quantize(noise(4, 128), kind).tobytes(), np.uint8)
    tensors[f"{kind.name}.raw"] = raw.copy()
    if kind in (T.F32, T.F16):
        values = raw.view(np.float32 if kind == T.F32 else np.float16).astype(np.float32)
    else:
        values = dequantize(raw, kind)
    tensors[f"{kind.name}.values"] = values.reshape(-1)
scales = {T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}
sizes = {T.Q2_K: 84, T.Q3_K: 110, T.Q4_K: 144, T.Q5_K: 176, T.Q6_K: 210}
for kind, at in scales.items():
    raw = rng.integers(0, 256, (3, sizes[kind]), dtype=np.uint8)
    for offset in at:
        raw[:, offset : offset + 2] = noise(3, 1).astype(np.float16).view(np.uint8)
    tensors[f"{kind.name}.raw"] = raw.reshape(-1)
    tensors[f"{kind.name}.values"] = dequantize(raw.reshape(-1), kind).reshape(-1)
save("ggml", tensors)

# ---- FP8: DeepSeek blocks (cut at both edges), per tensor, per row
tensors = {}
w = torch.from_numpy(noise(72, 160))
codes = (w * 400).clamp(-448, 448).to(torch.float8_e4m3fn)
for name, scale, wide in [
    ("self_attn.q_proj", torch.rand(2, 2) / 100, lambda s: s.repeat_interleave(64, 0)[:72].repeat_interleave(128, 1)[:, :160]),
    ("self_attn.k_proj", torch.rand(()) / 100, lambda s: s),
    ("self_attn.v_proj", torch.rand(72, 1) / 100, lambda s: s),
]:
    tensors[f"{LAYER}{name}.weight"] = codes
    suffix = "weight_scale_inv" if name.endswith("q_proj") else "weight_scale"
    tensors[f"{LAYER}{name}.{suffix}"] = scale
    tensors[f"expected.{LAYER}{name}.weight"] = codes.to(torch.float32) * wide(scale)
save("fp8", {k: v.clone() for k, v in tensors.items()})


def pack(codes, bits, axis):
    """Little fields first, along an axis, in 32-bit words."""
    per = 32 // bits
    codes = np.moveaxis(codes, axis, -1).astype(np.uint64)
    words = codes.reshape(*codes.shape[:-1], -1, per)
    shifts = np.arange(per, dtype=np.uint64) * np.uint64(bits)
    words = (words << shifts).sum(-1).astype(np.uint32).view(np.int32)
    return np.moveaxis(words, -1, axis)


# ---- GPTQ: plain groups and act-order, four and eight bits; zero points stored less one
K, N, G = 128, 24, 32
for bits in (4, 8):
    tensors = {}
    for name, order in [("self_attn.o_proj", False), ("mlp.down_proj", True)]:
        # Eight bits around 128, as symmetric exporters write them; four bits with any zero point.
        codes = rng.integers(0, 1 << bits, (K, N))
        zeros = rng.integers(1, 16, (K // G, N)) if bits == 4 else np.full((K // G, N), 128)
        scale = (np.abs(noise(K // G, N)) + 0.01).astype(np.float16)
        group = np.arange(K) // G
        if order:
            group = rng.permutation(group)
        base = f"{LAYER}{name}"
        tensors[f"{base}.qweight"] = pack(codes, bits, 0)
        tensors[f"{base}.qzeros"] = pack(zeros - 1, bits, 1)
        tensors[f"{base}.scales"] = scale
        tensors[f"{base}.g_idx"] = group.astype(np.int32)
        values = scale.astype(np.float32)[group] * (codes - zeros[group]).astype(np.float32)
        tensors[f"expected.{base}.weight"] = np.ascontiguousarray(values.T)
    save(f"gptq{bits}", tensors)

# ---- AWQ: nibble i of a word is output 8 c + ORDER[i]
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
codes = rng.integers(0, 16, (K, N))
zeros = rng.integers(0, 16, (K // G, N))
scale = (np.abs(noise(K // G, N)) + 0.01).astype(np.float16)
shuffled = lambda x: x.reshape(x.shape[0], -1, 8)[:, :, ORDER].reshape(x.shape)
base = f"{LAYER}mlp.gate_proj"
group = np.arange(K) // G
values = scale.astype(np.float32)[group] * (codes - zeros[group]).astype(np.float32)
save("awq", {
    f"{base}.qweight": pack(shuffled(codes), 4, 1),
    f"{base}.qzeros": pack(shuffled(zeros), 4, 1),
    f"{base}.scales": scale,
    f"expected.{base}.weight": np.ascontiguousarray(values.T),
})

# ---- compressed-tensors pack-quantized: [N, K], symmetric, bf16 scales [N, groups]
codes = rng.integers(0, 16, (N, K))
scale = torch.from_numpy(np.abs(noise(N, K // G)) + 0.01).to(torch.bfloat16)
values = scale.to(torch.float32).repeat_interleave(G, 1) * torch.from_numpy((codes - 8).astype(np.float32))
base = f"{LAYER}mlp.up_proj"
save("packed", {
    f"{base}.weight_packed": pack(codes, 4, 1),
    f"{base}.weight_scale": scale,
    f"{base}.weight_shape": np.array([N, K], np.int64),
    f"expected.{base}.weight": values,
})

# ---- GPT-OSS MXFP4: blocks [E, N, K / 32, 16], scales [E, N, K / 32]
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

blocks = torch.from_numpy(rng.integers(0, 256, (3, 16, 2, 16), dtype=np.uint8))
exponents = torch.from_numpy(rng.integers(110, 130, (3, 16, 2), dtype=np.uint8))
values = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)
base = f"{LAYER}mlp.experts.gate_up_proj"
save("mxfp4", {
    f"{base}_blocks": blocks,
    f"{base}_scales": exponents,
    # transformers gives [E, K, N].
    f"expected.{base}": values.transpose(1, 2).contiguous(),
})

# ---- the same with an activation order: columns dealt out to the groups, in their order, and an order never used
from compressed_tensors.compressors.quantized_compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize as quantize_groups

own = np.random.default_rng(20261122)
tensors = {}
for name, bits, group in [
    ("mlp.down_proj", 4, own.permutation(np.arange(K) // G)),
    ("mlp.gate_proj", 8, own.permutation(np.arange(K) // G)),
    ("mlp.up_proj", 4, np.arange(K) // G),
    ("self_attn.o_proj", 4, np.full(K, -1)),
]:
    group = torch.from_numpy(group.astype(np.int32))
    w = torch.from_numpy(own.normal(0, 0.1, (N, K)).astype(np.float32))
    scale = torch.from_numpy(np.abs(own.normal(0, 0.1, (N, K // G))) / 8 + 0.01).to(torch.bfloat16).to(torch.float32)
    args = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=G, actorder="group")
    zero = torch.zeros_like(scale, dtype=torch.int8)
    codes = quantize_groups(w, scale, zero, args, dtype=torch.int8, g_idx=group)
    base = f"{LAYER}{name}"
    tensors[f"{base}.weight_packed"] = pack_to_int32(codes, bits)
    tensors[f"{base}.weight_scale"] = scale.to(torch.bfloat16)
    tensors[f"{base}.weight_shape"] = torch.tensor([N, K])
    tensors[f"{base}.weight_g_idx"] = group
    tensors[f"expected.{base}.weight"] = dequantize(codes, scale, zero, args, g_idx=group)
save("packed_order4", {k: v for k, v in tensors.items() if "gate_proj" not in k})
save("packed_order8", {k: v for k, v in tensors.items() if "gate_proj" in k})
