"""Options that name the models of a command, the reward model and the reference policy, loaded here or on a server."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli.options import (
    Real,
    Whole,
    error_text,
    open_any_reward,
    parse_setting,
    read_text,
    refuse_options,
    split_name,
)
from calibrated_rewards.models.labels import Difference, Expected, Label, Labels, Levels, Ordinal, Weighted
from calibrated_rewards.models.server_address import is_variable
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.protocol import fingerprint

if TYPE_CHECKING:
    from calibrated_rewards.models.text import Text
    from calibrated_rewards.samplers.protocol import Sampler
    from calibrated_rewards.scorers.protocol import Scorer


DIALECTS = ("native", "vllm", "vllm-score", "openrlhf")
ENGINES = ("hf", "continuous", "vllm", "openai")
# Options of a model that is loaded here, and of one on a server, with their defaults.
LOADED: dict[str, Any] = {
    "kind": None,
    "option": [],
    "batch_tokens": None,
    "dtype": "auto",
    "device": None,
    "trust_remote_code": False,
}
SERVED: dict[str, Any] = {"server": None, "served_model": None, "tokenizer": None}
POLICY_LOADED: dict[str, Any] = {"policy_dtype": "auto", "policy_device": None, "policy_trust_remote_code": False}
POLICY_SERVED: dict[str, Any] = {"policy_served_model": None, "policy_api": None}
NO_SETTINGS = {"name_or_path": "--reward-model", "text": "--max-length and --chat-template"}
LABELS_OF_NUMBERS: dict[str, Callable[[Any], Labels]] = {"expected": Expected, "weighted": Weighted}
# Each number of a decoding with its type, metavar and help; the defaults are those of Decoding.
DECODING: dict[str, tuple[Callable[[str], Any], str, str]] = {
    "temperature": (Real(1e-4), "T", "divisor of the logits (default: 1)"),
    "top_p": (
        Real(0.0, 1.0, above=True),
        "P",
        "draw from the likeliest tokens of total probability P (default: 1, off)",
    ),
    "top_k": (Whole(0), "N", "draw from the N likeliest tokens (default: 0, off)"),
    "min_p": (Real(0.0, 1.0), "P", "drop tokens less likely than P times the likeliest (default: 0, off)"),
    "repetition_penalty": (Real(0.0, above=True), "X", "divisor for tokens that occurred already (default: 1, off)"),
}
OPTION_HELP = "another argument of load_scorer, such as --option mark=<extra_0>; the value is JSON, or else text"
POLICY_OPTION_HELP = (
    "another argument of the engine, such as --policy-option gpu_memory_utilization=0.8, or concurrency=64 for a "
    "server; the value is JSON, or else text"
)
LABEL_HELP = (
    "how several labels make one score: 3 (logit of that label), 1-0 (logit 1 minus logit 0), expected:1,2,3,4,5 "
    "(their expected value), levels:6:3,2,1 (of logits 6 to 8 alone), weighted:1,-0.5 (a weighted sum), ordinal (the "
    "expected class)"
)
COST_HELP = (
    "the model's higher is worse (a cost or toxicity model): its score is multiplied by -1; --no-cost if the names of "
    "its labels suggest that wrongly"
)
SERVER_HELP = (
    "The token of the server, if it needs one, is read from CALIBRATED_REWARDS_TOKEN, and the\n"
    "server that it is for from CALIBRATED_REWARDS_TOKEN_URL, such as http://rm:8000. '$NAME' as a\n"
    "URL is the value of that environment variable."
)
POLICY_SERVER_HELP = (
    "The token of the server, if it needs one, is read from CALIBRATED_REWARDS_POLICY_TOKEN, and\n"
    "the server that it is for from CALIBRATED_REWARDS_POLICY_TOKEN_URL, such as http://host:8000;\n"
    "for OpenAI's own hosts from OPENAI_API_KEY."
)


def add_reward_model_options(parser: argparse.ArgumentParser, *, several: bool = False, required: bool = True) -> None:
    """Add --reward-model and the options that load it; with `several`, it may be repeated as NAME=PATH."""
    group = parser.add_argument_group("reward model")
    model = "a folder, a name on the Hugging Face Hub, or the URL of a server"
    if several:
        text = f"{model}; repeat it as NAME=PATH for several, which share the options below"
        group.add_argument("--reward-model", action="append", default=[], metavar="[NAME=]PATH|ID|URL", help=text)
    else:
        group.add_argument("--reward-model", required=required, metavar="PATH|ID|URL", help=model)
    add = group.add_argument
    add("--kind", help="the kind of model, where the checkpoint does not tell: judge, process, ...")
    add("--option", action="append", default=[], type=parse_setting, metavar="NAME=VALUE", help=OPTION_HELP)
    add("--label", type=parse_labels, metavar="HOW", help=LABEL_HELP)
    add("--cost", action=argparse.BooleanOptionalAction, default=None, help=COST_HELP)
    add("--max-length", type=Whole(2), metavar="TOKENS", help="longest input; default: what the model can read")
    add("--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the tokenizer's")
    add("--batch-tokens", type=Whole(1), metavar="TOKENS", help="tokens in a batch, padding included")
    add("--dtype", default="auto", help="float32, bfloat16 (bf16) or float16 (fp16); default: auto, as saved")
    add("--device", help="cpu, cuda, cuda:1 or mps; default: a GPU if there is one")
    add("--revision", help="a branch, tag or commit on the Hub")
    text = "run code that comes with a checkpoint or a saved reward"
    add("--trust-remote-code", action="store_true", help=text)
    group = parser.add_argument_group("reward model on a server", SERVER_HELP)
    group.add_argument("--server", choices=DIALECTS, help="the server's API; default: native, this library's own")
    group.add_argument("--served-model", metavar="NAME", help="the model's name on the server")
    text = "a tokenizer to render and cut text here (vllm, openrlhf)"
    group.add_argument("--tokenizer", metavar="PATH|ID", help=text)


def check_cost(place: str, saved: Mapping[str, Any] | None, scorer: "Scorer") -> None:
    """Refuse a reward model with --cost for scores that were made without, and the other way round."""
    if not saved:
        return
    was_cost, is_cost = saved.get("kind") == "cost", fingerprint(scorer).get("kind") == "cost"
    if was_cost and not is_cost:
        raise ValueError(
            f"{place} was made with --cost: its scores are the reward model's times -1, say --cost here too"
        )
    if is_cost and not was_cost:
        raise ValueError(
            f"{place} was made without --cost: its scores are the reward model's own, leave --cost out; or calibrate "
            "with --cost under another name, --reward-model NAME=PATH"
        )


def check_costs(file: Path, scorers: Mapping[str, "Scorer"]) -> None:
    """Refuse reward models whose --cost is not that of the run whose settings are in a file, if there is one."""
    if file.is_file():
        saved = json.loads(file.read_text(encoding="utf-8")).get("scorers", {})
        for name, scorer in scorers.items():
            check_cost(f"{file}: the scorer {name}", saved.get(name), scorer)


def parse_labels(text: str) -> Labels:
    """Parse --label, the labels that a score is read from.

    >>> parse_labels("3"), parse_labels("1-0"), parse_labels("expected:1,2,3"), parse_labels("ordinal")
    (Label(index=3), Difference(good=1, bad=0), Expected(values=(1.0, 2.0, 3.0)), Ordinal())
    >>> parse_labels("levels:6:3,2,1")
    Levels(values=(3.0, 2.0, 1.0), first=6)
    """
    name, _, numbers = text.partition(":")
    make: Callable[..., Labels] = Ordinal
    arguments: tuple[Any, ...] = ()
    try:
        if name in LABELS_OF_NUMBERS:
            make, arguments = LABELS_OF_NUMBERS[name], (tuple(map(float, numbers.split(","))),)
        elif name == "levels":
            first, _, values = numbers.partition(":")
            make, arguments = Levels, (tuple(map(float, values.split(","))), int(first))
        elif text != "ordinal":
            good, minus, bad = text.partition("-")
            make, arguments = (Difference, (int(good), int(bad))) if minus else (Label, (int(good),))
    except ValueError:
        forms = "3, 1-0, expected:1,2,3, levels:FIRST:3,2,1, weighted:1,-0.5 or ordinal"
        raise argparse.ArgumentTypeError(f"a label is {forms}, got {text!r}") from None
    try:
        return make(*arguments)
    except ValueError as error:  # the rule that the numbers break
        raise argparse.ArgumentTypeError(str(error)) from None


def is_url(model: str) -> bool:
    """Return True if a model is named by the URL of its server, or by a variable that holds one."""
    return model.lower().startswith(("http://", "https://")) or is_variable(model)


def load_reward_model(options: argparse.Namespace) -> "Scorer":
    """Load the reward model that the options name."""
    if is_url(options.reward_model):
        from calibrated_rewards.models.server_address import token_for
        from calibrated_rewards.scorers.remote import Remote

        refuse_options(options, LOADED, "the server loads the model")
        scorer = Remote(options.reward_model, choose_dialect(options), token=token_for(options.reward_model))
        return Cost(scorer) if options.cost else scorer
    refuse_options(options, SERVED, "--reward-model is no URL")
    if os.path.isfile(os.path.join(options.reward_model, "reward.json")):
        return load_combined_reward(options)
    from calibrated_rewards.scorers.loading import load_scorer

    return load_scorer(options.reward_model, **collect_settings(options))


def load_combined_reward(options: argparse.Namespace) -> "Scorer":
    """Load a combined reward, which is a scorer; a calibrated one is refused, since its scores are calibrated."""
    from calibrated_rewards.reward.combined import CombinedReward

    own = {name: default for name, default in LOADED.items() if name != "trust_remote_code"}
    refuse_options(options, own, "a combined reward says how its reward models are loaded")
    reward = open_any_reward(options.reward_model, trust=options.trust_remote_code)
    if not isinstance(reward, CombinedReward):
        raise ValueError(
            f"a reward model gives raw scores, {options.reward_model} is a calibrated reward: name its reward model"
        )
    return Cost(reward) if options.cost else reward


def load_reward_models(options: argparse.Namespace) -> "Scorer | dict[str, Scorer]":
    """Load the reward model of a command that takes several; a dict if they are named."""
    models = [split_name(each) for each in options.reward_model]
    names = [name for name, _ in models]
    if names != [None] and (None in names or len({*names}) < len(names)):
        raise ValueError(
            f"of several, each --reward-model needs a name of its own, NAME=PATH; got {', '.join(options.reward_model)}"
        )
    scorers = {
        name: load_reward_model(argparse.Namespace(**{**vars(options), "reward_model": model}))
        for name, model in models
    }
    return scorers[None] if names == [None] else {str(name): scorer for name, scorer in scorers.items()}


def collect_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Collect the arguments of `load_scorer`."""
    settings = dict(options.option)
    for name, instead in NO_SETTINGS.items():
        if name in settings:
            raise ValueError(f"--option {name}=...: there is no such option, {instead} say it")
    names = ("kind", "cost", "batch_tokens", "dtype", "device", "revision", "trust_remote_code")
    return {
        **{name: getattr(options, name) for name in names},
        "labels": options.label,
        "text": make_text(options.chat_template, "--chat-template", options.max_length),
        **settings,
    }


