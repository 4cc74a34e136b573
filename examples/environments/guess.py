"""An environment in Python: guess a number from 1 to 7 in three turns, told each time whether it is higher or lower.

    training-swarm --config run.toml          with  environment_program = ["python3", "examples/environments/guess.py"]
    rollout-fleet --trainer ADDRESS --env-program python3 examples/environments/guess.py

One JSON object a line in, one out, which repeats the question's "id". Nothing is remembered between lines: "said" names
every turn so far, so this program may be killed and started again at any time. What is printed besides ends it, so debug
prints go to stderr or a file. Over HTTP, for many machines: serve.py.
"""

import json
import random
import re
import sys

TURNS = 3


def target(seed):
    return random.Random(seed).randint(1, 7)


def judged(seed, said, cut):
    """The turn that `said` ends with: what the player hears next, or its reward."""
    guesses = [int(word) if re.fullmatch("[1-7]", word.strip()) else None for word in said]
    found = target(seed) in guesses
    if found or cut or len(said) >= TURNS:
        # Numbers are worth something, so that a model which says nonsense has a first step to take.
        numbers = sum(guess is not None for guess in guesses) / TURNS
        reward = 1.0 if found else 0.1 * numbers
        return {"reward": reward, "components": {"found": float(found), "turns": float(len(said))}}
    if guesses[-1] is None:
        return {"observation": "Say a number from 1 to 7."}
    return {"observation": "Higher." if target(seed) > guesses[-1] else "Lower."}


def answer(question):
    op = question["op"]
    if op == "hello":
        return {"name": "guess", "version": 1, "low": 0.0, "high": 1.0, "turns": TURNS}
    if op == "task":
        return {"prompt": "Guess from 1 to 7.", "answer": str(target(question["seed"]))}
    return judged(question["seed"], question["said"], cut=op == "cut")


if __name__ == "__main__":
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps({"id": question["id"], **answer(question)}), flush=True)
