"""Start a training run: load policy, reward and prompts, and refuse a policy, decoding or prompts that do not fit.

The references of a table are of one policy, drawn in one way, for its prompts in one form. A run that starts elsewhere
works as well as any, and what it converges to is something else. At the end, `print_outcome` compares the log with the
optimum on the reward's table.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch

from calibrated_rewards.calibration.sources import Asked, prompts_from
from calibrated_rewards.evaluation.expectations import expect_of
from calibrated_rewards.files import Message, setting
from calibrated_rewards.models.fingerprint import tokenizer_digest, weights_digest, weights_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import as_key, id_key, start_of
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.reward.calibrators import Uncalibrated
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.table.selection import select_prompts
from calibrated_rewards.theory.named import NamedTransform
from calibrated_rewards.training.check_settings.rules import read_decoding
from calibrated_rewards.training.run_folder import RunFolder, resolve_policy

# Other values draw from another distribution than softmax(logits / temperature), where the KL would mean nothing.
WHOLE_DISTRIBUTION = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": []}
# The least value of a setting; learning rates are above 0.
LEAST = dict.fromkeys(("completions", "epochs", "minibatches", "prompts_a_step", "rows", "save_steps", "steps"), 1)
LEAST |= dict.fromkeys(("beta", "lora_layers", "lora_rank"), 0)
# Steps at the beginning and at the end over which the outcome is averaged.
AVERAGED_STEPS = 10


def option(default: Any, description: str, *choices: str) -> Any:
    """Declare a field of a run's settings, with its line in --help and, if they can be listed, its values."""
    return field(default=default, metadata={"help": description, "choices": choices or None})


def check_numbers(settings: Any, **least: float) -> None:
    """Raise ValueError for a number that no run can be made with, such as a learning rate of 0 or nan.

    `least` has further least values, or others than `LEAST`.
    """
    least = {**LEAST, **least}
    for each in fields(settings):
        name, value = each.name, getattr(settings, each.name)
        if name.endswith("lr") and not (isfinite(value) and value > 0):
            raise ValueError(Message(f"a run needs a finite {name} > 0, got {setting(name, str(value))}"))
        if name in least and not (isfinite(value) and value >= least[name]):
            raise ValueError(Message(f"a run needs {name} >= {least[name]}, got {setting(name, str(value))}"))
        if value != value:
            raise ValueError(Message(f"a run needs {name} to be a number, got {setting(name, str(value))}"))


@dataclass(frozen=True)
class Launch:
    """The parts of a run and where it leaves its files, beside the settings of its trainer."""

    policy: str
    reward: str
    out: Path
    prompts: str = ""
    """For the trainers that draw."""
    rollouts: Path | None = None
    """The directory of the calibration that offline training learns from."""
    column: str | None = None
    transform: NamedTransform | None = None
    """In place of the reward's; one that names a KL brings its beta."""
    beta: float | None = None
    """None for the reward's, or the one that the transform brings."""
    raw: bool = False
    """Train on the raw scores."""
    max_tokens: int | None = None
    temperature: float | None = None
    any_policy: bool = False
    """Go on where policy or decoding are not those that the table was made with."""
    dtype: str = "float32"
    device: str | None = None
    trust_remote_code: bool = False
    force: bool = False
    """Remove the files of another run, in the plain loops."""
    start: str | None = None
    """A model trained from the policy, offline say, with which the plain loops begin; the KL is to the policy."""
    most_ties: float | None = None
    """Leave out prompts whose references tie more often (`table.select_prompts`); with both None, no prompt."""
    least_spread: float | None = None
    """Leave out prompts whose references spread less."""
    report_to: Sequence[str] = ()
    """Trackers of the metrics, by the names of transformers."""
    check_rollouts: Path | None = None
    """Directory of a calibration: on rollouts of its prompts that are not trained on the policy is checked."""
    check_every: int = 20
    """Steps from one check to the next."""
    check_prompts: int = 64
    """Prompts of a check, at most."""
    judge: str | None = None
    """A second scorer of the rollouts, for the win rates of a check."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """The loaded parts of a run, which fit together."""

    policy: Policy
    reward: CalibratedReward
    prompts: list[Asked]
    beta: float | None
    """As given, or the reward's; None where neither says one."""

    def complete(self, settings: Any) -> Any:
        """Put the run's beta into its settings, whose own is a mere default."""
        return settings if self.beta is None else replace(settings, beta=self.beta)


