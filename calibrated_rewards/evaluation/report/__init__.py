"""The report, by `report(directory)`: one page of HTML about a calibration, its training and its evaluation.

The page is a single file: its style and its figures are in it, and it runs nothing. It shows what it finds in the
directory of an experiment and leaves out the rest. Every number comes from a file of the experiment.

`experiment` reads the directory, a file a group of sections writes them, `page` renders them.
"""

import os
from pathlib import Path

from calibrated_rewards.evaluation.report.calibration_section import write_calibration
from calibrated_rewards.evaluation.report.experiment import Experiment, find_name, read_experiment
from calibrated_rewards.evaluation.report.held_out_section import write_held_out
from calibrated_rewards.evaluation.report.page import render_page
from calibrated_rewards.evaluation.report.training_section import write_provenance, write_training
from calibrated_rewards.evaluation.report.win_rate_sections import write_evaluation, write_examples, write_frontier
from calibrated_rewards.files import write_file

SECTIONS = (
    write_calibration,
    write_frontier,
    write_training,
    write_held_out,
    write_evaluation,
    write_examples,
    write_provenance,
)


def report(
    directory: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, title: str | None = None
) -> Path:
    """Write the page of an experiment, by default `report.html` in its directory, and return its path.

    The directory is that of a demo, of a calibration or a single table, of training runs, or of an evaluation.
    """
    at = Path(directory)
    if not at.is_dir():
        raise FileNotFoundError(f"report needs the directory of an experiment, got {at}, which is none.")
    to = at / "report.html" if out is None else Path(out)
    if to.is_dir():
        raise IsADirectoryError(f"report needs a file to write, got {str(to)!r}, which is a folder")
    above = next(each for each in to.absolute().parents if each.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"report needs a file in a folder, got out={str(to)!r}, but {above} is no folder.")
    experiment = read_experiment(at)
    sections = [section for write in SECTIONS if (section := write(experiment)) is not None]
    text = render_page(title or choose_title(experiment), sections)
    write_file(to, text.encode("utf-8", "xmlcharrefreplace"))
    return to


def choose_title(experiment: Experiment) -> str:
    """Name the parts of an experiment, and the policy if its name is known."""
    parts = {
        "calibration": bool(experiment.tables),
        "comparison of rewards": experiment.frontier is not None and not experiment.tables,
        "training": bool(experiment.runs),
        "evaluation": experiment.evaluation is not None or experiment.held_out is not None,
    }
    *first, last = (name for name, there in parts.items() if there)
    names = f"{', '.join(first)} and {last}" if first else last
    main = experiment.trained_for
    policy = None if main is None else find_name(experiment.tables[main].meta.get("sampler"))
    return f"Calibrated rewards{', a demo' * bool(experiment.demo)}: {names}{f' of {policy}' if policy else ''}"
