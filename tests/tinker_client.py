"""What the PyPI client `tinker` does with a gateway: URL and tasks come as arguments, what it saw goes to stdout as JSON.

Called by examples/tests/tinker_gateway.rs, which judges what was seen.
"""

import json
import sys

import tinker
from tinker import types

url, tasks_file, rl_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
# Each: the tokens of a prompt, and of its right answer with the end of the sequence.
tasks = json.load(open(tasks_file))
seen = {}


def ints(values):
    return types.TensorData(data=values, dtype="int64", shape=[len(values)])


def floats(values):
    return types.TensorData(data=values, dtype="float32", shape=[len(values)])


def datum(prompt, completion, **per_token):
    """Tokens of a prompt, whose other values are 0, and of a completion."""
    tokens = prompt + completion
    inputs = {"target_tokens": ints(tokens[1:])}
    for name, values in per_token.items():
        inputs[name] = floats([0.0] * (len(prompt) - 1) + list(values))
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def failure(call):
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


service = tinker.ServiceClient(base_url=url, api_key="tml-secret")
models = tinker.RestClient(base_url=url, api_key="tml-secret").get_server_capabilities().result().supported_models
seen["models"] = [[m.model_name, m.trainable, m.sampleable] for m in models]

# Supervised: the loss of right answers falls.
sft = service.create_lora_training_client(base_model="tiny", rank=8, seed=1).result()
info = sft.get_info()
seen["info"] = [info.model_data.model_name, info.is_lora, info.lora_rank]
right = [datum(p, a, weights=[1.0] * len(a)) for p, a in tasks[:8]]
answer_tokens = sum(len(a) for _, a in tasks[:8])
losses = []
for _ in range(8):
    passed = sft.forward_backward(right, "cross_entropy")
    step = sft.optim_step(types.AdamParams(learning_rate=2e-3))
    losses.append(passed.result().metrics["loss:sum"] / answer_tokens)
    assert step.result().metrics["grad_norm"] > 0
seen["sft_losses"] = losses
output = sft.forward(right, "cross_entropy").result()
row = [float(x) for x in output.loss_fn_outputs[0]["logprobs"].data]
seen["rows"] = [len(row), len(tasks[0][0]) + len(tasks[0][1]) - 1, max(row) <= 0]

# State: a model made from it goes on as the first one does; without the optimiser it does not.
path = sft.save_state("after-sft").result().path
seen["path"] = path
seen["twice"] = failure(lambda: sft.save_state("after-sft").result())


def next_losses(client):
    client.forward_backward(right, "cross_entropy")
    client.optim_step(types.AdamParams(learning_rate=2e-3))
    return [float(x) for out in client.forward(right, "cross_entropy").result().loss_fn_outputs for x in out["logprobs"].data]


goes_on = next_losses(sft)
resumed = service.create_training_client_from_state_with_optimizer(path).result()
fresh = service.create_training_client_from_state(path).result()
seen["resumed_is_equal"] = next_losses(resumed) == goes_on
seen["fresh_is_equal"] = next_losses(fresh) == goes_on

# Sampling: from a name, from the base model, with log-probabilities of prompt and answer.
named = sft.save_weights_for_sampler("after-sft").result().path
sampler = service.create_sampling_client(model_path=named).result()
prompt, answer = tasks[0]
params = types.SamplingParams(max_tokens=8, temperature=0.0)
greedy = sampler.sample(prompt=types.ModelInput.from_ints(prompt), num_samples=1, sampling_params=params).result()
seen["greedy"] = [list(greedy.sequences[0].tokens), greedy.sequences[0].stop_reason, answer]
# A stop text ends an answer wherever the tokenizer cuts it: here each letter is a token, and the text is two.
short = service.create_sampling_client(base_model="tiny").result().sample(
    prompt=types.ModelInput.from_ints([1, 3] + [6 + b for b in b"Hello!"] + [4]), num_samples=3,
    sampling_params=types.SamplingParams(max_tokens=12, temperature=0.0, stop=["lo", "never said"]),
).result()
seen["stop_text"] = [[bytes(t - 6 for t in s.tokens).decode(), s.stop_reason] for s in short.sequences]
base = service.create_sampling_client(base_model="tiny").result()
scored = base.compute_logprobs(types.ModelInput.from_ints(prompt)).result()
seen["prompt_logprobs"] = [len(scored), len(prompt), scored[0], all(x <= 0 for x in scored[1:])]
top = base.sample(
    prompt=types.ModelInput.from_ints(prompt), num_samples=2, topk_sample_logprobs=3,
    sampling_params=types.SamplingParams(max_tokens=4, temperature=1.0, seed=5, stop=[]),
).result()
likeliest = top.sequences[0].topk_logprobs
seen["top"] = [len(top.sequences), top.sequences[0].stop_reason, [len(likeliest), len(likeliest[0])]]
checkpoints = tinker.RestClient(base_url=url, api_key="tml-secret").list_checkpoints(sft.model_id).result().checkpoints
seen["checkpoints"] = sorted([c.checkpoint_id, c.checkpoint_type] for c in checkpoints)

