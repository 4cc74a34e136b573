"""Makes golden-rl-verl.json: losses, gradients and advantages by verl's own functions, in float64.

    python make-rl-verl.py UNPACKED_VERL_WHEEL > golden-rl-verl.json

Needs torch and numpy. verl's package is not imported (it wants a cluster's worth of dependencies): its core_algos.py and
rollout_corr_helper.py are executed with small stand-ins for the modules that they import but that these functions do not
compute with; the masked reductions are verl's own, taken from its torch_functional.py.
"""

import ast
import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

torch.set_default_dtype(torch.float64)
root = Path(sys.argv[1]) / "verl"


def module(name, **members):
    made = types.ModuleType(name)
    made.__dict__.update(members)
    made.__path__ = []
    sys.modules[name] = made
    return made


def functions_of(path, names):
    tree = ast.parse(path.read_text())
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names]
    space = {"torch": torch}
    exec(compile(tree, str(path), "exec"), space)
    return {n: space[n] for n in names}


class Config(dict):
    """Attributes and .get, as verl's dataclass configs have."""

    __getattr__ = dict.__getitem__


masked = functions_of(root / "utils/torch_functional.py", ["masked_sum", "masked_mean", "masked_var", "masked_whiten"])
functional = module("verl.utils.torch_functional", **masked)
module("omegaconf", DictConfig=dict)
module("verl")
module("verl.utils", torch_functional=functional, as_torch_index=None, group_mean_std=None)
sys.modules["verl"].utils = sys.modules["verl.utils"]
module("verl.utils.import_utils", deprecated=lambda *a, **k: (lambda f: f))
module("verl.trainer")
module("verl.trainer.config", AlgoConfig=type("AlgoConfig", (Config,), {}))
module("verl.trainer.config.algorithm", RolloutCorrectionConfig=Config)
module("verl.workers")
module("verl.workers.config", ActorConfig=Config)
module("verl.workers.config.actor", PolicyLossConfig=Config)
module("verl.protocol", DataProto=object)


def load(name, path):
    made = module(name)
    made.__file__ = str(path)
    exec(compile(path.read_text(), str(path), "exec"), made.__dict__)
    return made


core = load("verl.trainer.ppo.core_algos", root / "trainer/ppo/core_algos.py")
corr = load("verl.trainer.ppo.rollout_corr_helper", root / "trainer/ppo/rollout_corr_helper.py")

B, T, GROUP = 8, 12, 4
generator = torch.Generator().manual_seed(20260822)


def rounded(x):
    return torch.tensor([[round(v, 5) for v in row] for row in x.tolist()])


def noise(scale):
    return scale * torch.randn(B, T, generator=generator)


log_prob = rounded(-0.05 - 3 * torch.rand(B, T, generator=generator))
old = rounded(torch.clamp(log_prob + noise(0.25), max=-0.001))  # as sampled
prox = rounded(torch.clamp(0.5 * (log_prob + old) + noise(0.1), max=-0.001))
ref = rounded(torch.clamp(log_prob + noise(0.4), max=-0.001))
old[4, 3] -= 1.5  # the dual clip's region, advantage below 0
old[1, 2] -= 2.0
old[6, 5] += 0.9 if old[6, 5] < -0.95 else 0.0
lengths = [12, 7, 1, 5, 12, 3, 9, 0]
mask = torch.zeros(B, T)
for i, n in enumerate(lengths):
    mask[i, :n] = 1.0
