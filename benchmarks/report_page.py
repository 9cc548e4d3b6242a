"""Does the page of a report fit a laptop and a phone? Headless Chromium says, and takes pictures to be looked at.

    python benchmarks/report_page.py                    # the page of a made-up experiment; needs chromium
    python benchmarks/report_page.py demo/ --out shots  # that of an experiment of yours

For each width, and for light and dark: how wide the page is, which elements reach beyond it, whether every drawing has
a size, and how many requests it made. Exit code 1 if anything is wider than the window. Writes
benchmarks/results/report_page.json, but for a page of yours.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape, unescape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from environment import save
from fake_experiment import make

from calibrated_rewards.evaluation.report import report

WIDTHS = {"laptop": 1280, "phone": 390}
HEIGHT = 9000
SCHEMES = {"light": "1", "dark": "0"}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]
# Details are opened, for what is in them must fit too. What scrolls within a box of its own may be wide.
MEASURE = """<script>
for (const each of document.querySelectorAll("details")) each.open = true;
const wide = [...document.querySelectorAll("body *")].filter(
  e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".wide, pre, svg"));
const boxes = [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect());
parent.document.documentElement.dataset.measured = JSON.stringify({
  window: innerWidth, page: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
  wide: wide.map(e => e.tagName + " " + e.textContent.slice(0, 40)), drawings: boxes.length,
  empty_drawings: boxes.filter(b => b.width < 200 || b.height < 100).length,
  requests: performance.getEntriesByType("resource").length,
  paper: getComputedStyle(document.body).backgroundColor});
</script>"""


def chromium(*arguments: str) -> str:
    """What a browser with a profile of its own prints."""
    found = next((name for name in ("chromium", "chromium-browser", "google-chrome") if shutil.which(name)), None)
    if found is None:
        raise SystemExit("report_page needs Chromium on the path: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = [found, *FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def measured(page: Path, width: int, scheme: str, shot: Path) -> dict[str, object]:
    """How the page lies in a window, by a copy of it that measures itself, and a picture of the page.

    The copy lies in a frame of that width: Chromium's own windows are never narrower than 500.
    """
    window = (f"--window-size={width},{HEIGHT}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}")
    chromium(*window, f"--screenshot={shot}", page.resolve().as_uri())
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        copy = escape(page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>"))
        shown = f'<iframe srcdoc="{copy}" width="{width}" height="{HEIGHT}" style="border: 0"></iframe>'
        frame.write_text(f'<!DOCTYPE html><html><meta charset="utf-8">{shown}</html>', encoding="utf-8")
        said = chromium(*window, "--virtual-time-budget=5000", "--dump-dom", frame.as_uri())
    found = re.search(r'data-measured="(.*?)"', said)
    if found is None:
        raise SystemExit(f"the page did not measure itself at {width}: {said[:200]!r}")
    return dict(json.loads(unescape(found[1])))


def main() -> int:
    """Make or take a page, and measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", type=Path, help="a directory to report on; one made up, if not given")
    parser.add_argument("--out", type=Path, default=Path("demo/report_page"), help="folder for page and pictures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        page = report(args.experiment or make(Path(scratch) / "demo"), args.out / "report.html")
    results = {
        f"{name}, {scheme}": measured(page, width, scheme, args.out / f"{name}_{scheme}.png")
        for name, width in WIDTHS.items()
        for scheme in SCHEMES
    }
    for name, found in results.items():
        print(name, found)
    fits = all(
        found["window"] == WIDTHS[name.partition(",")[0]] >= found["page"]
        and not (found["wide"] or found["empty_drawings"] or found["requests"])
        for name, found in results.items()
    )
    papers = {found["paper"] for found in results.values()}
    print("every width and scheme fits" if fits and len(papers) == 2 else "NOT ALL FITS")
    if args.experiment is None:
        print(save("report_page", {"kilobytes": page.stat().st_size // 1024, **results}))
    return int(not (fits and len(papers) == 2))


if __name__ == "__main__":
    sys.exit(main())