def load_inputs(launch: Launch) -> Inputs:
    """Load policy, reward and prompts, and verify the reward; ValueError if they do not fit together."""
    reward = load_reward(launch)
    prompts = list(prompts_from(launch.prompts, column=launch.column, id_column=reward.id_column))
    check_prompts(reward, prompts)
    prompts = leave_out_prompts(launch, reward, prompts)
    policy = load_policy(launch, reward.table.meta)
    policy.check([each.prompt for each in prompts])
    reward.verify()
    beta = reward.beta if launch.beta is None else launch.beta
    if launch.raw:
        reward = replace(reward, calibration=Uncalibrated(), beta=None)
    return Inputs(policy, reward, prompts, beta)


def load_policy(launch: Launch, meta: Mapping[str, Any]) -> Policy:
    """Load the policy, with the decoding of a table's references; ValueError if it is another one than theirs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    decoding = choose_decoding(meta, launch.max_tokens, launch.temperature, launch.any_policy)
    path, trust = resolve_policy(launch.policy), launch.trust_remote_code
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=launch.dtype, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    policy = Policy(model, tokenizer, decoding, Text())
    if not launch.any_policy:
        check_policy(policy, meta)
    return policy


def leave_out_prompts(launch: Launch, reward: CalibratedReward, prompts: list[Asked]) -> list[Asked]:
    """Leave out prompts whose references tie or spread too little, if the launch says so, and print how many."""
    limits = {name: getattr(launch, name) for name in ("most_ties", "least_spread")}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if not limits:
        return prompts
    selection = select_prompts(reward.table, [each.prompt for each in prompts], [each.id for each in prompts], **limits)
    sys.stderr.write(f"{selection}\n")
    return [prompts[i] for i in selection.kept]


def load_reward(launch: Launch) -> CalibratedReward:
    """Load the saved reward, with another transform if one is named; its beta goes with its transform."""
    named, beta = launch.transform, launch.beta
    if launch.raw and named is not None:
        raise ValueError("--raw is without a transform, got --transform as well")
    if launch.raw and beta is None:
        raise ValueError("a beta is in the unit of the reward, and raw scores have their own: say --beta")
    if named is None:
        return CalibratedReward.from_pretrained(launch.reward, trust_remote_code=launch.trust_remote_code)
    if named.kl is None and beta is None:
        raise ValueError(f"--transform {named.name} says no KL, and so no beta: say --beta, or {named.name}:KL")
    reward = CalibratedReward.from_pretrained(
        launch.reward,
        trust_remote_code=launch.trust_remote_code,
        transform=named.transform,
        beta=beta,
        scale="unit",
    )
    if named.kl is None:
        return reward
    expected = expect_of(reward, kl=named.kl, procedure=named.procedure, name=named.name)
    if expected is None:
        raise ValueError(
            f"--transform {named.name} says a KL, whose beta is known for a reward of ranks alone, got "
            f"{reward.calibration!r}: say {named.name.rpartition(':')[0]}, and --beta"
        )
    if beta is None:
        sys.stderr.write("".join(f"{line}\n" for line in expected.lines()))
        return replace(reward, beta=expected.beta)
    if abs(beta - expected.beta) > 1e-4 * expected.beta:
        sys.stderr.write(
            f"--transform {named.name} takes beta={expected.beta:.6g} on this table, got --beta {beta:.6g}: "
            "that one is trained with, and the KL will be another than the one in the name. Leave --beta out to have "
            "that KL\n"
        )
    return reward


def choose_decoding(
    meta: Mapping[str, Any], max_tokens: int | None, temperature: float | None, any_policy: bool = False
) -> Decoding:
    """Draw as the references of a table were drawn; another length or temperature only where any policy will do.

    >>> choose_decoding({"sampler": {"decoding": {"max_tokens": 64, "temperature": 0.8, "top_p": 1.0}}}, None, None)
    Decoding(max_tokens=64, temperature=0.8, top_p=1.0, ...)
    """
    recorded = dict(read_decoding(meta) or {})
    bent = {name: recorded[name] for name, off in WHOLE_DISTRIBUTION.items() if name in recorded}
    bent = {name: value for name, value in bent.items() if value != WHOLE_DISTRIBUTION[name]}
    if bent:
        raise ValueError(
            f"the plain loops draw from the whole distribution, the table's references were drawn with {bent}: "
            "calibrate again without, or KL and quantiles are of another policy than the one that is trained"
        )
    for name, value in (("max_tokens", max_tokens), ("temperature", temperature)):
        if value is not None and recorded.get(name, value) != value and not any_policy:
            raise ValueError(
                Message(
                    f"the table's references were drawn with {setting(name, str(recorded[name]))}, got "
                    f"{setting(name, str(value))}: leave it out, or --any-policy to go on, and quantiles are of "
                    "another policy than the one that is trained"
                )
            )
    length = max_tokens or recorded.get("max_tokens")
    if length is None:
        raise ValueError("the table does not say how its references were drawn: say --max-tokens")
    heat = recorded.get("temperature", 1.0) if temperature is None else temperature
    return Decoding(length, heat, stop_token_ids=tuple(recorded.get("stop_token_ids") or ()))


def check_prompts(reward: CalibratedReward, prompts: Sequence[Asked]) -> None:
    """Raise ValueError for a prompt whose id leads to the references of another: of a text, say, that is now a chat.

    The policy would answer the one, and its answers be compared with answers to the other.
    """
    rows = reward.rows([each.prompt for each in prompts], [each.id for each in prompts])
    calibrated = [(each, row) for each, row in zip(prompts, rows.tolist(), strict=True) if row >= 0]
    for (each, _), key in zip(calibrated, reward.table.keys([row for _, row in calibrated]), strict=True):
        if key != as_key(each.prompt) and (each.id is None or key != id_key(each.id)):
            by = "" if each.id is None else f" (id {each.id!r})"
            raise ValueError(
                f"the table knows {start_of(each.prompt)}{by} as another prompt, or in another form (text, messages): "
                "the policy would not answer what was calibrated. Calibrate these prompts as they are"
            )


def check_policy(policy: Policy, meta: Mapping[str, Any]) -> None:
    """Raise ValueError for another policy than the table's; print that it is not checked if the table does not say."""
    sampler = meta.get("sampler")
    sampler = sampler if isinstance(sampler, Mapping) else {}
    wrong = None
    if not {"weights", "dtype"} <= sampler.keys() or not str(sampler.get("kind")).startswith("hf"):
        sys.stderr.write(
            "the table does not say which weights drew its references: that they are these is not checked\n"
        )
    elif sampler["weights"] != digest_weights(policy.model, sampler["dtype"]):
        wrong = "weights are others than those"
    if wrong is None and sampler.get("tokenizer") not in (None, tokenizer_digest(policy.tokenizer)):
        wrong = "tokenizer is another than that"
    here, there = json.loads(json.dumps(policy.text.fingerprint(policy.tokenizer))), sampler.get("text")
    for name in ("chat", "template", "template_options", "special_tokens"):
        if wrong is None and isinstance(there, Mapping) and name in there and there[name] != here[name]:
            wrong = f"text settings ({name}) are others than those"
    if wrong is not None:
        raise ValueError(
            f"the policy's {wrong} of the policy that the table's references were drawn from: give that one, or "
            "calibrate this one, or --any-policy to go on, and quantiles are of another policy than the one that is "
            "trained"
        )