mask[0, 4:6] = 0.0  # what a tool said
mask[6, 2] = 0.0
rewards = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.0, 0.0, 1.0, 0.0])
index = np.array([i // GROUP for i in range(B)])
scores = torch.zeros(B, T)
for i, n in enumerate(lengths):
    if n:
        scores[i, n - 1] = rewards[i]

# Advantages.
estimators = {}
grpo, _ = core.compute_grpo_outcome_advantage(rewards[:, None].clone(), torch.ones(B, 1), index)
estimators["grpo"] = grpo[:, 0]
dr, _ = core.compute_grpo_outcome_advantage(
    rewards[:, None].clone(), torch.ones(B, 1), index, norm_adv_by_std_in_grpo=False
)
estimators["dr_grpo"] = dr[:, 0]
rloo, _ = core.compute_rloo_outcome_advantage(rewards[:, None].clone(), torch.ones(B, 1), index)
estimators["rloo"] = rloo[:, 0]
tokens = {}
for gamma in (1.0, 0.9):
    adv, _ = core.compute_reinforce_plus_plus_outcome_advantage(scores.clone(), mask, Config(gamma=gamma))
    tokens[f"reinforce_plus_plus_{gamma}"] = adv
kl = core.kl_penalty(old, ref, "k1") * mask
adv, _ = core.compute_reinforce_plus_plus_outcome_advantage(scores - 0.05 * kl, mask, Config(gamma=1.0))
tokens["reinforce_plus_plus_kl"] = adv
adv, _ = core.compute_reinforce_plus_plus_baseline_outcome_advantage(scores.clone(), mask, index)
tokens["reinforce_plus_plus_baseline"] = adv

# Losses.
cases = []
adv_bt = estimators["grpo"][:, None].expand(B, T)


def base(**k):
    return Config(
        clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, clip_ratio_c=3.0, tau_pos=1.0, tau_neg=1.05,
        policy_loss=Config(dro_beta=0.3), global_batch_info={}, **k,
    )


VERL = {"count_filtered": False, "filter_kl": True, "log_limit": 20.0}
LIMITS = {"low": -20.0, "high": 20.0}
NORMALISER = {
    "token-mean": {"kind": "token_mean"},
    "token-sum": {"kind": "token_sum"},
    "seq-mean-token-sum": {"kind": "sequence_mean_token_sum"},
    "seq-mean-token-sum-norm": {"kind": "sequence_mean_token_sum_norm", "length": T},
    "seq-mean-token-mean": {"kind": "sequence_mean_token_mean", "epsilon": 1e-8},
}


def clip(low=0.2, high=0.2, dual=3.0):
    return {"kind": "clip", "low": low, "high": high, "dual": dual, "cap": None}


def case(name, loss_name, surrogate, mode="token-mean", config=None, level="token", limits=LIMITS, anchor="sampled",
         correction=None, weight=None, filters=None, kl_type=None, mask=mask):
    x = log_prob.clone().requires_grad_(True)
    o = prox if anchor == "proximal" else old
    weights = None
    used = mask
    log_ratio = (o if anchor == "proximal" else x.detach()) - old
    if weight:
        weights, _ = corr.compute_rollout_correction_weights(log_ratio, mask, **weight)
    if filters:
        used, _ = corr.compute_rollout_rejection_mask(log_ratio, mask, **filters)
    cfg = config or base()
    if loss_name == "reinforce":
        per_token = -adv_bt * x * (1.0 if weights is None else weights)
        loss = core.agg_loss(per_token, used, mode)
    else:
        loss, _ = core.get_policy_loss_fn(loss_name)(o, x, adv_bt, used, mode, cfg, weights)
    term = None
    if kl_type:
        loss = loss + 0.05 * core.agg_loss(core.kl_penalty(x, ref, kl_type), used, mode)
        term = {"weight": 0.05, "estimator": kl_type.rstrip("+"), "gradient": "k2" if "+" in kl_type else "own",
                "log_limit": 20.0, "value_limit": 10.0}
    loss.backward()
    cases.append({
        "name": name, "advantages": "grpo", "loss": float(f"{loss.item():.10g}"),
        "grad": [[float(f"{v:.9g}") for v in row] for row in x.grad.tolist()],
        "config": {
            "surrogate": surrogate, "normaliser": NORMALISER[mode], "count_empty": False, "level": level,
            "anchor": anchor, "log_ratio": limits, "correction": {**VERL, **(correction or {})}, "kl": term,
        },
    })


for mode in NORMALISER:
    case(f"vanilla_{mode}", "vanilla", clip(), mode)
higher = base()
higher["clip_ratio_low"], higher["clip_ratio_high"] = 0.2, 0.28
case("vanilla_clip_higher", "vanilla", clip(high=0.28), config=higher)
tight = base()
tight["clip_ratio_c"] = 1.5
case("vanilla_dual_1.5", "vanilla", clip(dual=1.5), config=tight)
narrow = base()
narrow["clip_ratio_low"], narrow["clip_ratio_high"] = 0.03, 0.04
case("gspo", "gspo", clip(0.03, 0.04, None), "seq-mean-token-mean", narrow, "sequence_token", {"low": None, "high": 10.0})
case("gspo_token_mean", "gspo", clip(0.03, 0.04, None), "token-mean", narrow, "sequence_token", {"low": None, "high": 10.0})
case("sapo", "sapo", {"kind": "sapo", "temperature_positive": 1.0, "temperature_negative": 1.05}, "seq-mean-token-mean")
case("cispo", "cispo", {"kind": "cispo", "least": 0.8, "most": 1.2})
case("dro", "dro", {"kind": "dro", "beta": 0.3}, limits={"low": None, "high": None})
tv = base()
tv["clip_ratio"], tv["clip_ratio_c"] = 0.05, 20.0
case("dppo_tv", "dppo_tv", {"kind": "dppo_tv", "low": 0.05, "high": 0.05, "most": 20.0}, config=tv)
case("reinforce", "reinforce", {"kind": "reinforce"})
for kind in ("k1", "abs", "k2", "k3", "k3+"):
    case(f"vanilla_kl_{kind}", "vanilla", clip(), kl_type=kind)


def rule(level="token", lower=None, upper=2.0, outside="truncate", normalise=False):
    return {"weight": {"level": level, "lower": lower, "upper": upper, "outside": outside, "batch_normalise": normalise}}


case("decoupled_tis_token", "vanilla", clip(), anchor="proximal", correction=rule(upper=1.2),
     weight={"rollout_is": "token", "rollout_is_threshold": 1.2})
case("decoupled_tis_sequence", "vanilla", clip(), anchor="proximal", correction=rule("sequence", upper=1.5),
     weight={"rollout_is": "sequence", "rollout_is_threshold": 1.5})
case("decoupled_tis_normalised", "vanilla", clip(), anchor="proximal", correction=rule(upper=1.2, normalise=True),
     weight={"rollout_is": "token", "rollout_is_threshold": 1.2, "rollout_is_batch_normalize": True})
case("decoupled_icepop", "vanilla", clip(), anchor="proximal", correction=rule("token", 0.8, 1.25, "zero"),
     weight={"rollout_is": "token", "rollout_is_threshold": "0.8_1.25"})
case("bypass_reinforce_tis", "reinforce", {"kind": "reinforce"}, correction=rule(upper=1.5),
     weight={"rollout_is": "token", "rollout_is_threshold": 1.5})


def keep(**which):
    empty = {"ratio": None, "k2": None, "k3": None}
    return {"filters": {name: {**empty, **bounds} for name, bounds in which.items()}}


case("filter_token_ratio", "vanilla", clip(), anchor="proximal", kl_type="k3",
     correction=keep(token={"ratio": {"low": 0.85, "high": 1.25}}),
     filters={"rollout_rs": "token_k1", "rollout_rs_threshold": f"0.8_{1 / 0.85!r}"})
case("filter_sequence_geometric_mean", "vanilla", clip(), anchor="proximal", mode="seq-mean-token-mean",
     correction=keep(sequence_mean={"ratio": {"low": 0.9, "high": 1.05}}),
     filters={"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": f"{1 / 1.05!r}_{1 / 0.9!r}"})
case("filter_sequence_k3_and_worst_k2", "cispo", {"kind": "cispo", "least": 0.8, "most": 1.2},
     correction=keep(sequence_mean={"k3": 0.05}, sequence_worst={"k2": 0.3}),
     filters={"rollout_rs": "seq_mean_k3,seq_max_k2", "rollout_rs_threshold": "0.05,0.3"})

plain = lambda x: [[float(v) for v in row] for row in x.tolist()]
short = lambda x: [float(f"{v:.10g}") for v in x.tolist()]
json.dump({
    "made_with": f"verl 0.9.1 core_algos and rollout_corr_helper, torch {torch.__version__} float64 autograd; make-rl-verl.py",
    "conventions": "shapes [B][T]; grad = dLoss/dlogprobs; config is echo-trainer's LossConfig; old_logprobs are as sampled; "
                   "masks have holes (tool output) and one sequence is empty; estimators [B], token_estimators [B][T]",
    "B": B, "T": T, "group": GROUP, "rewards": rewards.tolist(), "lengths": lengths, "mask": plain(mask),
    "logprobs": plain(log_prob), "old_logprobs": plain(old), "proximal_logprobs": plain(prox), "ref_logprobs": plain(ref),
    "advantages": {k: short(v) for k, v in estimators.items()},
    "token_estimators": {k: [short(r) for r in v] for k, v in tokens.items()},
    "cases": cases,
}, sys.stdout)
print()
