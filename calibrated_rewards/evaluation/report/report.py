"""One page that says what was calibrated, whether it is good, what was trained, and what came out.

The page is a single file: its style and its figures are in it, and it runs nothing. It says what it finds in the
directory of an experiment, and of what is not there, nothing. Every number comes from a file of the experiment.
"""

import os
from pathlib import Path

from calibrated_rewards.evaluation.report.calibration_section import calibrated
from calibrated_rewards.evaluation.report.examples_section import examples
from calibrated_rewards.evaluation.report.experiment import experiment, titled
from calibrated_rewards.evaluation.report.frontier_section import promised
from calibrated_rewards.evaluation.report.markup import page
from calibrated_rewards.evaluation.report.outcome_section import outcome
from calibrated_rewards.evaluation.report.training_section import made, trained
from calibrated_rewards.files import write_file

PARTS = (calibrated, promised, trained, outcome, examples, made)


def report(
    directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, title: str | None = None
) -> Path:
    """Write the page of an experiment, `report.html` in its directory if nothing is said, and say where it is.

    The directory is that of a demo, of a calibration or a single table, of training runs, or of an evaluation.
    """
    at = Path(directory)
    if not at.is_dir():
        raise FileNotFoundError(f"report needs the directory of an experiment, got {at}, which is none.")
    to = at / "report.html" if out is None else Path(out)
    _check(to)
    found = experiment(at)
    sections = [section for part in PARTS if (section := part(found)) is not None]
    text = page(title or titled(found), sections)
    write_file(to, text.encode("utf-8", "xmlcharrefreplace"))
    return to


def _check(to: Path) -> None:
    if to.is_dir():
        raise IsADirectoryError(f"report needs a file to write, got {str(to)!r}, which is a folder")
    above = next(each for each in to.absolute().parents if each.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"report needs a file in a folder, got out={str(to)!r}, but {above} is no folder.")