def digest_weights(model: Any, dtype: str) -> str:
    """Digest a model's weights as if they had been loaded in a dtype."""
    kind = getattr(torch, dtype)
    weights = weights_of(model).items()
    return weights_digest({name: each.to(kind) if each.is_floating_point() else each for name, each in weights})


def print_outcome(folder: RunFolder, reward: Any, beta: float) -> None:
    """Print first and last steps, the optimum that they should come to, and where model and log are."""
    rows = folder.read_log()
    text = f"{summarise_steps(rows)}{summarise_check(rows)}{compare_with_optimum(rows, reward, beta)}"
    sys.stdout.write(f"{text}model: {folder.model_folder}\nlog: {folder.log}\n")


def compare_with_optimum(rows: Sequence[Mapping[str, float]], reward: Any, beta: float) -> str:
    """Say the KL at the optimum of a calibrated reward on its table, and what to do if the last steps are far off."""
    expected = expect_of(reward, beta=beta) if isinstance(reward, CalibratedReward) and rows and beta > 0 else None
    if expected is None:
        return ""
    text = "".join(f"{line}\n" for line in expected.lines())
    low, high = sorted([expected.kl, expected.kl if expected.theory_kl is None else expected.theory_kl])
    last = _average(_first_and_last(rows)[-1], "kl")
    if last < low / 4:
        return f"{text}the last steps' KL, {last:.3g}, is far below that: more steps or a larger --lr\n"
    if last > 2 * high:
        return f"{text}the last steps' KL, {last:.3g}, is far above that: a smaller --lr\n"
    return text


