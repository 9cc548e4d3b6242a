"""Errors in the words of the command line: settings as options, and every library that is missing at once."""

import argparse
from collections.abc import Iterable
from importlib.util import find_spec

from calibrated_rewards.files import Message

# The libraries of each extra of the package.
EXTRAS = {
    "hf": ("torch", "transformers", "accelerate", "peft", "jinja2", "safetensors"),
    "http": ("httpx",),
    "calibrate": ("pyarrow",),
    "trl": ("datasets", "trl"),
    "plots": ("matplotlib", "jinja2", "markupsafe"),
    "ray": ("ray",),
    "serve": ("fastapi", "uvicorn", "prometheus_client"),
    "vllm": ("vllm",),
}
# The extras that a command needs whatever its options are; `find_extras` adds those of its models.
NEEDED: dict[str, tuple[str, ...]] = {
    "calibrate": ("calibrate",),
    "evaluate": ("calibrate",),
    "serve": ("serve",),
    "report": ("plots", "calibrate"),
    "demo": ("hf", "calibrate", "trl", "plots"),
}
# The option for each keyword argument that an error message names.
OPTIONS = {
    "column": "--column NAME",
    "cost": "--cost",
    "id_column": "--id-column NAME",
    "insecure": "--insecure",
    "kind": "--kind {value}",
    "labels": "--label HOW, such as 3, 1-0, expected:1,2,3 or weighted:1,-0.5",
    "limit": "--limit",
    "max_length": "--max-length {value}",
    "on_missing": "--on-missing {value}",
    "prompts": "--prompts FILE",
    "reference_free": "--option reference_free=true",
    "sampler": "--policy PATH|ID|URL",
    "scorer": "--reward-model PATH|ID|URL",
    "scores": "--scores COLUMN",
    "select": "--select {value}",
    "split": "--split {value}",
    "template": "--chat-template FILE",
    "tokenizer": "--option tokenizer=PATH (of a policy: --policy-tokenizer PATH)",
    "trust_remote_code": "--trust-remote-code (of a policy: --policy-trust-remote-code)",
}


def error_text(error: BaseException, other: str = "--option {name}={value}", extras: Iterable[str] = ()) -> str:
    """Write an error in the words of the command line.

    `other` is the form of settings without an entry in OPTIONS. If a library is missing, all that are missing of
    `extras` are named with it.

    >>> from calibrated_rewards.files import setting
    >>> error_text(ValueError(Message(f"the prompts' column is not known: name it with {setting('column')}")))
    "the prompts' column is not known: name it with --column NAME"
    """
    if isinstance(error, ModuleNotFoundError):
        library = (error.name or "").partition(".")[0]
        needed = {extra for extra, libraries in EXTRAS.items() if library in libraries}
        message = missing_text({*needed, *extras}, library) if needed else None
        if message is not None:
            return message
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    first = error.args[0] if error.args else ""
    text = first.with_options(OPTIONS, other) if isinstance(first, Message) else str(error)
    return text.strip("\n") or type(error).__name__


def find_extras(command: str, options: argparse.Namespace) -> set[str]:
    """Find the extras that a command needs with these options: for models here, for servers, for plots, for Ray."""
    models: list[str] = []
    for name in ("policy", "reference", "reward_model", "judge"):
        value = getattr(options, name, None)
        models += [] if value is None else [value] if isinstance(value, str) else list(value)
    urls = [any(part.startswith(("http://", "https://")) for part in (m, m.partition("=")[2])) for m in models]
    return {
        *NEEDED.get(command, ()),
        *(["http"] if any(urls) else []),
        *(["hf"] if not all(urls) else []),
        *(["plots"] if getattr(options, "plot", None) is not None else []),
        *(["ray"] if getattr(options, "ray", None) is not None else []),
    }


def missing_text(extras: set[str], library: str | None = None) -> str | None:
    """Write what to install for all libraries of some extras that are missing; None if none is."""

    def is_missing(name: str) -> bool:
        try:
            return name == library or find_spec(name) is None
        except ValueError:  # in sys.modules without a spec, as in tests
            return True

    missing = {extra: [each for each in EXTRAS[extra] if is_missing(each)] for extra in extras}
    libraries = sorted({each for names in missing.values() for each in names})
    if not libraries:
        return None
    extra_names = ",".join(sorted(extra for extra, names in missing.items() if names))
    verb = "is" if len(libraries) == 1 else "are"
    return f"needs {', '.join(libraries)}, which {verb} not installed: pip install 'calibrated-rewards[{extra_names}]'"
