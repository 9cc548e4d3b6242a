"""Stand-ins for published reward models: tiny checkpoints with code of their own, written here, that behave as theirs.

Each is a folder as the Hub has it: config.json with auto_map, a module beside it, weights, a tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import DebertaV2Config, DebertaV2Model, GPTNeoXConfig, GPTNeoXModel, MistralConfig, MistralModel

# What a chat's answer is preceded by: the gate of ArmoRM and QRM looks for the ids of such a header.
HEADER = "<|end|><|assistant|>"
PAIR_TOKENS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")

GATED = """
from dataclasses import dataclass
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.utils import ModelOutput

HEADER = [HEADER_IDS]


def header_of(row):
    row = row.tolist()
    starts = [i for i in range(len(row) - len(HEADER) + 1) if row[i : i + len(HEADER)] == HEADER]
    if not starts:
        raise ValueError("Token pattern not found in the list.")
    return starts[-1]


@dataclass
class Gates(ModelOutput):
    rewards: torch.Tensor = None
    score: torch.Tensor = None
    logits: torch.Tensor = None


class LlamaForRewardModelWithGating(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.regression_layer = nn.Linear(config.hidden_size, 3, bias=False)
        self.gating = nn.Linear(config.hidden_size, 3)
        self.reward_transform_matrix = nn.Parameter(torch.eye(3))
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        every = torch.arange(len(states))
        is_pad = torch.eq(input_ids, self.config.pad_token_id).int()
        ends = (is_pad.argmax(-1) - 1) % input_ids.shape[-1]
        rewards = self.regression_layer(states[every, ends])
        gates = self.gating(states[every, [header_of(row) for row in input_ids]]).softmax(1)
        score = (gates * (rewards @ self.reward_transform_matrix)).sum(1)
        return Gates(rewards=rewards, score=score, logits=score)
"""

PAIR = """
import torch
from torch import nn
from transformers import DebertaV2Model, DebertaV2PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class DebertaV2PairRM(DebertaV2PreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Linear(4 * config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        marks = (self.config.source_prefix_id, self.config.cand1_prefix_id, self.config.cand2_prefix_id)
        for name, mark in zip(("source", "candidate1", "candidate2"), marks):
            assert all(mark in row for row in input_ids), f"<{name}> id not in input_ids"
        states = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask)[0]
        source, first, second = (states[torch.where(input_ids == mark)] for mark in marks)
        left = self.head_layer(torch.cat([source, first, source * first, first], -1))
        right = self.head_layer(torch.cat([source, second, source * second, second], -1))
        return SequenceClassifierOutput(logits=(left - right).mean(-1))
"""

# InternLM2-reward: `get_score` of its published code appends the token, its forward reads the last one, whatever it is.
REWARD_TOKEN = """
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class InternLM2ForRewardModel(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.v_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.reward_token_id = config.reward_token_id
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        ends = attention_mask.cumsum(dim=1).argmax(dim=1)
        return SequenceClassifierOutputWithPast(logits=self.v_head(states)[torch.arange(len(ends)), ends])

    def get_score(self, tokenizer, conversation):
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([ids if ids[-1] == self.reward_token_id else [*ids, self.reward_token_id]])
        return self(ids, torch.ones_like(ids)).logits[0].item()
"""

# Eurus: written for transformers 4, it never calls post_init, which transformers 5 needs.
UNFINISHED = """
import torch
from torch import nn
from transformers import MistralConfig, MistralModel, PreTrainedModel


class EurusRewardModel(PreTrainedModel):
    config_class = MistralConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MistralModel(config)
        self.regression_head = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        rewards = self.regression_head(self.model(input_ids, attention_mask=attention_mask)[0]).squeeze(-1)
        return torch.gather(rewards, 1, attention_mask.cumsum(dim=1).argmax(dim=1).view(-1, 1))
"""

# Ziya: a sequence classifier by its auto_map, and its forward gives the scores themselves.
BARE = """
import torch
from torch import nn
from transformers import LlamaModel, LlamaPreTrainedModel


class LlamaRewardModel(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.value_head = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return self.value_head(states)[torch.arange(len(states)), attention_mask.sum(1) - 1].squeeze(-1)
"""


def folder(
    at: Path, body: Any, prefix: str, heads: dict[str, torch.Tensor], tokenizer: Any = None, **config: Any
) -> str:
    """A checkpoint of a body and what stands beside it, with more in its config."""
    name = tiny.saved(body, at, tokenizer or tiny.tokenizer())
    held = {f"{prefix}.{key}": weight for key, weight in load_file(at / "model.safetensors").items()}
    save_file({**held, **heads}, at / "model.safetensors", {"format": "pt"})
    file = at / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return name


def own_code(
    at: Path, code: str, auto: str, body: Any, prefix: str, heads: dict[str, torch.Tensor], **more: Any
) -> str:
    """The same, with code of its own for an Auto class."""
    at.mkdir(parents=True, exist_ok=True)
    (at / "modeling_own.py").write_text(code)
    kind = code.rpartition("\nclass ")[2].partition("(")[0]
    return folder(at, body, prefix, heads, architectures=[kind], auto_map={auto: f"modeling_own.{kind}"}, **more)


def normal(*shape: int, seed: int = 7) -> torch.Tensor:
    """Weights that spread scores."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def armorm(at: Path, **options: Any) -> str:
    """ArmoRM and QRM: three objectives, mixed by what stands at the assistant's header, without which it raises."""
    ids = tiny.tokenizer()(HEADER, add_special_tokens=False)["input_ids"]
    code = GATED.replace("[HEADER_IDS]", str(ids))
    heads = {
        "regression_layer.weight": normal(3, 32),
        "gating.weight": normal(3, 32, seed=8),
        "gating.bias": normal(3, seed=9),
        "reward_transform_matrix": torch.eye(3) + 0.1,
    }
    dtype = options.pop("dtype", torch.float32)
    heads = {name: weight.to(dtype) for name, weight in heads.items()}
    body = tiny.causal(**options).model.to(dtype)
    return own_code(at, code, "AutoModelForSequenceClassification", body, "model", heads)


def pairrm(at: Path) -> str:
    """PairRM: a DeBERTa that reads a source and two candidates, each behind a token of its own."""
    torch.manual_seed(0)
    words = tiny.tokenizer(template=None)
    words.add_tokens(list(PAIR_TOKENS), special_tokens=True)
    size = {"vocab_size": len(words), "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    body = DebertaV2Model(DebertaV2Config(**{**tiny_sizes(), **size})).eval()
    ids = dict(zip(("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id"), PAIR_TOKENS, strict=True))
    heads = {"head_layer.weight": normal(1, 128), "head_layer.bias": normal(1)}
    config = {name: words.convert_tokens_to_ids(token) for name, token in ids.items()}
    auto = "AutoModelForSequenceClassification"
    return own_code(at, PAIR, auto, body, "pretrained_model", heads, tokenizer=words, **config)


def internlm2(at: Path) -> str:
    """InternLM2-reward, whose score stands at a token of its own."""
    body = tiny.causal().model
    heads = {"v_head.weight": normal(1, 32)}
    return own_code(at, REWARD_TOKEN, "AutoModel", body, "model", heads, reward_token_id=tiny.SPECIALS.index("[SEP]"))


def eurus(at: Path) -> str:
    """Eurus-RM: a Mistral, code that the transformers of today does not load."""
    torch.manual_seed(0)
    body = MistralModel(MistralConfig(**tiny_sizes(), num_key_value_heads=4, sliding_window=None)).eval()
    return own_code(at, UNFINISHED, "AutoModel", body, "model", {"regression_head.weight": normal(1, 32)})


def ziya(at: Path) -> str:
    """Ziya-LLaMA-7B-Reward."""
    heads = {"value_head.weight": normal(1, 32)}
    return own_code(at, BARE, "AutoModelForSequenceClassification", tiny.causal().model, "model", heads)


def oasst(at: Path, **config: Any) -> str:
    """OpenAssistant's Pythia reward models, whose model type no transformers knows."""
    torch.manual_seed(0)
    body = GPTNeoXModel(GPTNeoXConfig(**tiny_sizes())).eval()
    named = {"model_type": "gpt_neox_reward_model", "architectures": ["GPTNeoXRewardModel"], "pooling": "last"}
    return folder(at, body, "gpt_neox", {"out_proj.weight": normal(1, 32)}, **{**named, **config})


def beaver(at: Path, stored: bool = True, **config: Any) -> str:
    """Beaver's reward and cost models: a score head, and a normaliser with mean and variance."""
    heads = {"score_head.weight": normal(1, 32)}
    if stored:
        heads |= {"normalizer.mean": torch.tensor([0.5]), "normalizer.var": torch.tensor([4.0])}
        heads |= {"normalizer.count": torch.tensor([9])}
    settings = {"architectures": ["LlamaForScore"], "score_dim": 1, "bias": False, "normalizer_type": "RunningMeanStd"}
    return folder(at, tiny.causal().model, "model", heads, **{**settings, "score_type": "reward", **config})


def tiny_sizes() -> dict[str, Any]:
    """The config of a body of two layers, 32 wide."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": tiny.VOCABULARY, "pad_token_id": tiny.PAD, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS}
    return {**sizes, **ids, "max_position_embeddings": 512}
