"""Options from a YAML file, `--config FILE`, and into one, `--save-config FILE`, for every command.

The file has an option's long name as key, and its text as value: a list where the option takes several, true or false
for a flag. Texts are read as on the command line, so that `1e-6` is a number and `no` a word. What the command line
says replaces what the file says.
"""

import argparse
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from calibrated_rewards.cli.options import error_text, read_text
from calibrated_rewards.files import write_file

# What an option is given: a text, several, or True and False for a flag.
Raw: TypeAlias = str | list[str] | bool

NULL = "tag:yaml.org,2002:null"
YES, NO = ("true", "yes", "on"), ("false", "no", "off")
NO_DASHES = "needs another text than --, which ends the options of a command line"
# Options that are not of a run.
OUTSIDE = {"help", "config", "save_config"}
# The key of the command that wrote a file.
COMMAND = "command"
# Words that begin with a dash, and that argparse does not take for options.
DASHED = re.compile(r"-(\d+|\d*\.\d+)?")


@dataclass(frozen=True)
class Setting:
    """An option that a file sets, and the line that does."""

    raw: Raw
    action: argparse.Action
    where: str


def parse_options(
    parser: argparse.ArgumentParser, words: Sequence[str], namespace: argparse.Namespace | None = None
) -> argparse.Namespace:
    """Add --config and --save-config to a parser, and parse a command line with them."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for each in (parser, files):
        text = "a YAML file with options by their long names; the command line wins"
        each.add_argument("--config", type=Path, metavar="FILE", help=text)
        text = "write the options, of the command line and of --config, into a YAML file, and go on"
        each.add_argument("--save-config", type=Path, metavar="FILE", help=text)
    refuse_dashes(parser, words)
    places, _ = files.parse_known_args(words)
    if (places.config is None and places.save_config is None) or {"-h", "--help"} & {*words}:
        options = parser.parse_args(words, namespace)
        if options.config or options.save_config:
            parser.error("--config and --save-config are not abbreviated")
        return options
    with read_raw(parser):
        given = vars(parser.parse_args(words))
    try:
        read = read_config(places.config, parser) if places.config else {}
        values = {dest: raw for dest, raw in given.items() if dest not in OUTSIDE}
        excluded = {*values} | list_excluded(parser, values)
        for dest, setting in read.items():
            if dest not in excluded:
                check_value(parser, setting)
                values[dest] = setting.raw
        options = parser.parse_args(write_words(list_actions(parser), values), namespace)
        if places.save_config:
            write_file(places.save_config, write_config(list_actions(parser), values, name_command(parser)))
    except (ValueError, OSError) as error:
        parser.error(error_text(error))
    options.config, options.save_config = places.config, places.save_config
    return options


def refuse_dashes(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse `--name=--`: argparse takes the dashes for the end of the options, and fails or drops the value."""
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--":
            return
        if name.startswith("-") and equals and value == "--":
            parser.error(f"argument {name}: {NO_DASHES}")


