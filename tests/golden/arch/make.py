"""Golden numbers of one architecture: a tiny random checkpoint run by transformers in f32.

    python make.py NAME...        recipes/NAME.json -> NAME.json;  no name: all recipes
    python make.py --write DIR NAME   also leaves the checkpoint in DIR, to be run by hand

The weights are never stored: each value is a hash of its tensor's name and its index, and the Rust test
(crates/parallax-model/tests/arch/seeded.rs) makes the same ones from the list of tensors in NAME.json.
A recipe is {"model_type", "config": {...}, and optionally "prompts", "long_context", "norm_offset"}.
"""

import argparse
import base64
import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
MASK = (1 << 64) - 1


def fnv1a(name):
    """FNV-1a, 64 bits."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & MASK
    return h


def uniform(name, n):
    """n values in -1..1, multiples of 2^-23: SplitMix64 of the name's hash plus a counter."""
    with np.errstate(over="ignore"):
        z = np.uint64(fnv1a(name)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(1 << 23) - np.float32(1)


def tensor_rule(name, shape, recipe):
    """Offset and scale of a tensor's values: matrices keep the variance of their input, norms stand around one."""
    if len(shape) > 1:
        return 0.0, 1.3 * (3.0 / shape[-1]) ** 0.5
    if "norm" in name:
        return float(recipe.get("norm_offset", 1.0)), 0.3
    return 0.0, 0.3


def values(name, shape, offset, scale):
    n = int(np.prod(shape))
    return (np.float32(offset) + np.float32(scale) * uniform(name, n)).reshape(shape)


def checkpoint(recipe, folder):
    """Writes config.json and weights under the names that transformers saves; returns the list of tensors."""
    config = transformers.AutoConfig.for_model(recipe["model_type"], **recipe["config"])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tensors, weights = [], {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as f:
            for name in sorted(f.keys()):
                shape = list(f.get_slice(name).get_shape())
                offset, scale = tensor_rule(name, shape, recipe)
                tensors.append([name, shape, offset, scale])
                weights[name] = values(name, shape, offset, scale)
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def prompt(n, vocab, seed):
    return [(i * 31 + seed * 17 + i * i) % vocab for i in range(n)]


def packed(array):
    """f32, little endian, base64."""
    array = np.ascontiguousarray(array, dtype="<f4")
    assert np.isfinite(array).all()
    return base64.b64encode(array.tobytes()).decode()


@torch.no_grad()
def greedy(model, tokens):
    chosen, margins, past = [], [], None
    step = torch.tensor([tokens])
    for _ in range(32):
        result = model(step, past_key_values=past, use_cache=True)
        past, logits = result.past_key_values, result.logits[0, -1]
        top = torch.topk(logits, 2)
        chosen.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        step = torch.tensor([[chosen[-1]]])
    return {"prompt": tokens, "tokens": chosen, "margin": min(margins)}


@torch.no_grad()
def run(model, recipe):
    vocab = model.config.get_text_config().vocab_size
    out = {"prompts": []}
    for n in recipe.get("prompts", [1, 7, 33, 129]):
        tokens = prompt(n, vocab, n)
        result = model(torch.tensor([tokens]), output_hidden_states=n == 7, use_cache=False)
        rows = list(range(n)) if n <= 33 else sorted({*range(0, n, 16), n - 1})
        case = {"tokens": tokens, "rows": rows, "logits": packed(result.logits[0, rows])}
        if n == 7:
            # Behind each layer; the last entry of transformers stands behind the final norm.
            case["hidden"] = [packed(h[0]) for h in result.hidden_states[1:]]
        out["prompts"].append(case)

    # The first prompt whose tokens cannot flip by rounding.
    out["greedy"] = next(g for g in (greedy(model, prompt(7, vocab, seed)) for seed in range(40)) if g["margin"] > 2e-3)

    # Left padding, as transformers' generate does it.
    batch = [prompt(n, vocab, 50 + n) for n in recipe.get("ragged", [5, 33, 18])]
    longest = max(map(len, batch))
    ids = torch.tensor([[0] * (longest - len(b)) + b for b in batch])
    mask = torch.tensor([[0] * (longest - len(b)) + [1] * len(b) for b in batch])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    result = model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
    out["ragged"] = {"tokens": batch, "logits": packed(result.logits[:, -1])}
    return out


def make(name, keep):
    recipe = json.loads((HERE / "recipes" / f"{name}.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        folder = keep or pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = checkpoint(recipe, folder)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        model.eval()
        golden = {
            "made_with": {"transformers": transformers.__version__, "torch": torch.__version__},
            "config": json.loads((folder / "config.json").read_text()),
            "long_context": recipe.get("long_context", False),
            "tensors": tensors,
            **run(model, recipe),
        }
    path = HERE / f"{name}.json"
    path.write_text(json.dumps(golden, separators=(",", ":")) + "\n")
    margin = golden["greedy"]["margin"]
    print(f"{name}: {path.stat().st_size} bytes, smallest greedy margin {margin:.4f}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--write", type=pathlib.Path)
    args = parser.parse_args()
    for name in args.names or sorted(p.stem for p in (HERE / "recipes").glob("*.json")):
        make(name, args.write)


torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
if __name__ == "__main__":
    main()
