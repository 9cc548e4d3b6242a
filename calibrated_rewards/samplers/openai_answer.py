"""What an OpenAI-compatible server is asked for K completions of a prompt, and how its answer is read."""

from collections.abc import Mapping, Sequence
from typing import Any

from calibrated_rewards.prompts import Completion, Prompt, start_of
from calibrated_rewards.samplers.decoding import Decoding
from calibrated_rewards.samplers.protocol import Finish, Rollout

# What servers call an end; "eos" and its like are TGI's.
FINISHES: dict[str | None, Finish | None] = {
    None: None,
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "tool_calls": "stop",
    "function_call": "stop",
    "length": "length",
}
# All servers take a seed of so many bits.
SEEDS = 2**31


def settings(decoding: Decoding, every: bool) -> dict[str, Any]:
    """A decoding in the API's words. What OpenAI's own API does not know is left out where it is off, unless `every`.

    >>> settings(Decoding(max_tokens=8, top_k=5), every=False)
    {'max_tokens': 8, 'temperature': 1.0, 'top_p': 1.0, 'top_k': 5}
    """
    others: dict[str, tuple[Any, bool]] = {
        "top_k": (decoding.top_k or -1, decoding.top_k > 0 or every),  # 0 is no top_k that every server takes
        "min_p": (decoding.min_p, decoding.min_p > 0 or every),
        "repetition_penalty": (decoding.repetition_penalty, decoding.repetition_penalty != 1 or every),
        "stop": (list(decoding.stop), bool(decoding.stop)),
        "stop_token_ids": (list(decoding.stop_token_ids), bool(decoding.stop_token_ids)),
    }
    said = {name: value for name, (value, on) in others.items() if on}
    usual = {"max_tokens": decoding.max_tokens, "temperature": decoding.temperature, "top_p": decoding.top_p}
    return {**usual, **said}


def asking(api: str, logprobs: bool) -> dict[str, Any]:
    """What asks for the log-probabilities of the tokens that were drawn, and no others."""
    if not logprobs:
        return {}
    return {"logprobs": True} if api == "chat" else {"logprobs": 0}


def rollouts(answer: Any, count: int, prompt: Prompt, logprobs: bool) -> list[Rollout]:
    """The rollouts in an answer, in the order of their indices."""
    choices = answer["choices"]
    if sorted(choice.get("index", 0) for choice in choices) != list(range(count)):
        raise ValueError(
            f"{len(choices)} choices, where n={count} were asked for: of a server that knows no n, ask for "
            "most_at_once=1"
        )
    used = (answer.get("usage") or {}).get("completion_tokens")
    alone = used if count == 1 and isinstance(used, int) else None
    return [_rollout(c, prompt, alone, logprobs) for c in sorted(choices, key=lambda choice: choice.get("index", 0))]


def _rollout(choice: Mapping[str, Any], prompt: Prompt, tokens: int | None, logprobs: bool) -> Rollout:
    reason = choice.get("finish_reason")
    if reason not in FINISHES:
        raise ValueError(f"a completion of {start_of(prompt)} is not whole: it ended by {reason!r}")
    completion = _said(choice["message"]) if "message" in choice else choice["text"]
    if not isinstance(completion, str | list):
        raise ValueError(f"a completion is a text, got {start_of(completion)}")
    drawn = _logprobs(choice) if logprobs else None
    if drawn is None:
        return Rollout(completion, tokens, FINISHES[reason])
    return Rollout(completion, len(drawn), FINISHES[reason], sum(drawn))


def _said(message: Mapping[str, Any]) -> Completion:
    """What the assistant says; with calls of tools, as a message."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    if thought:
        raise ValueError(
            f"the server takes the reasoning out of completions, {start_of(thought)}: a trainer's completions have it; "
            "serve the model without a reasoning parser"
        )
    said = message.get("content") or message.get("refusal") or ""
    calls = message.get("tool_calls")
    return [{"role": "assistant", "content": said, "tool_calls": calls}] if calls else said


def _logprobs(choice: Mapping[str, Any]) -> Sequence[float]:
    """That of each token, as completions or as chats have them."""
    given = choice.get("logprobs") or {}
    numbers = given["token_logprobs"] if "token_logprobs" in given else [each["logprob"] for each in given["content"]]
    return [float(number) for number in numbers]
