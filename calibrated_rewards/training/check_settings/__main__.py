"""Print the tables of faithful settings, framework by framework, as docs/reference/settings.md shows them.

python -m calibrated_rewards.training.check_settings prints them; with the page's path it writes them into the page.
"""

import re
import sys
from pathlib import Path

from calibrated_rewards.training.check_settings.check import FRAMEWORKS
from calibrated_rewards.training.check_settings.rules import Framework, Rule

BLOCK = re.compile(r"(<!-- rules: begin.*?-->\n).*?(<!-- rules: end -->)", re.DOTALL)
HEAD = "| setting | write | otherwise | level |\n|---|---|---|---|\n"


def format_tables() -> str:
    """Format a section of Markdown for each framework."""
    return "\n".join(map(format_framework, FRAMEWORKS))


def format_framework(framework: Framework) -> str:
    """Format a framework's section: how near its optimum is, what to write, and a row for each rule."""
    intro = f"### {framework.title} {framework.version}\n\nOptimum: {framework.optimum}. Write: {framework.write}\n"
    return f"{intro}\n{HEAD}{''.join(map(format_rule, framework.rules))}"


def format_rule(rule: Rule) -> str:
    """Format a row; what to write is code where it is a setting or an option, and text where it is a sentence."""
    write = rule.write or "\u2013"
    if re.match(r"--|[\w.]+=", write):
        write = f"`{write}`"
    cells = f"`{rule.setting}`", write, rule.why.replace("||", r"\|\|"), rule.severity
    return f"| {' | '.join(cells)} |\n"


def main(arguments: list[str]) -> None:
    """Print the tables, or write them into each page that is named."""
    if not arguments:
        sys.stdout.write(format_tables())
    for page in map(Path, arguments):
        text = page.read_text(encoding="utf-8")
        page.write_text(BLOCK.sub(lambda block: f"{block[1]}\n{format_tables()}\n{block[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
