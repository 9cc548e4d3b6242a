"""The options that say what a reward model's server speaks, and the scorer that asks it.

The options that name a reward model, the same for every command that needs one, and the scorer that they lead to."""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibrated_rewards.cli.errors import Whole
from calibrated_rewards.models.labels import Difference, Expected, Label, Labels, Ordinal, Weighted
from calibrated_rewards.models.server_address import is_variable
from calibrated_rewards.scorers.ensemble import Cost

if TYPE_CHECKING:
    from calibrated_rewards.models.text import Text
    from calibrated_rewards.scorers.protocol import Scorer
    from calibrated_rewards.scorers.remote import Remote

SPOKEN = ("native", "vllm", "vllm-score", "openrlhf")
TOLD = (
    "a token for it, if it wants one, is read from the environment: CALIBRATED_REWARDS_TOKEN, and which server it is "
    "for, as in CALIBRATED_REWARDS_TOKEN_URL=http://rm:8000. '$NAME' is an environment variable that holds the URL"
)
# Options that say how a model is loaded here, and what they are if nothing is said.
LOADING: dict[str, Any] = {
    "kind": None,
    "option": [],
    "batch_tokens": None,
    "dtype": "auto",
    "device": None,
    "trust_remote_code": False,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--server and what it needs."""
    group = parser.add_argument_group("reward model that is a URL", TOLD)
    group.add_argument(
        "--server", choices=SPOKEN, help="what it speaks; native, this library's own, if nothing is said"
    )
    group.add_argument("--served-model", metavar="NAME", help="the name it is served under")
    group.add_argument("--tokenizer", metavar="PATH|ID", help="to render and cut text here (vllm, openrlhf)")


def is_url(model: str) -> bool:
    """Whether a reward model is a server."""
    return model.lower().startswith(("http://", "https://")) or is_variable(model)


def check_local(options: argparse.Namespace) -> None:
    """Refuse, for a model that is loaded here, what is only said of servers."""
    refuse(options, {"server": None, "served_model": None, "tokenizer": None}, "--reward-model is no URL")


def load(options: argparse.Namespace, text: "Text | None") -> "Remote":
    """The scorer that asks the server; the environment's token, if it is for that server."""
    from calibrated_rewards.models.server_address import token_for
    from calibrated_rewards.scorers.remote import Remote

    refuse(options, LOADING, "the server loads the model")
    return Remote(options.reward_model, dialect(options, text), token=token_for(options.reward_model))


def reach(scorer: "Scorer", prompt: Any, completion: Any) -> None:
    """Ask a server once, soon: one that is not there, or that refuses us, is no model that fails its checks."""
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
        return  # it answers: what is wrong with its answers is for the checks to say


def dialect(options: argparse.Namespace, text: "Text | None") -> Any:
    """How the server is asked."""
    from calibrated_rewards.scorers.remote import Native, OpenRlhf
    from calibrated_rewards.scorers.remote_vllm import Vllm, VllmScore

    server = options.server or SPOKEN[0]
    if server.startswith("vllm") and not options.served_model:
        raise ValueError("vLLM asks for the name that a model is served under: say --served-model NAME")
    check_applicable(options, server, text)
    name = options.served_model or _name_in(options.reward_model)
    reading: dict[str, Any] = {} if text is None else {"text": text}
    if options.tokenizer:
        from transformers import AutoTokenizer

        reading["tokenizer"] = AutoTokenizer.from_pretrained(options.tokenizer, revision=options.revision)
    if server == "vllm":
        return Vllm(name, labels=options.label, **reading)
    if server == "openrlhf":
        return OpenRlhf(name, **reading)
    return VllmScore(name) if server == "vllm-score" else Native(name)


def _name_in(url: str) -> str:
    """What a model is called that only its url names."""
    from calibrated_rewards.models.server_address import HIDDEN, redact_url

    if HIDDEN in redact_url(url):
        raise ValueError(
            f"{redact_url(url)} may have a token in its path, so it names no model: say --served-model NAME"
        )
    return redact_url(url)


def check_applicable(options: argparse.Namespace, server: str, text: "Text | None") -> None:
    """Refuse what would have no effect on a kind of server."""
    if server != "vllm":
        refuse(options, {"label": None}, f"--server {server} makes one score of them itself")
    if server not in ("vllm", "openrlhf"):
        if text is not None or options.tokenizer:
            raise ValueError(f"--server {server} renders text itself: no --tokenizer, --max-length, --chat-template")
    elif text is not None and not options.tokenizer:
        raise ValueError("--max-length and --chat-template need the reward model's tokenizer: say --tokenizer PATH|ID")
    if not options.tokenizer:
        refuse(options, {"revision": None}, "for a server, it is the revision of --tokenizer")


def refuse(options: argparse.Namespace, usual: dict[str, Any], why: str) -> None:
    """An error for the options that were said, though they have no effect."""
    said = [f"--{name.replace('_', '-')}" for name, value in usual.items() if getattr(options, name) != value]
    if said:
        raise ValueError(f"{', '.join(said)}: {why}, leave {'it' if len(said) == 1 else 'them'} out")


def add_arguments_of_reward_model(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """--reward-model, and all that says how it is loaded and read; with `several`, NAME=PATH for each."""
    group = parser.add_argument_group("reward model")
    if several:
        group.add_argument(
            "--reward-model", action="append", default=[], metavar="[NAME=]PATH|ID|URL", help=SEVERAL_HELP
        )
    else:
        group.add_argument(
            "--reward-model", required=True, metavar="PATH|ID|URL", help="a folder, an id of the Hub, a server"
        )
    group.add_argument("--kind", help="what it is, where looking at the checkpoint does not tell: judge, process, ...")
    group.add_argument("--option", action="append", default=[], type=named, metavar="NAME=VALUE", help=OPTION_HELP)
    group.add_argument("--label", type=labels, metavar="HOW", help=LABEL_HELP)
    group.add_argument("--cost", action=argparse.BooleanOptionalAction, default=None, help=COST_HELP)
    group.add_argument(
        "--max-length", type=Whole(2), metavar="TOKENS", help="most tokens of an input; what the model can read"
    )
    group.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the tokenizer's"
    )
    group.add_argument("--batch-tokens", type=Whole(1), metavar="TOKENS", help="tokens in a batch, padding included")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16 (bf16), float16 (fp16); auto: as saved")
    group.add_argument("--device", help="cpu, cuda, cuda:1, mps; a GPU if there is one")
    group.add_argument("--revision", help="a branch, tag or commit of the Hub")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with a checkpoint or a saved reward"
    )
    add_arguments(parser)