def make_text(template: Path | None, option: str, max_length: int | None = None) -> "Text | None":
    """Make the settings by which text becomes tokens; None if no option names one."""
    if max_length is None and template is None:
        return None
    from calibrated_rewards.models.text import Text

    return Text(max_length=max_length, template=read_text(template, option) if template else None)


def choose_dialect(options: argparse.Namespace) -> Any:
    """Choose the API of a reward model's server."""
    from calibrated_rewards.models.server_address import HIDDEN, redact_url
    from calibrated_rewards.scorers.remote import Native, OpenRlhf
    from calibrated_rewards.scorers.remote_vllm import Vllm, VllmScore

    text = make_text(options.chat_template, "--chat-template", options.max_length)
    server = options.server or DIALECTS[0]
    if server.startswith("vllm") and not options.served_model:
        raise ValueError("vLLM asks for the name that a model is served under: say --served-model NAME")
    check_server_options(options, server, text)
    url = redact_url(options.reward_model)
    if not options.served_model and HIDDEN in url:
        raise ValueError(f"{url} may have a token in its path, so it names no model: say --served-model NAME")
    name = options.served_model or url
    reading: dict[str, Any] = {} if text is None else {"text": text}
    if options.tokenizer:
        reading["tokenizer"] = load_tokenizer(options.tokenizer, options.revision)
    if server == "vllm":
        return Vllm(name, labels=options.label, **reading)
    if server == "openrlhf":
        return OpenRlhf(name, **reading)
    return VllmScore(name) if server == "vllm-score" else Native(name)


