"""vLLM engines: one that runs already, or the settings to start one, which pickle; with their model's fingerprint."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from hashlib import blake2b
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

from calibrated_rewards.models.lazy import Lazy, fields_only

# Pieces of a file of weights that its digest reads, evenly spread, and bytes of each.
PIECES, PIECE = 1024, 4096
PROCESSED = "processed_logprobs"


@dataclass(frozen=True)
class Running:
    """A `vllm.LLM` that runs already."""

    llm: Any

    @property
    def tokenizer(self) -> Any:
        """The engine's own tokenizer."""
        return self.llm.get_tokenizer()

    @property
    def limit(self) -> int | None:
        """Most tokens of a prompt and its completion."""
        return int(self._model.max_model_len)

    @property
    def processed(self) -> bool:
        """True if the log-probabilities that it returns are those that it draws with."""
        return getattr(self._model, "logprobs_mode", "raw_logprobs") == PROCESSED

    @property
    def lora(self) -> Any:
        """None: an adapter of such an engine is not known."""
        return None

    def fingerprint(self) -> dict[str, Any]:
        """Describe the weights by a folder's files, or a repository's commit; and their precision."""
        commit = self._model.revision or getattr(self._model.hf_config, "_commit_hash", None)
        quantised = {"quantization": self._model.quantization} if self._model.quantization else {}
        dtype = str(self._model.dtype).removeprefix("torch.")
        return {**weights(self._model.model, commit), "dtype": dtype, **quantised, "vllm": installed()}

    @property
    def _model(self) -> Any:
        return self.llm.llm_engine.model_config


@dataclass(frozen=True)
class Engine:
    """The settings to start an engine, the same in every process. It starts at the first use of `llm`.

    Tokenizer, limit and fingerprint come from the checkpoint's small files, so that a process that only plans work, or
    has no GPU, starts no engine.
    """

    name: str
    """A folder, or a repository of the Hub."""
    revision: str | None = None
    adapter: str | None = None
    """The folder of a LoRA adapter on top of it."""
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """More arguments of `vllm.LLM`; they may hold tokens, so no repr shows them."""
    __getstate__ = fields_only

    def __hash__(self) -> int:
        return hash((self.name, self.revision))

    @Lazy
    def llm(self) -> Any:
        """Start the engine; the same one from then on."""
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError(f"VllmSampler needs vllm, which does not load ({error}): pip install vllm") from error
        return LLM(model=self.name, **self._settings)

    @Lazy
    def tokenizer(self) -> Any:
        """Load the tokenizer that is saved beside the model, or that `tokenizer=` names."""
        from transformers import AutoTokenizer

        name = self._settings.get("tokenizer")
        code = bool(self._settings.get("trust_remote_code", False))
        of_the_model = {} if name else self._own
        return AutoTokenizer.from_pretrained(name or self.name, **{"trust_remote_code": code, **of_the_model})

    @cached_property
    def limit(self) -> int | None:
        """Most tokens of a prompt and its completion: max_model_len, or the positions of the model."""
        limit = self.options.get("max_model_len")
        if isinstance(limit, int) and limit > 0:
            return limit
        from transformers import AutoConfig

        most = getattr(
            AutoConfig.from_pretrained(self.name, **self._own).get_text_config(), "max_position_embeddings", 0
        )
        return int(most) if isinstance(most, int) and most > 0 else None

    @property
    def processed(self) -> bool:
        """True if the log-probabilities that it returns are those that it draws with."""
        return bool(self._settings["logprobs_mode"] == PROCESSED)

    @property
    def lora(self) -> Any:
        """The adapter, as requests name it."""
        if self.adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", 1, self.adapter)

    def fingerprint(self) -> dict[str, Any]:
        """Describe the weights by a folder's files, or a repository's commit; and the settings that change them."""
        over = {} if self.adapter is None else {"adapter": weights(self.adapter, None)}
        changing = ("quantization", "kv_cache_dtype", "hf_overrides", "rope_scaling")
        options = {name: str(self.options[name]) for name in changing if name in self.options}
        dtype = str(self._settings["dtype"]).removeprefix("torch.")
        return {**self._weights, **over, "dtype": dtype, **options, "vllm": installed()}

    @cached_property
    def _weights(self) -> dict[str, Any]:
        return weights(self.name, self.revision)

    @property
    def _own(self) -> dict[str, Any]:
        """The keyword arguments to read the model's own files."""
        code = bool(self.options.get("trust_remote_code", False))
        return {"trust_remote_code": code} | ({} if self.revision is None else {"revision": self.revision})

    @property
    def _settings(self) -> dict[str, Any]:
        """The keyword arguments for `vllm.LLM`."""
        usual = {"dtype": "auto", "runner": "generate", "enable_prefix_caching": True, "logprobs_mode": PROCESSED}
        at = {} if self.revision is None else {"revision": self.revision, "tokenizer_revision": self.revision}
        lora = {} if self.adapter is None else {"enable_lora": True}
        return {**usual, **at, **lora, **self.options}


def weights(name: str, revision: str | None) -> dict[str, Any]:
    """Describe weights by a digest of a folder's files, or a repository and its commit."""
    if Path(name).is_dir():
        return {"weights": files_digest(Path(name))}
    return {"model": name, "revision": revision}


def files_digest(folder: Path) -> str:
    """Digest the config and the weights in a folder; of a large file its size and evenly spread pieces.

    An engine does not show its weights, and may hold them quantised or spread over machines: these are the files that
    it was started from. Training moves all of a model's weights, or an adapter's, so pieces distinguish two.
    """
    digest = blake2b(digest_size=16)
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".bin", ".pt", ".gguf")]
    for path in [folder / "config.json", folder / "adapter_config.json", *files]:
        if path.exists():
            digest.update(f"{path.name} {path.stat().st_size} ".encode())
            step = max(PIECE, path.stat().st_size // PIECES)
            with path.open("rb") as file:
                for start in range(0, path.stat().st_size, step):
                    file.seek(start)
                    digest.update(file.read(PIECE))
    return digest.hexdigest()


@cache
def installed() -> str | None:
    """Return the version of vLLM, which a CPU build has under another name; None where it is not installed.

    >>> installed() is None or installed()[0].isdigit()
    True
    """
    names = packages_distributions().get("vllm", [])
    return version(names[0]) if names else None
