"""VllmSampler: what it asks of an engine and makes of its answers; benchmarks/vllm_sampler.py asks a real one.

The engine here is a stand-in, since vLLM is not installed where these tests run: its requests and answers have the
names and rules of vLLM 0.32, and what it "draws" depends on the token ids and the seed that it is given.
"""

import json
import pickle
import shutil
import sys
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, strategies as st
from peft import LoraConfig, get_peft_model

from calibrated_rewards.models.text import Text
from calibrated_rewards.samplers.protocol import Decoding, Particular, Rendering, Rollout, Sampler, sample, seeds_of
from calibrated_rewards.samplers.vllm import VllmSampler
from calibrated_rewards.samplers.vllm_engine import Engine, files_digest
from calibrated_rewards.scorers.protocol import Fingerprinted

CHAT = [{"role": "user", "content": "Hi"}]
BENT = Decoding(max_tokens=8, temperature=0.7, top_p=0.9, top_k=5, min_p=0.01, repetition_penalty=1.2, stop=("ZZ",))


@dataclass(kw_only=True)
class SamplingParams:
    """Those of vLLM that are used, and its own checks of them."""

    n: int = 1
    seed: int | None = None
    max_tokens: int | None = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: Any = None
    stop_token_ids: Any = None
    logprobs: int | None = None

    def __post_init__(self):
        assert self.n >= 1
        assert -(2**63) <= self.seed < 2**63
        assert 0 <= self.temperature <= 2
        assert self.top_k >= -1


@dataclass
class CompletionOutput:
    """As vLLM has it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = "length"
    stop_reason: Any = None


@dataclass
class RequestOutput:
    """As vLLM has it."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class StandIn:
    """What VllmSampler sees of a `vllm.LLM`. `change` is done to each answer, `drop` leaves the last ones out."""

    tokenizer: Any = field(default_factory=tiny.tokenizer)
    config: Any = field(default_factory=lambda: model_config())  # noqa: PLW0108 (it is defined below)
    change: Any = None
    drop: int = 0
    seen: list[Any] = field(default_factory=list)

    def get_tokenizer(self):
        """The engine's."""
        return self.tokenizer

    @property
    def llm_engine(self):
        """Where the config is."""
        return SimpleNamespace(model_config=self.config)

    def generate(self, prompts, sampling_params, *, use_tqdm=True, lora_request=None):
        """An answer to each request."""
        asked = list(zip([p["prompt_token_ids"] for p in prompts], sampling_params, strict=True))
        self.seen += [(*each, use_tqdm, lora_request) for each in asked]
        answers = [self._answer(str(i), ids, s) for i, (ids, s) in enumerate(asked)]
        return answers[: len(answers) - self.drop]

    def _answer(self, number, ids, params):
        ids_drawn = drawn(ids, params.seed, params.max_tokens)
        outputs = [CompletionOutput(0, "never read", ids_drawn, -1.5 * len(ids_drawn), [{}])]
        answer = RequestOutput(number, list(ids), outputs)
        if self.change:
            self.change(answer)
        return answer


def drawn(ids: list[int], seed: int, most: int) -> list[int]:
    """Bytes that depend on the prompt and the seed, as ids of tiny's tokenizer."""
    return [8 + (sum(ids) + seed * (i + 1)) % 26 + 64 for i in range(most)]


def model_config(**changes: Any) -> SimpleNamespace:
    hf = SimpleNamespace(_commit_hash=None)
    usual = {"model": "own/er", "revision": "c0ffee", "max_model_len": 64, "dtype": torch.bfloat16}
    return SimpleNamespace(
        **{**usual, "quantization": None, "hf_config": hf, "logprobs_mode": "raw_logprobs", **changes}
    )


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with engines that say how they were started."""
    module, lora = ModuleType("vllm"), ModuleType("vllm.lora")
    request = ModuleType("vllm.lora.request")
    module.SamplingParams, module.started = SamplingParams, []

    def llm(**options):
        module.started.append(options)
        return StandIn()

    module.LLM, request.LoRARequest = llm, lambda *said: said
    for each in (module, lora, request):
        monkeypatch.setitem(sys.modules, each.__name__, each)
    return module


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A saved language model."""
    return tiny.saved(tiny.causal(), tmp_path_factory.mktemp("policy"), tiny.tokenizer())


