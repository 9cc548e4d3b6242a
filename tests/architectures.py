"""A tiny classifier of every architecture that is tested, from its config: random weights, a head that spreads."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from tiny import BOS, EOS, PAD, VOCABULARY
from transformers import AutoModelForSequenceClassification

# How many tokens each can read. Every architecture is given inputs shorter and as long as that.
POSITIONS = 128
# Sliding windows are shorter than the prompts of the tests.
WINDOW = 16

SMALL = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "num_labels": 1,
}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR_THEN_FULL = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SEQ2SEQ = {"decoder_start_token_id": PAD, "num_hidden_layers": None}


@dataclass(frozen=True)
class Architecture:
    """A config's class name, and what it needs beside what is small."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, **changed: Any) -> Any:
        """The config, with options changed; None leaves one to the class."""
        options = {**SMALL, **self.options, **changed}
        given = {name: value for name, value in options.items() if value is not None or name == "pad_token_id"}
        return getattr(transformers, f"{self.name}Config")(**given)

    def classifier(self, seed: int = 0, **changed: Any) -> Any:
        """A model whose scores differ clearly: fresh weights give nearly the same to all texts."""
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(self.config(**changed)).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(std=1.0 if _is_head(name, model) else 1.5 / weight.shape[-1] ** 0.5)
        return model


def _is_head(name: str, model: Any) -> bool:
    return not name.startswith(f"{model.base_model_prefix}.")


