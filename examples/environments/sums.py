"""An environment in Python: a sum, to be answered by its number and nothing else.

    training-swarm solo --config examples/configs/smollm2.toml

The lines that are spoken are those of guess.py. One sum in ten, by what it is and not by its seed, is asked for evaluation only:
those are the seeds from 2**63 on.
"""

import json
import random
import re
import sys
import zlib

LARGEST = 20
HELD_OUT_SEEDS = 1 << 63


def operands(seed):
    """The first pair that belongs to the seed's side."""
    draw = random.Random(seed)
    while True:
        a, b = draw.randint(0, LARGEST), draw.randint(0, LARGEST)
        if (zlib.crc32(f"{a}+{b}".encode()) % 10 == 0) == (seed >= HELD_OUT_SEEDS):
            return a, b


def judged(seed, said):
    right = str(sum(operands(seed)))
    numbers = re.findall(r"\d+", said)
    bare = said.strip().isdecimal()
    correct = numbers[-1:] == [right]
    # A bare number is worth something and so is a sentence that ends in the right one: two first steps to take.
    reward = 1.0 if bare and correct else 0.2 if bare else 0.1 if correct else 0.0
    return {"reward": reward, "components": {"bare": float(bare), "correct": float(correct)}}


def answer(question):
    op = question["op"]
    if op == "hello":
        return {"name": "sums", "version": 1, "low": 0.0, "high": 1.0, "turns": 1}
    if op == "task":
        a, b = operands(question["seed"])
        return {"prompt": f"What is {a}+{b}? Answer with the number only.", "answer": str(a + b)}
    said = question["said"]
    return judged(question["seed"], said[-1] if said else "")


if __name__ == "__main__":
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps({"id": question["id"], **answer(question)}), flush=True)