def check_server_options(options: argparse.Namespace, server: str, text: "Text | None") -> None:
    """Refuse options that have no effect on a server, or that lack another one."""
    if server != "vllm":
        refuse_options(options, {"label": None}, f"--server {server} makes one score of them itself")
    if server not in ("vllm", "openrlhf"):
        if text is not None or options.tokenizer:
            raise ValueError(f"--server {server} renders text itself: no --tokenizer, --max-length, --chat-template")
    elif text is not None and not options.tokenizer:
        raise ValueError("--max-length and --chat-template need the reward model's tokenizer: say --tokenizer PATH|ID")
    if not options.tokenizer:
        refuse_options(options, {"revision": None}, "for a server, it is the revision of --tokenizer")


def load_tokenizer(place: str, revision: str | None) -> Any:
    """Load a tokenizer that renders text for a server."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place, **({} if revision is None else {"revision": revision}))


def check_server(scorer: "Scorer", prompt: Any, completion: Any) -> None:
    """Ask a reward model's server once: raise now if it is not there or refuses access, before any check fails."""
    try:
        from calibrated_rewards.models.http_client import Refused
        from calibrated_rewards.scorers.remote import Remote
    except ImportError:
        return
    if isinstance(scorer, Cost):
        scorer = scorer.scorer
    if not isinstance(scorer, Remote):
        return
    try:
        replace(scorer, retries=min(scorer.retries, 1), show_progress=False)([prompt], [completion])
    except Refused:
        raise
    except ValueError:
        return  # it answers: the checks report what is wrong with its answers


