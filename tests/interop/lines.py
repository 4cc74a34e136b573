"""What the Python peers of `cargo xtask interop` share: one JSON command a line on standard input, one JSON answer each."""
import json
import os
import sys

# Libraries print what they like: answers go to what standard output was, everything else to standard error.
_ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

# What a command needs is not there yet: who asked asks again.
NOT_YET = {"wait": True}


def settings():
    return json.loads(sys.stdin.readline())


def say(answer):
    _ANSWERS.write(json.dumps(answer) + "\n")
    _ANSWERS.flush()


def answer(ops, line):
    """The answer to one command, by the function of its name."""
    command = json.loads(line)
    op = ops.get(command.pop("op"))
    if op is None:
        return {"skip": "it has no such command"}
    try:
        return op(**command) or {}
    except Exception as error:  # whatever the library throws is the answer
        return {"error": f"{type(error).__name__}: {error}"}