@contextmanager
def read_raw(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Let a parser read only what is given, as text: no defaults, no conversion, nothing required."""
    names = ("default", "required", "type", "choices", "nargs")
    before = [{name: getattr(action, name) for name in names} for action in parser._actions]
    for action in parser._actions:
        action.default, action.required, action.type, action.choices = argparse.SUPPRESS, False, None, None
        if not action.option_strings and action.nargs is None:
            action.nargs = "?"
    try:
        yield
    finally:
        for action, attributes in zip(parser._actions, before, strict=True):
            vars(action).update(attributes)


def list_actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """List a parser's options and positional arguments by their keys in a file."""
    actions = [action for action in parser._actions if action.dest not in OUTSIDE]
    return {_flag(action).lstrip("-").replace("_", "-"): action for action in actions}


def name_command(parser: argparse.ArgumentParser) -> str:
    """Name a parser's command as its files do: all trainers of `train` share theirs.

    >>> name_command(argparse.ArgumentParser("calibrated-rewards train rloo"))
    'train'
    """
    return parser.prog.removeprefix("calibrated-rewards ").split()[0]


def list_excluded(parser: argparse.ArgumentParser, given: Collection[str]) -> set[str]:
    """List the options, by their attributes, that exclude one of the given ones."""
    groups = [{action.dest for action in group._group_actions} for group in parser._mutually_exclusive_groups]
    return {dest for group in groups if group & {*given} for dest in group}


def read_config(file: Path, parser: argparse.ArgumentParser) -> dict[str, Setting]:
    """Read a file of options, by the names of their attributes; ValueError for what is no option, with its line."""
    actions, command = list_actions(parser), name_command(parser)
    values: dict[str, Setting] = {}
    for key, node in read_pairs(file):
        where, name = f"--config {file}, line {key.start_mark.line + 1}", format_node(key).replace("_", "-")
        if name == COMMAND:
            if node.value != command:
                raise ValueError(f"{where}: needs options of {command}, got those of {format_node(node)}")
            continue
        if name not in actions:
            nearest = get_close_matches(name, actions, 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(actions)}"
            raise ValueError(f"{where}: {format_node(key)} is no option of this command; {hint}")
        if actions[name].dest in values:
            raise ValueError(f"{where}: {name} is there twice, once is enough: a list has several values")
        if node.tag == NULL:
            continue
        others = list_excluded(parser, [actions[name].dest]) & {*values}
        if others:
            other = _flag(values[others.pop()].action)
            raise ValueError(f"{where}: {name} is not allowed with argument {other}, which is there too: leave one out")
        values[actions[name].dest] = Setting(read_value(node, actions[name], f"{where}: {name}"), actions[name], where)
    return values


def check_value(parser: argparse.ArgumentParser, setting: Setting) -> None:
    """Convert a file's texts as argparse will; ValueError with the file and the line if one is no value."""
    raws = [] if isinstance(setting.raw, bool) else [setting.raw] if isinstance(setting.raw, str) else setting.raw
    try:
        for raw in raws:
            parser._check_value(setting.action, parser._get_value(setting.action, raw))
    except argparse.ArgumentError as error:
        raise ValueError(f"{setting.where}: {error}") from None


def read_pairs(file: Path) -> list[tuple[Any, Any]]:
    """Read the keys and values of a YAML file, as nodes that have their text and their line."""
    try:
        root = yaml.compose(read_text(file, "--config"), yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file} is no YAML: {error}") from error
    except RecursionError:
        raise ValueError(
            f"--config {file} needs lines of OPTION: VALUE, got lists in lists, too deep to read"
        ) from None
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise ValueError(f"--config {file} needs lines of OPTION: VALUE, got a {root.id}")
    return [] if root is None else root.value


def has_flag(file: Path, name: str) -> bool:
    """Look whether a file sets a flag, whatever else is in it."""
    return any(key.value == name and str(node.value).lower() in YES for key, node in read_pairs(file))


def read_value(node: Any, action: argparse.Action, where: str) -> Raw:
    """Read the value of an option: a text, a list of texts, or true or false."""
    if action.nargs == 0:
        if not isinstance(node, yaml.ScalarNode) or node.value.lower() not in YES + NO:
            raise ValueError(f"{where} needs true or false, got {format_node(node)}")
        return node.value.lower() in YES
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if action.option_strings and any(isinstance(each, yaml.ScalarNode) and each.value == "--" for each in nodes):
        raise ValueError(f"{where} {NO_DASHES}")
    if not _takes_list(action):
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"{where} needs one value, got {format_node(node)}")
        return str(node.value)
    for each in nodes:
        if not isinstance(each, yaml.ScalarNode) or (each.tag == NULL and nodes is node.value):
            raise ValueError(f"{where} needs a list of texts, got {format_node(each)} in it")
        if action.nargs is not None and len(nodes) > 1 and each.value[:1] == "-" and not DASHED.fullmatch(each.value):
            raise ValueError(f"{where} needs texts that do not begin with -, as on the command line, got {each.value}")
    return [each.value for each in nodes]


def format_node(node: Any) -> str:
    """Write a node for an error: the text of a scalar, or else what it is.

    >>> format_node(yaml.compose("[a, b]")), format_node(yaml.compose("~")), format_node(yaml.compose("a: b"))
    ('a list', '~', 'a mapping')
    """
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)[:80] or "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def write_words(actions: Mapping[str, argparse.Action], values: Mapping[str, Raw]) -> list[str]:
    """Write options as a command line: first those with names, then what is positional, in its order."""
    words, positional = [], []
    for action in actions.values():
        raw = values.get(action.dest)
        if raw is None:
            continue
        name = _flag(action)
        if not action.option_strings:
            positional += [str(raw)]
        elif raw is False:
            words += [each for each in action.option_strings if each.startswith("--no-") and each != name]
        elif raw is True:
            words += [name]
        elif isinstance(raw, str):
            words += [f"{name}={raw}"]
        elif action.nargs is None or len(raw) == 1:  # after "=" a text may begin with a dash
            words += [f"{name}={each}" for each in raw]
        else:
            words += [name, *raw]
    return [*words, "--", *positional] if positional else words


def write_config(actions: Mapping[str, argparse.Action], values: Mapping[str, Raw], command: str) -> str:
    """Write options as YAML: the command's name, and the options in the order of its help."""

    def build_node(raw: Raw) -> yaml.Node:
        if isinstance(raw, list):
            return yaml.SequenceNode("tag:yaml.org,2002:seq", [build_node(each) for each in raw], flow_style=True)
        text = str(raw).lower() if isinstance(raw, bool) else raw
        is_null = yaml.SafeLoader("").resolve(yaml.ScalarNode, text, (True, False)) == NULL
        # Without quotes some of the characters that are no line feed, but end a line, come back as spaces.
        style = '"' if is_null or not text.isprintable() else None
        return yaml.ScalarNode("tag:yaml.org,2002:str", text, style=style)

    raws = {name: values[action.dest] for name, action in actions.items() if action.dest in values}
    pairs = [(build_node(name), build_node(raw)) for name, raw in {COMMAND: command, **raws}.items()]
    node = yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)
    return str(yaml.serialize(node, Dumper=yaml.dumper.BaseDumper, allow_unicode=True, width=110))


def _flag(action: argparse.Action) -> str:
    """Choose the name of an option that stands in files: the first long one; of a positional argument, its own."""
    return next((each for each in action.option_strings if each.startswith("--")), (*action.option_strings, "")[0]) or (
        action.dest
    )


def _takes_list(action: argparse.Action) -> bool:
    return action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
