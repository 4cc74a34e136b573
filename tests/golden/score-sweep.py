"""`parallax score` against transformers on random checkpoints that no fixture contains.

    python score-sweep.py PATH_OF_PARALLAX [--seeds 3]

Every family gets other sizes for each seed: odd numbers of heads, groups of any size, vocabularies that are no multiple of
32, tied and untied embeddings. Prints the largest deviation of a log-probability for each, and fails above 1e-4. Needs
torch and transformers; the weights come from arch/make.py, so nothing is stored.
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile

import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent / "arch"))
import make  # noqa: E402

# Not "phi3-longrope-long": `parallax score` keeps to the original context, where the short factors hold.
FAMILIES = ["llama", "llama-linear-bias", "llama3-rope", "llama-yarn", "smollm2", "smollm3", "mistral", "mixtral",
            "qwen2", "qwen2-window", "qwen3", "qwen3-moe", "qwen3-moe-plain", "gemma2", "gemma3", "phi3", "phi3-longrope",
            "glm4", "glm4-moe", "glm4-moe-air", "gpt-oss", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "kimi-k2",
            "minimax-m2", "qwen3-next", "qwen3.5", "qwen3.5-moe"]
LIMIT = 1e-4


def other_sizes(recipe, rng):
    """The recipe with sizes of its own; what must fit together still does."""
    config = recipe["config"]
    groups = rng.choice([1, 2, 3, 5])
    kv_heads = rng.choice([1, 3, 5]) if "kv_lora_rank" not in config else config["num_key_value_heads"]
    config["num_attention_heads"] = kv_heads * groups
    if "kv_lora_rank" in config:
        config["num_attention_heads"] = config["num_key_value_heads"] = rng.choice([3, 5, 7])
    else:
        config["num_key_value_heads"] = kv_heads
    # Without a size of its own, a head has this share of the width.
    config["hidden_size"] = config["num_attention_heads"] * rng.choice([8, 16, 24] if "head_dim" in config else [16, 24, 40])
    config["intermediate_size"] = rng.choice([88, 136, 200])
    if "moe_intermediate_size" in config:
        config["moe_intermediate_size"] = rng.choice([24, 56, 72])
    config["vocab_size"] = rng.choice([97, 131, 203, 517])
    if recipe["model_type"] not in ("gemma2", "gemma3_text"):
        config["tie_word_embeddings"] = rng.random() < 0.5
    if "kv_lora_rank" in config:
        config["kv_lora_rank"] = rng.choice([24, 40, 56])
        config["qk_nope_head_dim"] = rng.choice([8, 24, 40])
        config["v_head_dim"] = rng.choice([8, 20, 36])
        if config["q_lora_rank"]:
            config["q_lora_rank"] = rng.choice([20, 36, 72])
    if "linear_num_key_heads" in config:
        config["linear_num_key_heads"] = rng.choice([1, 3, 5])
        config["linear_num_value_heads"] = config["linear_num_key_heads"] * rng.choice([1, 2, 3])
        config["linear_key_head_dim"] = rng.choice([8, 24, 40])
        config["linear_value_head_dim"] = rng.choice([8, 24, 40])
    if "long_factor" in config.get("rope_parameters", {}):
        pairs = config["hidden_size"] // config["num_attention_heads"] // 2
        config["rope_parameters"]["short_factor"] = [1 + rng.random() for _ in range(pairs)]
        config["rope_parameters"]["long_factor"] = [1 + 15 * rng.random() for _ in range(pairs)]
    return recipe


@torch.no_grad()
def deviation(parallax, recipe, rng):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        make.checkpoint(recipe, folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager").eval()
        vocab = recipe["config"]["vocab_size"]
        sequences = [[rng.randrange(vocab) for _ in range(n)] for n in (2, 19, 50)]
        ids = folder / "ids.json"
        ids.write_text(json.dumps({"sequences": sequences}))
        said = subprocess.run([parallax, "score", "--model", folder, "--ids", ids, "--dtype", "f32", "--json"],
                              check=True, capture_output=True, text=True).stdout
        worst = 0.0
        for sequence, got in zip(sequences, json.loads(said.splitlines()[-1])["logprobs"], strict=True):
            logits = model(torch.tensor([sequence]), use_cache=False).logits[0].double()
            wanted = torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(sequence[1:])[:, None])[:, 0]
            worst = max(worst, (wanted - torch.tensor(got, dtype=torch.float64)).abs().max().item())
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parallax")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    of_family, n = {}, 0
    for family in FAMILIES:
        for seed in range(args.seeds):
            rng = random.Random(f"{family} {seed}")
            recipe = json.loads((make.HERE / "recipes" / f"{family}.json").read_text())
            other_sizes(recipe, rng)
            found = deviation(args.parallax, recipe, rng)
            config = recipe["config"]
            print(f"{family} seed {seed}: {config['num_attention_heads']}/{config['num_key_value_heads']} heads, width "
                  f"{config['hidden_size']}, vocabulary {config['vocab_size']}: {found:.2e}", flush=True)
            of_family[family], n = max(of_family.get(family, 0.0), found), n + 1
    print(", ".join(f"{family} {found:.1e}" for family, found in of_family.items()))
    worst = max(of_family.values())
    print(f"{n} checkpoints of {len(FAMILIES)} recipes, largest deviation {worst:.2e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