def summarise_steps(rows: Sequence[Mapping[str, float]]) -> str:
    """Average reward, quantile, if there is one, KL and objective over the first steps and over the last.

    >>> rows = [{"step": i, "reward": i, "u": 0.5, "kl": 0.1 * i, "objective": 0.9 * i} for i in range(4)]
    >>> print(summarise_steps(rows), summarise_steps(rows[:1]), sep="")
    steps 0 to 1: reward 0.5, u 0.5, KL 0.05, objective 0.45
    steps 2 to 3: reward 2.5, u 0.5, KL 0.25, objective 2.25
    step 0: reward 0, u 0.5, KL 0, objective 0
    <BLANKLINE>
    """
    lines = []
    for part in _first_and_last(rows):
        first, last = part[0]["step"], part[-1]["step"]
        steps = f"step {first}" if first == last else f"steps {first} to {last}"
        columns = {"reward": "reward", "u": "u", "kl": "KL", "objective": "objective"}
        numbers = [f"{label} {_average(part, name):.4g}" for name, label in columns.items() if name in part[0]]
        lines.append(f"{steps}: {', '.join(numbers)}\n")
    return "".join(lines)


def summarise_check(rows: Sequence[Mapping[str, float]]) -> str:
    """Say what the last check on held-out rollouts found; empty where there was none.

    >>> check = {"kl": 0.21, "correlation": 0.6, "best_of_4/win_rate": 0.655, "best_of_4/standard_error": 0.01}
    >>> print(summarise_check([{"step": 19, **{f"held_out/{name}": value for name, value in check.items()}}]), end="")
    held-out check after step 19: KL 0.21, correlation with the target 0.6, win rate 65.5 % (best of 4)
    """
    row = next((each for each in reversed(rows) if "held_out/kl" in each), None)
    if row is None:
        return ""
    labels = {"held_out/kl": "KL", "held_out/correlation": "correlation with the target"}
    parts = [f"{label} {row[name]:.3g}" for name, label in labels.items() if name in row]
    for name, value in row.items():
        if name.endswith("/win_rate"):
            procedure = name.split("/")[1].replace("_", " ")
            parts.append(f"win rate {100 * value:.1f} % ({procedure})")
    return f"held-out check after step {row['step']}: {', '.join(parts)}\n"


def _first_and_last(rows: Sequence[Mapping[str, float]]) -> list[Sequence[Mapping[str, float]]]:
    count = max(1, min(AVERAGED_STEPS, len(rows) // 2))
    return [rows[:count], rows[-count:]] if len(rows) > 1 else [rows][: len(rows)]


def _average(rows: Sequence[Mapping[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)