def add_policy_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Add --policy, the options that load it, and those of its decoding."""
    add = parser.add_argument_group("reference policy").add_argument
    text = "a folder, a name on the Hugging Face Hub, or the URL of a server"
    add("--policy", required=required, metavar="PATH|ID|URL", help=text)
    text = "what generates; default: hf, or openai (any server with its API) for a URL"
    add("--engine", choices=ENGINES, help=text)
    add("--policy-dtype", default="auto", metavar="DTYPE", help="as --dtype, for the policy; default: auto, as saved")
    add("--policy-device", metavar="DEVICE", help="as --device, for the policy; default: a GPU if there is one")
    add("--policy-revision", metavar="REVISION", help="a branch, tag or commit on the Hub")
    add("--policy-tokenizer", metavar="PATH|ID", help="its tokenizer, where that does not lie beside it")
    add("--policy-chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the tokenizer's")
    add("--policy-trust-remote-code", action="store_true", help="run code that comes with the policy")
    setting: dict[str, Any] = {"action": "append", "default": [], "type": parse_setting, "metavar": "NAME=VALUE"}
    add("--policy-option", help=POLICY_OPTION_HELP, **setting)
    group = parser.add_argument_group("reference policy on a server", POLICY_SERVER_HELP)
    group.add_argument("--policy-served-model", metavar="NAME", help="the policy's name on the server")
    text = "completions: text, or tokens by --policy-tokenizer (default); chat: the server renders messages"
    group.add_argument("--policy-api", choices=("completions", "chat"), help=text)
    group = parser.add_argument_group("decoding", "As in training: with other settings it is another policy.")
    text = "longest completion, in tokens"
    group.add_argument("--max-tokens", type=Whole(1), required=required, metavar="N", help=text)
    defaults = {each.name: each.default for each in fields(Decoding)}
    for name, (kind, metavar, text) in DECODING.items():
        option = f"--{name.replace('_', '-')}"
        group.add_argument(option, type=kind, default=defaults[name], metavar=metavar, help=text)
    text = "a text that ends a completion; may be repeated"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=text)


def build_decoding(options: argparse.Namespace) -> Decoding:
    """Build the decoding that the options name."""
    if options.max_tokens is None:
        raise ValueError(
            "sampling needs --max-tokens N, the most tokens of a completion: give the trainer's own number"
        )
    numbers = {name: getattr(options, name) for name in DECODING}
    return Decoding(max_tokens=options.max_tokens, stop=tuple(options.stop), **numbers)


def load_policy(options: argparse.Namespace, policy: str | None = None, decoding: Decoding | None = None) -> "Sampler":
    """Load the policy that the options name; or another one, or with another decoding, by the same options."""
    policy = options.policy if policy is None else policy
    if policy is None:
        raise ValueError("sampling needs --policy PATH|ID|URL")
    decoding, url = decoding or build_decoding(options), is_url(policy)
    engine: Any = options.engine or ("openai" if url else "hf")
    if url != (engine == "openai"):
        from calibrated_rewards.models.server_address import redact_url

        name = redact_url(policy) if url else policy  # a URL may hold a secret
        raise ValueError(f"--engine openai and a URL belong together, got --policy {name} --engine {engine}")
    text = make_text(options.policy_chat_template, "--policy-chat-template")
    if url:
        return _connect_policy(options, policy, decoding, text)
    refuse_options(options, POLICY_SERVED, "--policy is no URL")
    if engine == "vllm":
        why = "vLLM takes the GPUs that it sees (CUDA_VISIBLE_DEVICES)"
        refuse_options(options, {"policy_device": None}, why)
    from calibrated_rewards.samplers.loading import load_sampler

    settings = {"device": options.policy_device, "tokenizer": options.policy_tokenizer}
    try:
        return load_sampler(
            policy,
            decoding,
            engine=engine,
            text=text,
            dtype=options.policy_dtype,
            revision=options.policy_revision,
            trust_remote_code=options.policy_trust_remote_code,
            **{name: value for name, value in settings.items() if value is not None},
            **dict(options.policy_option),
        )
    except TypeError as error:  # an option that the engine does not know
        raise TypeError(error_text(error, "--policy-option {name}={value}")) from error


def _connect_policy(options: argparse.Namespace, url: str, decoding: Decoding, text: "Text | None") -> "Sampler":
    refuse_options(options, POLICY_LOADED, "the server loads the policy")
    if not options.policy_served_model:
        raise ValueError("a server asks for the name that a model is served under: say --policy-served-model NAME")
    reading: dict[str, Any] = {} if text is None else {"text": text}
    if options.policy_tokenizer:
        reading["tokenizer"] = load_tokenizer(options.policy_tokenizer, options.policy_revision)
    else:
        why = "for a server, it is the revision of --policy-tokenizer"
        refuse_options(options, {"policy_revision": None}, why)
    from calibrated_rewards.samplers.openai import OpenAISampler

    api = options.policy_api or "completions"
    name = options.policy_served_model
    return OpenAISampler(url, name, decoding, api, **reading, **dict(options.policy_option))
