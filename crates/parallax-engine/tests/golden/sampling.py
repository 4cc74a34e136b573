# Writes sampling.json: what the logits processors of Hugging Face transformers make of one logits row.
# Run: python sampling.py > sampling.json      (transformers 5.x, torch; numbers only, no model)
import json
import math
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList, MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
    TopKLogitsWarper, TopPLogitsWarper, TypicalLogitsWarper,
)

VOCAB = 64
logits = [round(6.0 * math.sin(1.3 * i * i + 0.7 * i) + 0.01 * i, 4) for i in range(VOCAB)]
prompt = [3, 9, 9, 14, 33, 60, 61]

def warpers(p):
    steps = []
    if p.get("repetition_penalty"): steps.append(RepetitionPenaltyLogitsProcessor(p["repetition_penalty"]))
    if p.get("temperature", 1.0) != 1.0: steps.append(TemperatureLogitsWarper(p["temperature"]))
    if p.get("top_k"): steps.append(TopKLogitsWarper(p["top_k"]))
    if p.get("top_p"): steps.append(TopPLogitsWarper(p["top_p"]))
    if p.get("min_p"): steps.append(MinPLogitsWarper(p["min_p"]))
    if p.get("typical_p"): steps.append(TypicalLogitsWarper(p["typical_p"]))
    return LogitsProcessorList(steps)

cases = []
for p in [
    {"temperature": 1.0}, {"temperature": 0.7}, {"temperature": 1.6},
    {"temperature": 1.0, "top_k": 7}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.0, "top_p": 0.2},
    {"temperature": 1.0, "min_p": 0.1}, {"temperature": 1.4, "min_p": 0.02},
    {"temperature": 1.0, "typical_p": 0.9}, {"temperature": 1.0, "typical_p": 0.3},
    {"temperature": 1.0, "repetition_penalty": 1.3}, {"temperature": 1.0, "repetition_penalty": 0.7},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "typical_p": 0.7, "repetition_penalty": 1.2},
]:
    scores = warpers(p)(torch.tensor([prompt]), torch.tensor([logits], dtype=torch.float32))
    row = torch.log_softmax(scores.double(), -1)[0].tolist()
    name = " ".join(f"{k}={v}" for k, v in p.items())
    cases.append({"name": name, "params": p, "prompt": prompt,
                  "logprobs": [None if v == -math.inf else round(v, 7) for v in row]})
print(json.dumps({"logits": logits, "cases": cases}))