# Reinforcement: sample, credit, importance sampling, step.
policy = service.create_lora_training_client(base_model="tiny", rank=8, seed=2).result()
rewards, deviation = [], 0.0
for step in range(rl_steps):
    sampler = policy.save_weights_and_get_sampling_client().result()
    batch = [tasks[(16 * step + i) % len(tasks)] for i in range(16)]
    futures = [
        sampler.sample(
            prompt=types.ModelInput.from_ints(prompt), num_samples=8,
            sampling_params=types.SamplingParams(max_tokens=8, temperature=1.0, seed=1000 * step + i),
        )
        for i, (prompt, _) in enumerate(batch)
    ]
    data, total = [], 0.0
    for (prompt, answer), future in zip(batch, futures):
        sequences = future.result().sequences
        got = [float(list(s.tokens) == answer) for s in sequences]
        mean = sum(got) / len(got)
        total += mean
        for reward, s in zip(got, sequences):
            tokens = [int(t) for t in s.tokens]
            logprobs = [float(x) for x in s.logprobs]
            data.append(datum(prompt, tokens, logprobs=logprobs, advantages=[reward - mean] * len(tokens)))
    rewards.append(total / len(batch))
    loss = "ppo" if step == 1 else "cispo" if step == 2 else "importance_sampling"
    config = {"clip_high_threshold": 1.3} if loss == "ppo" else None
    passed = policy.forward_backward(data, loss, config)
    policy.optim_step(types.AdamParams(learning_rate=4e-3, beta2=0.95)).result()
    for d, out in zip(data, passed.result().loss_fn_outputs):
        sampled, now = d.loss_fn_inputs["logprobs"].data, out["logprobs"].data
        deviation = max([deviation] + [abs(float(q) - float(p)) for q, p in zip(sampled, now) if q != 0])
seen["rewards"] = rewards
seen["logprob_deviation"] = deviation

# What cannot be served says so, and the requests behind it are served.
bad_targets = types.Datum(
    model_input=types.ModelInput.from_ints([1, 2, 3]),
    loss_fn_inputs={"target_tokens": ints([2, 9, 4]), "weights": floats([1.0, 1.0, 1.0])},
)
seen["errors"] = {
    "loss": failure(lambda: fresh.forward_backward(right, "dro").result()),
    "targets": failure(lambda: fresh.forward_backward([bad_targets], "cross_entropy").result()),
    "no_gradients": failure(lambda: fresh.optim_step(types.AdamParams()).result()),
    "model": failure(lambda: service.create_lora_training_client(base_model="gpt-9").result()),
    "rank": failure(lambda: service.create_lora_training_client(base_model="tiny", rank=1000).result()),
    "path": failure(lambda: service.create_training_client_from_state("tinker://x/weights/y").result()),
    "token": failure(
        lambda: base.sample(
            prompt=types.ModelInput.from_ints([10**6]), num_samples=1, sampling_params=types.SamplingParams(max_tokens=1)
        ).result()
    ),
    "stranger": failure(lambda: tinker.ServiceClient(base_url=url, api_key="tml-other").get_server_capabilities()),
}
seen["after_errors"] = fresh.forward_backward(right, "cross_entropy").result().metrics["loss:sum"] > 0
service.close("success").future().result()
print(json.dumps(seen))
