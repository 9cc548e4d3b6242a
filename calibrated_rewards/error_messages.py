"""Error messages that name settings: as keyword arguments for callers from Python, as options on the command line.

An error is worded where it is raised, once; only the settings in it are marked, and each audience reads its own names.

>>> message = Message(f"the file has no splits: leave out {setting('split', 'train')}")
>>> str(ValueError(message))
'the file has no splits: leave out split=train'
>>> message.with_options({"split": "--split {value}"})
'the file has no splits: leave out --split train'
"""

import re
from collections.abc import Mapping

# Around a setting, and before an option of its own: characters that no text of ours or of a user's has.
START, OPTION, END = "\x02", "\x04", "\x03"
MARKS = re.compile(f"{START}|{OPTION}[^{END}]*{END}|{END}")


def setting(name: str, value: str = "", *, option: str = "") -> str:
    """Mark a keyword argument for `Message`; `option` is how the command line says this value, if not as all others.

    >>> Message(f"say {setting('cost', 'False', option='--no-cost')}").with_options({"cost": "--cost"})
    'say --no-cost'
    """
    return f"{START}{name}={value}{OPTION}{option}{END}"


class Message(str):
    """The message of an error; as a string it is the one for Python, without marks."""

    marked: str

    def __new__(cls, marked: str) -> "Message":
        """Make it of a text in which settings are marked."""
        message = super().__new__(cls, MARKS.sub("", marked))
        message.marked = marked
        return message

    def with_options(self, options: Mapping[str, str], other: str = "--option {name}={value}") -> str:
        """The message with an option for each setting; `other` is the form of one without an entry."""
        first, *rest = self.marked.split(START)
        parts = [first]
        for each in rest:
            named, _, text = each.partition(END)
            keyword, _, own = named.partition(OPTION)
            name, _, value = keyword.partition("=")
            option = (own or options.get(name, other)).replace("{name}", name).replace("{flag}", name.replace("_", "-"))
            parts += [option.replace("{value}", value or "..."), text]
        return "".join(parts)
