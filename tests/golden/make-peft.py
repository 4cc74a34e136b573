"""Golden data of the PEFT library: an adapter as it writes one, and what the model computes with it.

Run with Python 3.11, torch 2.15, transformers 5, peft: `python make-peft.py ../../assets/tiny peft`. The base model is
the embedded tiny one; the adapter's values are random numbers.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model

base, out = Path(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(20261121)
model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
model = get_peft_model(model, config)
with torch.no_grad():
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(torch.randn_like(p) * 0.1)
model.save_pretrained(out)

tokens = torch.randint(6, 262, (40,)).tolist()
with torch.no_grad():
    logits = model.eval()(torch.tensor([tokens])).logits[0]
    logprobs = torch.log_softmax(logits.double(), -1)
    seen = [float(logprobs[i, t]) for i, t in enumerate(tokens[1:])]
    with model.disable_adapter():
        bare = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
expected = {
    "made_with": f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}",
    "tokens": tokens,
    "logprobs": seen,
    "logprobs_without": [float(bare[i, t]) for i, t in enumerate(tokens[1:])],
}
(out / "expected.json").write_text(json.dumps(expected) + "\n")
(out / "README.md").unlink(missing_ok=True)