SEVERAL_HELP = (
    "a folder, an id of the Hub, a server; with a name, once for each of several, which share the options below "
    "(others: run again, with another name)"
)
OPTION_HELP = "what else load_scorer takes, such as --option mark=<extra_0>; JSON, or text that is none"
LABEL_HELP = (
    "how several labels make one score: 3 (that label's logit), 1-0 (logit 1 minus logit 0), expected:1,2,3,4,5 "
    "(their mean value), weighted:1,-0.5 (a weighted sum), ordinal (the expected class)"
)
COST_HELP = (
    "higher is worse (a cost model, a toxicity model): the score is minus what the model gives; --no-cost where names "
    "of labels ask and it is meant as it is"
)


def load_of_reward_model(options: argparse.Namespace) -> "Scorer":
    """The scorer that the options name."""
    if is_url(options.reward_model):
        remote = load(options, text(options.max_length, options.chat_template))
        return Cost(remote) if options.cost else remote
    check_local(options)
    from calibrated_rewards.scorers.loading import load_scorer

    return load_scorer(options.reward_model, **settings(options))


def load_several(options: argparse.Namespace) -> "Scorer | dict[str, Scorer]":
    """The scorer that the options name, or a scorer for each name."""
    named_ones = [_named_model(given) for given in options.reward_model]
    names = [name for name, _ in named_ones]
    if names == [None]:
        return load_of_reward_model(_only(options, named_ones[0][1]))
    if None in names or len({*names}) < len(names):
        raise ValueError(
            f"of several, each --reward-model needs a name of its own, NAME=PATH; got {', '.join(options.reward_model)}"
        )
    return {str(name): load_of_reward_model(_only(options, place)) for name, place in named_ones}


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `load_scorer` is told."""
    given = dict(options.option)
    for name, instead in {"name_or_path": "--reward-model", "text": "--max-length and --chat-template"}.items():
        if name in given:
            raise ValueError(f"--option {name}=...: there is no such option, {instead} say it")
    return {
        "kind": options.kind,
        "labels": options.label,
        "cost": options.cost,
        "text": text(options.max_length, options.chat_template),
        "batch_tokens": options.batch_tokens,
        "dtype": options.dtype,
        "device": options.device,
        "revision": options.revision,
        "trust_remote_code": options.trust_remote_code,
        **given,
    }


def named(setting: str) -> tuple[str, Any]:
    """A name and its value.

    >>> named("step_tokens=[3, 5]"), named("mark=<extra_0>")
    (('step_tokens', [3, 5]), ('mark', '<extra_0>'))
    """
    name, equals, value = setting.partition("=")
    if not name.isidentifier() or not equals:
        said = f"{name}=..." if equals else name  # the value may be a key or a token
        raise argparse.ArgumentTypeError(f"an option is NAME=VALUE, NAME of letters, digits and _, got {said!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def text(max_length: int | None, template: Path | None) -> "Text | None":
    """How text becomes tokens, if anything was said about it."""
    from calibrated_rewards.models.text import Text

    if max_length is None and template is None:
        return None
    return Text(max_length=max_length, template=read_text(template, "--chat-template") if template else None)


def read_text(file: Path, option: str) -> str:
    """A file that an option names, in UTF-8, with or without a byte order mark."""
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise type(error)(f"{option} {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} {file} is no text in UTF-8: {error.reason} at byte {error.start}") from error


def labels(how: str) -> Labels:
    """What `--label` says.

    >>> labels("3"), labels("1-0"), labels("expected:1,2,3"), labels("ordinal")
    (Label(index=3), Difference(good=1, bad=0), Expected(values=(1.0, 2.0, 3.0)), Ordinal())
    """
    name, _, numbers = how.partition(":")
    try:
        if name in WITH_NUMBERS:
            return WITH_NUMBERS[name](tuple(map(float, numbers.split(","))))
        if how == "ordinal":
            return Ordinal()
        good, minus, bad = how.partition("-")
        return Difference(int(good), int(bad)) if minus else Label(int(good))
    except ValueError:
        wanted = "3, 1-0, expected:1,2,3, weighted:1,-0.5 or ordinal"
        raise argparse.ArgumentTypeError(f"a label is {wanted}, got {how!r}") from None


def _named_model(given: str) -> tuple[str | None, str]:
    """A name and a place; a place alone may be a URL with a "=" in it.

    >>> _named_model("safe=org/model"), _named_model("http://host/?a=b")
    (('safe', 'org/model'), (None, 'http://host/?a=b'))
    """
    name, equals, place = given.partition("=")
    named_one = bool(equals) and not any(letter in name for letter in "/:?\\")
    return (name, place) if named_one else (None, given)


def _only(options: argparse.Namespace, place: str) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), "reward_model": place})


WITH_NUMBERS: dict[str, Callable[[Any], Labels]] = {"expected": Expected, "weighted": Weighted}
