"""What a recipe is made of: policy, reward and prompts, and what it refuses because the quantiles would mean nothing.

The references of a table are of one policy, drawn in one way, for its prompts as it read them. A recipe whose policy
starts elsewhere runs as well as any, and what it converges to is something else.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from calibrated_rewards.calibration.sources import Asked, prompts_from
from calibrated_rewards.cli.options import open_reward
from calibrated_rewards.evaluation.expectations import expect_of
from calibrated_rewards.files import Message, setting as given
from calibrated_rewards.models.fingerprint import tokenizer_digest, weights_digest, weights_of
from calibrated_rewards.models.text import Text
from calibrated_rewards.prompts import as_key, id_key, start_of
from calibrated_rewards.reward.calibrated_reward import CalibratedReward
from calibrated_rewards.samplers.policy import Policy
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.theory.named import NamedTransform
from calibrated_rewards.training.policy_model import place_of
from calibrated_rewards.training.raw import RawReward

# What draws from another distribution than softmax(logits / temperature), where the KL would mean something else.
PLAIN = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": []}


def opened(options: argparse.Namespace) -> tuple[Policy, CalibratedReward | RawReward, list[Asked]]:
    """The policy, the reward, which is verified, and the prompts; ValueError if they do not belong together."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reward = calibrated(options)
    asked = list(prompts_from(options.prompts, column=options.column, id_column=reward.id_column))
    check_prompts(reward, asked)
    meta = reward.table.meta
    decoding = decoding_of(meta, options.max_tokens, options.temperature, options.any_policy)
    at = place_of(options.policy)
    code = options.trust_remote_code
    model: Any = AutoModelForCausalLM.from_pretrained(at, dtype=options.dtype, trust_remote_code=code)
    policy = Policy(model, AutoTokenizer.from_pretrained(at, trust_remote_code=code), decoding, Text())
    if not options.any_policy:
        check_policy(policy, meta)
    policy.check([each.prompt for each in asked])
    reward.verify()
    return policy, RawReward(reward) if options.raw else reward, asked


def calibrated(options: argparse.Namespace) -> CalibratedReward:
    """The reward that was saved, with another transform if one is named; its beta goes with its transform."""
    named: NamedTransform | None = options.transform
    if options.raw and named is not None:
        raise ValueError("--raw is without a transform, got --transform as well")
    if options.raw and options.beta is None:
        raise ValueError("a beta is in the unit of the reward, and raw scores have their own: say --beta")
    if named is None:
        return open_reward(options.reward, trust=options.trust_remote_code)
    if named.kl is None and options.beta is None:
        raise ValueError(f"--transform {named.name} says no KL, and so no beta: say --beta, or {named.name}:KL")
    changes = {"transform": named.transform, "beta": options.beta, "scale": "unit"}
    reward: CalibratedReward = open_reward(options.reward, trust=options.trust_remote_code, **changes)
    if named.kl is None:
        return reward
    expected = expect_of(reward, kl=named.kl, procedure=named.procedure, name=named.name)
    if expected is None:
        raise ValueError(
            f"--transform {named.name} says a KL, whose beta is known for a reward of ranks alone, got "
            f"{reward.calibration!r}: say {named.name.rpartition(':')[0]}, and --beta"
        )
    if options.beta is None:
        sys.stderr.write("".join(f"{line}\n" for line in expected.lines()))
        return replace(reward, beta=expected.beta)
    if abs(options.beta - expected.beta) > 1e-4 * expected.beta:
        sys.stderr.write(
            f"--transform {named.name} takes beta={expected.beta:.6g} on this table, got --beta {options.beta:.6g}: "
            "that one is trained with, and the KL will be another than the one in the name. Leave --beta out to have "
            "that KL\n"
        )
    return reward


def decoding_of(
    meta: Mapping[str, Any], max_tokens: int | None, temperature: float | None, any_policy: bool = False
) -> Decoding:
    """How the references of a table were drawn; what is said here may differ from it only if any policy will do.

    >>> decoding_of({"sampler": {"decoding": {"max_tokens": 64, "temperature": 0.8, "top_p": 1.0}}}, None, None)
    Decoding(max_tokens=64, temperature=0.8, top_p=1.0, ...)
    """
    drawn = dict((meta.get("sampler") or {}).get("decoding") or {})
    bent = {name: drawn[name] for name, off in PLAIN.items() if name in drawn and drawn[name] != off}
    if bent:
        raise ValueError(
            f"the plain loops draw from the whole distribution, the table's references were drawn with {bent}: "
            "calibrate again without, or KL and quantiles are of another policy than the one that is trained"
        )
    for name, said in (("max_tokens", max_tokens), ("temperature", temperature)):
        if said is not None and drawn.get(name, said) != said and not any_policy:
            raise ValueError(
                Message(
                    f"the table's references were drawn with {given(name, str(drawn[name]))}, got "
                    f"{given(name, str(said))}: leave it out, or --any-policy to go on, and quantiles are of another "
                    "policy than the one that is trained"
                )
            )
    length = max_tokens or drawn.get("max_tokens")
    if length is None:
        raise ValueError("the table does not say how its references were drawn: say --max-tokens")
    at = drawn.get("temperature", 1.0) if temperature is None else temperature
    return Decoding(length, at, stop_token_ids=tuple(drawn.get("stop_token_ids", ())))


def check_prompts(reward: CalibratedReward, asked: Sequence[Asked]) -> None:
    """ValueError for a prompt whose id leads to the references of another: those of a text, say, that is now a chat.

    The policy would answer the one, and its answers be compared with answers to the other.
    """
    rows = reward.rows([each.prompt for each in asked], [each.id for each in asked])
    known = [(each, row) for each, row in zip(asked, rows.tolist(), strict=True) if row >= 0]
    for (each, _), key in zip(known, reward.table.keys([row for _, row in known]), strict=True):
        named = each.id is not None and key == id_key(each.id)
        if not named and key != as_key(each.prompt):
            by = "" if each.id is None else f" (id {each.id!r})"
            raise ValueError(
                f"the table knows {start_of(each.prompt)}{by} as another prompt, or in another form (text, messages): "
                "the policy would not answer what was calibrated. Calibrate these prompts as they are"
            )


def check_policy(policy: Policy, meta: Mapping[str, Any]) -> None:
    """ValueError for another policy than the one that drew the table's references; said if the table does not tell."""
    drew = meta.get("sampler") or {}
    if "weights" not in drew or not str(drew.get("kind")).startswith("hf"):
        sys.stderr.write(
            "the table does not say which weights drew its references: that they are these is not checked\n"
        )
    elif drew["weights"] != weights_as(policy.model, drew["dtype"]):
        _refuse("weights are others than those")
    if drew.get("tokenizer") not in (None, tokenizer_digest(policy.tokenizer)):
        _refuse("tokenizer is another than that")
    own, told = json.loads(json.dumps(policy.text.fingerprint(policy.tokenizer))), drew.get("text") or {}
    for name in ("chat", "template", "template_options", "special_tokens"):
        if name in told and told[name] != own[name]:
            _refuse(f"text settings ({name}) are others than those")


def weights_as(model: Any, dtype: str) -> str:
    """The digest of a model's weights as it would be had they been loaded in a dtype."""
    wanted = getattr(torch, dtype)
    weights = weights_of(model).items()
    return weights_digest({name: each.to(wanted) if each.is_floating_point() else each for name, each in weights})


def _refuse(what: str) -> None:
    raise ValueError(
        f"the policy's {what} of the policy that the table's references were drawn from: give that one, or calibrate "
        "this one, or --any-policy to go on, and quantiles are of another policy than the one that is trained"
    )