def one_by_one(model: Any, rows: list[list[int]]) -> np.ndarray:
    """The oracle: the model's own forward, a row at a time, no padding, no mask, no code of ours."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([row])).logits.float() for row in rows]).numpy()


# Decoders whose cache is keys and values: completions of one prompt share it.
DECODERS = {
    "Llama": Architecture("Llama", GROUPED),
    "Qwen2": Architecture("Qwen2", GROUPED),
    "Qwen3": Architecture("Qwen3", {**GROUPED, "head_dim": 8}),
    "Mistral": Architecture("Mistral", {**GROUPED, "sliding_window": WINDOW}),
    "Gemma": Architecture("Gemma", {**GROUPED, "head_dim": 8}),
    "Gemma2": Architecture("Gemma2", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
    "Gemma3": Architecture("Gemma3Text", {**GROUPED, "head_dim": 8, "sliding_window": WINDOW}),
    "Phi": Architecture("Phi"),
    "Phi3": Architecture("Phi3", GROUPED),
    "GPT2": Architecture("GPT2"),
    "GPTNeoX": Architecture("GPTNeoX"),
    "OPT": Architecture("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": Architecture("Bloom"),
    "Falcon": Architecture("Falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "FalconAlibi": Architecture("Falcon", {"alibi": True, "bias": True}),
    "Mixtral": Architecture("Mixtral", {**GROUPED, "num_local_experts": 4, "sliding_window": WINDOW}),
    "Qwen2Moe": Architecture("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3Moe": Architecture("Qwen3Moe", {**EXPERTS, "head_dim": 8}),
    "GptOss": Architecture("GptOss", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "sliding_window": WINDOW}),
}
# Decoders with a state that is not keys and values alone: each row is read whole.
HYBRIDS = {
    "Qwen3Next": Architecture("Qwen3Next", {**EXPERTS, **LINEAR_THEN_FULL, "head_dim": 8}),
    "Qwen3_5": Architecture("Qwen3_5Text", {**GROUPED, **LINEAR_THEN_FULL, "head_dim": 8}),
    "Jamba": Architecture(
        "Jamba",
        {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "num_experts": 2},
    ),
}
ENCODERS = {
    "Bert": Architecture("Bert"),
    # It counts positions from its padding id on.
    "Roberta": Architecture("Roberta", {"pad_token_id": 3}),
    "XLMRoberta": Architecture("XLMRoberta"),
    "DebertaV2": Architecture("DebertaV2", {"pooler_hidden_size": 32}),
    "DebertaV3": Architecture(
        "DebertaV2",
        {
            "pooler_hidden_size": 32,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 32,
        },
    ),
    "ModernBert": Architecture("ModernBert", {"local_attention": WINDOW, "cls_token_id": BOS, "sep_token_id": EOS}),
    "ModernBertMean": Architecture(
        "ModernBert",
        {"local_attention": WINDOW, "classifier_pooling": "mean", "cls_token_id": BOS, "sep_token_id": EOS},
    ),
    "DistilBert": Architecture("DistilBert", {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 2}),
    "Electra": Architecture("Electra", {"embedding_size": 32}),
}
SEQUENCE_TO_SEQUENCE = {
    "T5": Architecture(
        "T5",
        {
            **SEQ2SEQ,
            "max_position_embeddings": None,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
        },
    ),
    "Bart": Architecture(
        "Bart",
        {
            **SEQ2SEQ,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
    ),
}
# What their forward gives for a row depends on the padding beside it, mask or no mask.
DISTURBED_BY_PADDING = {
    "FNet": Architecture("FNet"),
    "XLNet": Architecture(
        "XLNet",
        {
            "max_position_embeddings": None,
            "num_hidden_layers": None,
            "hidden_size": None,
            "num_attention_heads": None,
            "d_model": 32,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 48,
        },
    ),
    "ConvBert": Architecture("ConvBert", {"embedding_size": 32}),
    "Funnel": Architecture(
        "Funnel",
        {
            "max_position_embeddings": None,
            "num_hidden_layers": None,
            "hidden_size": None,
            "num_attention_heads": None,
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 48,
            "block_sizes": [1, 1, 1],
        },
    ),
    "Canine": Architecture("Canine", {"vocab_size": None, "num_hash_buckets": 256}),
}
ALL = {**DECODERS, **HYBRIDS, **ENCODERS, **SEQUENCE_TO_SEQUENCE, **DISTURBED_BY_PADDING}


# Further bodies, by model type: a config's own options, the sizes among them made small, and what its rules ask for.
SIZES: dict[str, Any] = {
    **SMALL,
    **GROUPED,
    **EXPERTS,
    **dict.fromkeys(["d_model", "n_embd", "emb_dim", "dim", "embedding_size", "word_embed_proj_dim", "lru_width"], 32),
    **dict.fromkeys(["ffn_dim", "d_ff", "hidden_dim", "d_inner", "dff", "encoder_ffn_dim", "decoder_ffn_dim"], 48),
    **dict.fromkeys(["num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["head_dim", "d_kv", "d_head", "state_size", "mamba_d_state", "mamba_n_heads", "mamba_d_head"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["n_positions", "n_ctx", "max_seq_len", "max_sequence_length"], POSITIONS),
    **dict.fromkeys(["sliding_window", "attention_window", "local_attention", "q_lora_rank", "kv_lora_rank"], WINDOW),
    "n_inner": 48,
    "pooler_hidden_size": 32,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "mamba_dt_rank": 4,
    "decoder_start_token_id": PAD,
}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": None}
MAMBA2: dict[str, Any] = {"mamba_chunk_size": 16}
ASKED: dict[str, dict[str, Any]] = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "minicpm3": LATENT,
    "mistral4": LATENT,
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "intermediate_size": 48},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 16},
    "recurrent_gemma": {"attention_window_size": WINDOW, "num_hidden_layers": 3},
    "bamba": {**MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA2, "mamba_d_ssm": 64, "mamba_expand": 2},
    "mamba2": {"head_dim": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "zamba": {
        "layer_types": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "mamba_dt_rank": 4,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
    },
    "funnel": {"block_sizes": [1, 1, 1], "num_hidden_layers": None},
    "canine": {"vocab_size": None, "num_hash_buckets": 256},
    "perceiver": {
        "d_latents": 32,
        "num_latents": 8,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
    },
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "lilt": {"hidden_size": 96},
    "reformer": {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attention_head_size": 8,
        "hash_seed": 0,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": None,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
}


def small_config(model_type: str, **changed: Any) -> Any:
    """A config of this type with its sizes made small; an option of None is left to its class."""
    kind = transformers.CONFIG_MAPPING[model_type]
    always = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "num_labels": 1}
    own = kind().to_dict()
    options = {**{name: size for name, size in SIZES.items() if name in own}, **always, **ASKED.get(model_type, {})}
    return kind(**{name: value for name, value in {**options, **changed}.items() if value is not None})


def small_model(auto: Any, model_type: str, **changed: Any) -> Any:
    """A model of this type through one of transformers' Auto classes, with weights that tell inputs apart."""
    torch.manual_seed(0)
    model = auto.from_config(small_config(model_type, **changed)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim > 1:
            weight.normal_(std=1.0 if _is_head(name, model) else 1.5 / weight.shape[-1] ** 0.5)
    return model


# Sequence classifiers beside those above.
CLASSIFIERS_BY_TYPE = """
albert arcee big_bird bigbird_pegasus biogpt camembert cohere_compass_text ctrl data2vec-text deberta deepseek_v2
deepseek_v3 diffllama doge ernie esm eurobert exaone4 glm glm4 gpt_bigcode gpt_neo gptj gte helium hunyuan_v1_dense
hunyuan_v1_moe ibert jetmoe layoutlm lilt longformer luke mbart megatron-bert minicpm3 minimax ministral ministral3
mistral4 mobilebert modernbert-decoder mpnet mpt mt5 mvp nemotron nomic_bert nystromformer olmo olmo2 olmo3 openai-gpt
perceiver persimmon phimoe plbart reformer rembert roberta-prelayernorm roc_bert roformer seed_oss smollm3 squeezebert
stablelm starcoder2 tapas umt5 xlm xlm-roberta-xl xmod yoso zamba canine funnel
"""
# Policies beside those above; BERT and its kin as decoders, legacy ones, recurrent ones, hybrids.
WRITERS_BY_TYPE = """
apertus bamba bart bert biogpt cohere cohere2 ctrl deepseek_v2 deepseek_v3 ernie4_5 falcon_h1 gpt_neo gptj granite
granitemoehybrid helium lfm2 mamba mamba2 megatron-bert minimax mpt nemotron olmo2 openai-gpt persimmon phimoe
recurrent_gemma rembert roc_bert rwkv smollm3 stablelm starcoder2 xglm zamba
"""
CLASSIFIERS, WRITERS = CLASSIFIERS_BY_TYPE.split(), WRITERS_BY_TYPE.split()
# Language models that are no policy by their plain forward.
NOT_CAUSAL = ["xlnet", "xlm", "prophetnet"]