@pytest.mark.usefixtures("vllm")
def test_each_seed_is_a_request_of_its_own():
    """Token ids are those of a trainer (transformers' own calls); every rollout comes back to its prompt and seed."""
    llm, prompts = StandIn(), ["ab", CHAT, "c"]
    seeds = [seeds_of(0, bytes(16), 0, 3), [5], []]
    found = sample(VllmSampler(llm, Decoding(max_tokens=4)), prompts, seeds)

    chat = llm.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = [llm.tokenizer(text="ab")["input_ids"], chat]
    assert [(row, params.seed) for row, params, *_ in llm.seen] == [*((ids[0], s) for s in seeds[0]), (ids[1], 5)]
    decoded = [[llm.tokenizer.decode(drawn(ids[i], s, 4)) for s in seeds[i]] for i in range(2)]
    assert found == [[Rollout(text, 4, "length", -6.0) for text in texts] for texts in [*decoded, []]]


@pytest.mark.usefixtures("vllm")
def test_all_settings_are_said():
    """Nothing of a decoding is left to the engine's defaults; an off top_k is -1, which every version takes."""
    llm = StandIn()
    VllmSampler(llm, BENT)(["a"], [[1]])
    VllmSampler(llm, Decoding(max_tokens=3, stop_token_ids=(9,)))(["a"], [[2]])

    bent = {"max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "repetition_penalty": 1.2}
    assert llm.seen[0][1] == SamplingParams(seed=1, logprobs=0, stop=["ZZ"], stop_token_ids=[], **bent)
    assert llm.seen[1][1] == SamplingParams(seed=2, logprobs=0, stop=[], stop_token_ids=[9], max_tokens=3, top_k=-1)


@pytest.mark.usefixtures("vllm")
def test_seeds_alone_and_together():
    """A rollout's request does not depend on which others are asked for."""
    sampler = VllmSampler(StandIn(), Decoding(max_tokens=4))

    alone = [sampler(["a"], [[seed]])[0][0] for seed in (1, 2)]
    assert sampler(["a", "b"], [[1, 2], [3]]) == [alone, *sampler(["b"], [[3]])]


@pytest.mark.usefixtures("vllm")
def test_completions_are_decoded_as_trainers_do():
    """Special tokens are skipped, but counted; a stop text and what follows are cut; the reason is kept."""
    ids = tiny.tokenizer()("one ZZ two ZZ", add_special_tokens=False)["input_ids"]
    cases = [
        ((), [*ids, tiny.EOS], None, "one ZZ two ZZ"),  # EOS has no stop_reason
        ((), ids, ids[-1], "one ZZ two Z"),  # a token that was asked for, and is none of the special ones
        (("ZZ",), ids[:6], "ZZ", "one "),  # the last token completes it
        (("w", "ne"), ids, "ne", "o"),
    ]
    for stop, drawn_ids, reason, text in cases:

        def end(answer, drawn_ids=drawn_ids, reason=reason):
            output = answer.outputs[0]
            output.token_ids, output.finish_reason, output.stop_reason = drawn_ids, "stop", reason

        [[rollout]] = VllmSampler(StandIn(change=end), replace(BENT, stop=stop))(["a"], [[1]])
        assert rollout[:3] == (text, len(drawn_ids), "stop")


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("decoding", [BENT, Decoding(max_tokens=8)])
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_a_logprob_is_of_the_draw_or_none(decoding, mode):
    """The model's own is not that of a bent decoding."""
    llm = StandIn(config=model_config(logprobs_mode=mode))
    [[rollout]] = VllmSampler(llm, decoding)(["a"], [[1]])

    assert rollout.logprob == (None if decoding is BENT and mode == "raw_logprobs" else -12.0)


@pytest.mark.usefixtures("vllm")
def test_no_logprob_is_none():
    """An engine that tells none, though it was asked."""

    def silent(answer):
        answer.outputs[0].cumulative_logprob = None

    assert VllmSampler(StandIn(change=silent), Decoding(max_tokens=8))(["a"], [[1]])[0][0].logprob is None


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("reason", ["abort", "error", "repetition", None])
def test_a_completion_that_is_not_whole_is_an_error(reason):
    """It names the prompt and the reason."""

    def end(answer):
        answer.outputs[0].finish_reason = reason

    with pytest.raises(ValueError, match=f"one of 'a prompt' by {reason!r}"):
        VllmSampler(StandIn(change=end), BENT)(["a prompt"], [[1]])


def another(answer):
    answer.prompt_token_ids = [1, 2]


def twice(answer):
    answer.outputs *= 2


def none(answer):
    answer.outputs = []


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize(
    ("llm", "message"),
    [
        (StandIn(drop=1), "each of 2 requests, got 1"),
        (StandIn(change=another), "one completion of 'a'"),
        (StandIn(change=twice), "one completion of 'a'"),
        (StandIn(change=none), "one completion of 'a'"),
    ],
)
def test_answers_that_do_not_fit_are_errors(llm, message):
    """Too few answers, another prompt's, none or two for a request."""
    with pytest.raises(ValueError, match=message):
        VllmSampler(llm, BENT)(["a"], [[1, 2]])


@pytest.mark.usefixtures("vllm")
def test_a_prompt_too_long_is_told_before_sampling():
    """By check and by a call; one token less fits. The engine would cut the completion short."""
    llm = StandIn(config=model_config(max_model_len=16))
    sampler = VllmSampler(llm, BENT)

    sampler.check(["1234567", CHAT])  # 8 tokens with BOS, and 8 to be drawn
    for asked in (sampler.check, lambda prompts: sampler(prompts, [[1], [2]])):
        with pytest.raises(ValueError, match="'12345678' has 9 tokens, which with max_tokens=8 are more than the 16"):
            asked(["ok", "12345678"])
    assert llm.seen == []


def test_what_has_no_tokens_is_told():
    """An empty prompt where no BOS is added, messages without a template."""
    bare = StandIn(tokenizer=tiny.tokenizer(bos=False, template=None))
    for prompt, message in [("", "at least one token"), (CHAT, "no chat template")]:
        with pytest.raises(ValueError, match=message):
            VllmSampler(bare, BENT).check([prompt])


def test_what_it_is():
    """A sampler that checks, renders and says what it is; rendered is the template's own text."""
    sampler = VllmSampler(StandIn(), BENT)
    for seam in (Sampler, Particular, Rendering, Fingerprinted):
        assert isinstance(sampler, seam)
    own = sampler.llm.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert [sampler.rendered("Hi"), sampler.rendered(CHAT)] == ["Hi", own]


@pytest.mark.usefixtures("vllm")
def test_the_bar_is_for_those_who_watch(monkeypatch):
    """Off where no terminal is: vLLM divides by the time that a bar shows, which is 0 in one that is off."""
    llm = StandIn()
    for terminal, wanted in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        VllmSampler(llm, BENT, show_progress=wanted)(["a"], [[1]])

    bars = [bar for *_, bar, _ in llm.seen]
    assert bars[1:] == [False, False]
    assert bars[0](total=1).format_dict["elapsed"] > 0


def test_a_loaded_one_starts_no_engine_before_it_samples(policy, vllm):
    """Check, rendered, fingerprint, repr and pickle need none; then one, once, with what was said."""
    sampler = VllmSampler.load(policy, BENT, dtype="fp32", gpu_memory_utilization=0.5)
    again = pickle.loads(pickle.dumps(sampler))
    again.check(["a", CHAT])
    for ask in (again.check, lambda prompts: again(prompts, [[1]])):
        with pytest.raises(ValueError, match="more than the 512"):
            ask(["a" * 504])
    assert again == sampler
    assert hash(again) == hash(sampler)
    assert again.fingerprint() == sampler.fingerprint()
    assert again.rendered(CHAT) == "<s><|user|>Hi<|end|><|assistant|>"
    assert vllm.started == []

    assert again(["a"], [[1]]) == again(["a"], [[1]])
    usual = {"runner": "generate", "enable_prefix_caching": True, "logprobs_mode": "processed_logprobs"}
    assert vllm.started == [{"model": policy, "dtype": "float32", "gpu_memory_utilization": 0.5, **usual}]
    away = pickle.loads(pickle.dumps(again))
    assert away == sampler
    assert away(["a"], [[1]]) == again(["a"], [[1]])
    assert len(vllm.started) == 2  # an engine of its own


def test_the_engine_may_read_less_than_the_checkpoint_says(policy, vllm):
    """It knows when it runs; then too it does not cut completions short."""
    sampler = VllmSampler.load(policy, replace(BENT, max_tokens=60))
    sampler.check(["1234"])
    with pytest.raises(ValueError, match="'1234' has 5 tokens, which with max_tokens=60 are more than the 64"):
        sampler(["1234"], [[1]])
    assert vllm.started


def test_a_running_engine_is_not_pickled():
    """The error says what is."""
    with pytest.raises(TypeError, match=r"VllmSampler\.load"):
        pickle.dumps(VllmSampler(StandIn(), BENT))


def test_max_model_len_is_the_limit_if_it_is_said(policy):
    """In place of the config's positions."""
    sampler = VllmSampler.load(policy, BENT, max_model_len=16)
    with pytest.raises(ValueError, match="more than the 16"):
        sampler.check(["12345678"])


def test_fingerprints(policy, tmp_path):
    """The same wherever the folder lies and whoever started the engine; another for any other policy."""
    moved = shutil.copytree(policy, tmp_path / "moved")
    other = tiny.saved(tiny.causal(seed=1), tmp_path / "other", tiny.tokenizer())
    sampler = VllmSampler.load(policy, BENT, dtype="bfloat16")
    said = sampler.fingerprint()

    json.dumps(said)
    assert VllmSampler.load(moved, BENT, dtype="bfloat16").fingerprint() == said
    running = VllmSampler(StandIn(config=model_config(model=policy, revision=None)), BENT)
    assert running.fingerprint() == said
    others = [
        VllmSampler.load(other, BENT, dtype="bfloat16"),
        VllmSampler.load(policy, BENT, dtype="float16"),
        VllmSampler.load(policy, BENT, dtype="bfloat16", quantization="fp8"),
        replace(sampler, decoding=replace(BENT, top_k=6)),
        replace(sampler, text=Text(template="{{ messages }}")),
        VllmSampler(StandIn(), BENT),
        VllmSampler(StandIn(tokenizer=tiny.tokenizer(bos=False)), BENT),
        VllmSampler(StandIn(config=model_config(revision="another")), BENT),
    ]
    told = [json.dumps(each.fingerprint(), sort_keys=True) for each in (sampler, *others)]
    assert len(set(told)) == len(told)


@given(st.binary(min_size=1, max_size=200), st.data())
def test_every_byte_of_a_small_file_counts(tmp_path_factory, content, data):
    """Of one that fits into the pieces that are read, all bytes are."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "model.safetensors").write_bytes(content)
    at = data.draw(st.integers(0, len(content) - 1))
    before = files_digest(folder)
    (folder / "model.safetensors").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])

    assert files_digest(folder) != before


def test_a_large_file_is_read_in_pieces(tmp_path):
    """All of it is spanned: a change to a thousandth of the file is seen, wherever."""
    size = 16 * 2**20
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(size))
    before = files_digest(tmp_path)
    for start in (0, size // 3, size - size // 1000):
        with path.open("r+b") as file:
            file.seek(start)
            file.write(b"\1" * (size // 1000))
        assert files_digest(tmp_path) != before
        path.write_bytes(bytes(size))
    path.write_bytes(bytes(size + 8192))  # the same pieces
    assert files_digest(tmp_path) != before


def test_a_reward_model_is_no_policy(tmp_path):
    """Told before an engine is started for it."""
    folder = tiny.saved(tiny.classifier(), tmp_path, tiny.tokenizer())
    with pytest.raises(ValueError, match=r"LlamaForSequenceClassification\) gives scores .* no policy"):
        VllmSampler.load(folder, BENT)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_an_adapter_goes_onto_its_base(policy, tmp_path, vllm):
    """The engine is its base's, each request names the adapter, and its files are in the fingerprint."""
    for rank in (3, 4):
        adapted = get_peft_model(tiny.causal(), LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        adapted.peft_config["default"].base_model_name_or_path = policy
        adapted.save_pretrained(tmp_path / str(rank))
    sampler, other = (VllmSampler.load(tmp_path / name, BENT) for name in "34")
    sampler(["a"], [[1]])

    [options] = vllm.started
    assert (options["model"], options["enable_lora"], options["max_lora_rank"]) == (policy, True, 8)
    assert sampler.llm.llm.seen[0][-1] == ("policy", 1, str(tmp_path / "3"))
    assert sampler.fingerprint()["weights"] == VllmSampler.load(policy, BENT).fingerprint()["weights"]
    assert sampler.fingerprint()["adapter"] != other.fingerprint()["adapter"]


def test_without_vllm(policy, monkeypatch):
    """The error says what to install; nothing before needs it."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    sampler = VllmSampler(Engine(policy), BENT)
    sampler.check(["a"])
    with pytest.raises(ImportError, match="pip install vllm"):
        sampler(["a"], [[1]])
