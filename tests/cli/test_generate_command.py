"""`calibrated-rewards generate` and `multiple-choice` with tiny models: the files, the numbers, and what is refused."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from calibrated_rewards import BestOf, CalibratedReward, Identity, ReferenceTable, RewindAndRepeat, WorstOf
from calibrated_rewards.calibration.calibrate import calibrate
from calibrated_rewards.cli.main import main
from calibrated_rewards.evaluation import Question, answer_questions
from calibrated_rewards.files import claim
from calibrated_rewards.heads import HeadedModel
from calibrated_rewards.models.adapters import ignore_peft_warning
from calibrated_rewards.reward import CombinedReward, Quantiles
from calibrated_rewards.samplers import Reranked, load_sampler, sample, share_model, write_completions
from calibrated_rewards.samplers.hf import HfSampler
from calibrated_rewards.samplers.loading import LoadedSampler
from calibrated_rewards.samplers.protocol import Decoding
from calibrated_rewards.scorers.classifiers import SequenceClassifier
from calibrated_rewards.scorers.ensemble import Cost
from calibrated_rewards.scorers.implicit import ImplicitReward
from calibrated_rewards.scorers.loading import load_scorer
from calibrated_rewards.scorers.protocol import score

CHATS = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy, a reward model, prompts, a table and a saved reward, on disk."""
    folder = tmp_path_factory.mktemp("models")
    tiny.saved(tiny.causal(), folder / "policy", tiny.tokenizer())
    tiny.saved(tiny.classifier(), folder / "rm", tiny.tokenizer())
    rows = [{"prompt": chat, "prompt_id": f"q{i}"} for i, chat in enumerate(CHATS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--policy", str(folder / "policy"), "--prompts", str(folder / "prompts.jsonl"), "--max-tokens", "5"]
    rm = ["--reward-model", str(folder / "rm")]
    assert main(["calibrate", *words, *rm, "--out", str(folder / "table"), "-k", "16", "--quiet"]) == 0
    options = ["--transform", "exp:5", "--out", str(folder / "reward")]
    assert main(["reward", str(folder / "table"), *rm, *options]) == 0
    return folder


@pytest.fixture(scope="module")
def policy():
    """A sampler of the model that the commands load from disk."""
    return HfSampler(tiny.causal(), tiny.tokenizer(), Decoding(5))


@pytest.fixture(scope="module")
def scorer():
    """The reward model that is on disk."""
    return SequenceClassifier(tiny.classifier(), tiny.tokenizer())


def asked(models, out, *more):
    """The command line of `generate`, as a list of words."""
    places = ["--policy", str(models / "policy"), "--prompts", str(models / "prompts.jsonl"), "--out", str(out)]
    return ["generate", *places, "--quiet", *more]


def chosen(path):
    """What matters of each line; scores as far as batches of another shape let them agree."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(r["completion"], r.get("draws"), round(r["score"], 4)) for r in rows]


@pytest.mark.parametrize(
    ("words", "procedure"), [(["--best-of", "3"], BestOf(3)), (["--worst-of", "2"], WorstOf(2))], ids=["best", "worst"]
)
def test_the_command_does_what_the_function_does(models, policy, scorer, tmp_path, capsys, words, procedure):
    """By a reward model, and by a saved reward, whose reward model is enough: the same completions."""
    sampler = Reranked(policy, scorer, procedure)
    write_completions(tmp_path / "a.jsonl", CHATS, sampler, ids=["q0", "q1", "q2"], samples=2)
    rm = ["--reward-model", str(models / "rm"), "--max-tokens", "5"]
    assert main(asked(models, tmp_path / "b.jsonl", *words, *rm, "--samples", "2")) == 0
    assert main(asked(models, tmp_path / "c.jsonl", *words, "--reward", str(models / "reward"), "--samples", "2")) == 0
    assert chosen(tmp_path / "a.jsonl") == chosen(tmp_path / "b.jsonl") == chosen(tmp_path / "c.jsonl")
    assert json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])["id"] == "q0"
    line = capsys.readouterr().out.splitlines()[-1]
    draws = 6 * procedure.draws
    assert f"c.jsonl: 6 completions of 3 prompts, {words[0][2:].replace('-', ' ')} {words[1]} from {draws} dra" in line


def test_rewinding_looks_at_quantiles(models, policy, scorer, tmp_path):
    """Those of the saved reward's table, not its transform."""
    table = CalibratedReward.from_pretrained(models / "reward").table
    by_hand = Reranked(policy, Quantiles(CalibratedReward(scorer, table)), RewindAndRepeat(0.7, 5))
    write_completions(tmp_path / "a.jsonl", CHATS, by_hand)
    words = ["--rewind", "0.7:5", "--reward", str(models / "reward"), "--candidates"]
    assert main(asked(models, tmp_path / "b.jsonl", *words)) == 0
    assert chosen(tmp_path / "a.jsonl") == chosen(tmp_path / "b.jsonl")
    for line in (tmp_path / "b.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert len(row["candidates"]) == row["draws"]
        assert all(each["score"] < 0.7 for each in row["candidates"][:-1])


def test_soft_best_of_and_no_choice(models, tmp_path, capsys):
    """Scores are quantiles; one draw needs no reward model; a second call finds all there."""
    words = ["--soft-best-of", "4:0.1", "--reward", str(models / "reward"), "--json"]
    assert main(asked(models, tmp_path / "a.jsonl", *words)) == 0
    summary = json.loads(capsys.readouterr().out)
    assert 0 <= summary["mean_score"] <= 1
    assert (summary["draws"], summary["before"], summary["procedure"]) == (12, 0, "SoftBestOf(n=4, temperature=0.1)")
    assert main(asked(models, tmp_path / "b.jsonl", "--max-tokens", "5")) == 0
    before = (tmp_path / "b.jsonl").read_bytes()
    assert main(asked(models, tmp_path / "b.jsonl", "--max-tokens", "5")) == 0
    assert (tmp_path / "b.jsonl").read_bytes() == before
    assert "3 completions (3 were there) of 3 prompts\n" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from calibrated_rewards.samplers import completions_file
complete, count = completions_file._complete, 0
def complete_or_die(*arguments):
    global count
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return complete(*arguments)
completions_file._complete = complete_or_die
from calibrated_rewards.cli.main import main
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_as_if_it_had_not_been(models, tmp_path, capsys):
    """SIGKILL while the second prompt is drawn, and the same command again: the same bytes, and one prompt kept."""
    words = ["--best-of", "2", "--reward-model", str(models / "rm"), "--max-tokens", "5", "--prompts-at-once", "1"]
    whole, path = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, *asked(models, path, *words)]
    assert subprocess.run(command, env=env, check=False, timeout=500).returncode == -signal.SIGKILL
    assert len(path.read_text().splitlines()) == 1
    assert main(asked(models, whole, *words)) == 0
    assert main(asked(models, path, *words)) == 0
    assert path.read_bytes() == whole.read_bytes()
    assert "3 completions (1 were there)" in capsys.readouterr().out


def test_a_second_process_on_a_file_is_refused(models, tmp_path, capsys):
    """While another one has it, the command names the file, and changes nothing."""
    words = asked(models, tmp_path / "a.jsonl", "--max-tokens", "5")
    assert main(words) == 0
    before = (tmp_path / "a.jsonl").read_bytes()
    with claim(tmp_path / "a.jsonl.run.json"):
        assert main(words) == 2
    assert f"{tmp_path / 'a.jsonl'} is being written by another process" in capsys.readouterr().err
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize("words", [["--soft-best-of", "2:0.1"], ["--rewind", "0.7:2"]], ids=["soft", "rewind"])
def test_a_prompt_without_references_is_refused_before_drawing(models, tmp_path, capsys, words):
    """The last one is not in the table: nothing was drawn, and no file was begun. The best of N needs no table."""
    unknown = [{"role": "user", "content": "unheard of"}]
    rows = [{"prompt": each} for each in (*CHATS, unknown)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = ["--policy", str(models / "policy"), "--prompts", str(tmp_path / "p.jsonl"), "--prompts-at-once", "1"]
    words = ["generate", *places, "--quiet", "--reward", str(models / "reward"), *words]
    assert main([*words, "--out", str(tmp_path / "a.jsonl")]) == 2
    assert "unheard of" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
    words[-2:] = ["--best-of", "2"]
    assert main([*words, "--out", str(tmp_path / "b.jsonl")]) == 0


@pytest.mark.parametrize("words", [["--soft-best-of", "2:0.1"], ["--rewind", "0.7:2"], ["--best-of", "2"]])
def test_a_combined_reward_refuses_before_drawing(models, tmp_path, capsys, words):
    """A prompt that one component does not know: nothing was drawn. Without that prompt the command does its work."""
    reward = CalibratedReward.from_pretrained(models / "reward", transform=Identity())
    short = CalibratedReward(reward.scorer, ReferenceTable.build([(chat, [-1.0, 0.0, 1.0]) for chat in CHATS[:2]]))
    CombinedReward({"rm": reward, "short": short}).save_pretrained(tmp_path / "combined")
    words = [*words, "--reward", str(tmp_path / "combined"), "--max-tokens", "5", "--prompts-at-once", "1"]
    assert main(asked(models, tmp_path / "a.jsonl", *words)) == 2
    assert "question 2" in capsys.readouterr().err
    assert not (tmp_path / "a.jsonl").exists()
    assert main(asked(models, tmp_path / "b.jsonl", *words, "--limit", "2")) == 0


@pytest.fixture(scope="module")
def head(models):
    """A preference head on the policy that is on disk."""
    model = AutoModelForCausalLM.from_pretrained(models / "policy")
    HeadedModel.build(model, tiny.tokenizer(), pooler="tanh").save_pretrained(models / "head")
    return str(models / "head")


def test_one_model_writes_and_scores(models, head, tmp_path, caplog):
    """A head on the policy: the candidates are those that the policy writes, with the scores that the head gives."""
    words = ["--best-of", "4", "--reward-model", head, "--max-tokens", "5", "--candidates"]
    with caplog.at_level("INFO"):
        assert main(asked(models, tmp_path / "a.jsonl", *words)) == 0
    assert "policy: one model writes and scores" in caplog.text
    scorer = load_scorer(head)
    apart = Reranked(HfSampler(tiny.causal(), tiny.tokenizer(), Decoding(5)), scorer, BestOf(4))
    write_completions(tmp_path / "b.jsonl", CHATS, apart, candidates=True)
    assert chosen(tmp_path / "a.jsonl") == chosen(tmp_path / "b.jsonl")
    out = tmp_path / "table"
    policy = ["--policy", str(models / "policy"), "--prompts", str(models / "prompts.jsonl"), "--max-tokens", "5"]
    caplog.clear()
    with caplog.at_level("INFO"):
        assert main(["calibrate", *policy, "--reward-model", head, "--out", str(out), "-k", "4"]) == 0
    assert "policy: one model writes and scores" in caplog.text
    expected = calibrate(CHATS, load_sampler(models / "policy", Decoding(5)), scorer, k=4)
    table = ReferenceTable.load(out)
    for row in range(3):
        np.testing.assert_allclose(table.scores(row), expected.scores(row), atol=1e-5)
    assert table.meta["sampler"] == expected.meta["sampler"]


def test_models_are_shared_only_if_they_are_one(models, head, policy, scorer):
    """Another policy, precision, engine or scorer: the sampler stays as it is."""
    headed, sampler = load_scorer(head), load_sampler(models / "policy", Decoding(5))
    shared = share_model(sampler, headed)
    assert shared.model is headed.scorer.model
    assert share_model(sampler, Cost(headed)) is sampler
    assert share_model(sampler, load_scorer(head, cost=True)).scorer is not None
    for other in (policy, load_sampler(models / "policy", Decoding(5), dtype="bfloat16")):
        assert share_model(other, headed) is other
    assert share_model(sampler, scorer) is sampler
    other = tiny.saved(tiny.causal(5), models / "other", tiny.tokenizer())
    assert isinstance(share_model(load_sampler(other, Decoding(5)), headed), LoadedSampler)


def test_an_adapter_on_the_heads_model(models, head, tmp_path):
    """A policy that was trained by LoRA on the head's model: one base, and the scores of two models apart."""
    with ignore_peft_warning():
        options = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(models / "policy"), options).save_pretrained(
            tmp_path / "lora"
        )
    headed, sampler = load_scorer(head), load_sampler(tmp_path / "lora", Decoding(5))
    shared, apart = share_model(sampler, headed), load_sampler(tmp_path / "lora", Decoding(5))
    own = {each.data_ptr() for each in shared.model.parameters()}
    assert {each.data_ptr() for each in headed.scorer.model.parameters()} == own
    written, expected = (sample(each, CHATS, [[1, 2, 3]] * 3) for each in (shared, apart))
    assert [r.completion for own in written for r in own] == [r.completion for own in expected for r in own]
    assert shared.fingerprint() == apart.fingerprint()
    pairs = [c for c in CHATS for _ in range(3)], [r.completion for own in written for r in own]
    alone = load_scorer(head)
    np.testing.assert_allclose(score(headed, *pairs), score(alone, *pairs), atol=1e-5)
    assert headed.fingerprint() == alone.fingerprint()


def test_a_head_with_an_adapter_of_its_own(models, tmp_path):
    """One base in memory: the policy writes without the head's adapter, the head reads with it, as two models would."""
    policy = AutoModelForCausalLM.from_pretrained(models / "policy")
    own = HeadedModel.build(policy, tiny.tokenizer(), backbone="lora")
    with torch.no_grad():
        for name, weight in own.model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    own.save_pretrained(tmp_path / "head")
    headed, alone = (load_scorer(tmp_path / "head") for _ in range(2))
    sampler, apart = (load_sampler(models / "policy", Decoding(5)) for _ in range(2))
    shared = share_model(sampler, headed)
    assert shared.model is headed.scorer.model.get_base_model()
    assert shared.fingerprint() == apart.fingerprint()
    for _ in range(2):  # also after the head has read
        written, expected = (sample(each, CHATS, [[1, 2, 3]] * 3) for each in (shared, apart))
        assert [r.completion for own in written for r in own] == [r.completion for own in expected for r in own]
        pairs = [c for c in CHATS for _ in range(3)], [r.completion for own in written for r in own]
        np.testing.assert_allclose(score(headed, *pairs), score(alone, *pairs), atol=1e-5)
    assert headed.fingerprint() == alone.fingerprint()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--best-of", "2", "--max-tokens", "5"], "needs --reward-model PATH|ID|URL, or --reward DIR"),
        (["--reward-model", "RM", "--reward", "REWARD"], "leave --reward-model out"),
        (
            ["--rewind", "0.7", "--reward-model", "RM", "--max-tokens", "5"],
            "quantiles of a calibrated reward, --reward DIR",
        ),
        (["--best-of", "2", "--reward-model", "RM"], "--max-tokens N"),
    ],
)
def test_what_is_refused(models, tmp_path, capsys, words, why):
    """Each with what to say instead."""
    places = {"RM": str(models / "rm"), "REWARD": str(models / "reward")}
    assert main(asked(models, tmp_path / "a.jsonl", *(places.get(word, word) for word in words))) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--soft-best-of", "8"], "needs N:T, such as 8:0.1"),
        (["--soft-best-of", "8:0"], "temperature >= 0.001"),
        (["--rewind", "1.5"], "a threshold in"),
        (["--rewind", "0.5:x"], "needs Q or Q:TRIES"),
        (["--best-of", "2", "--worst-of", "2"], "not allowed with"),
    ],
)
def test_wrong_words(models, tmp_path, capsys, words, why):
    """argparse's errors say what a value looks like."""
    with pytest.raises(SystemExit):
        main(asked(models, tmp_path / "a.jsonl", *words))
    assert why in capsys.readouterr().err


def test_multiple_choice(models, scorer, tmp_path, capsys):
    """By the reward model and by log-probability: what the function says of the same scorers."""
    options = [["yes", "no", "a longer one"], ["b", "a"], ["x", "yy", "zzz"]]
    rows = [
        {"prompt": chat, "choices": each, "answer": each[i % 2]}
        for i, (chat, each) in enumerate(zip(CHATS, options, strict=True))
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--policy", str(models / "policy"), "--reward-model", f"head={models / 'rm'}"]
    assert main(["multiple-choice", "--questions", str(tmp_path / "q.jsonl"), *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    logprob = ImplicitReward(tiny.causal(), tiny.tokenizer(), beta=1.0, reduce="mean", reference_free=True)
    questions = [Question(chat, tuple(each), i % 2) for i, (chat, each) in enumerate(zip(CHATS, options, strict=True))]
    expected = answer_questions(questions, {"head": scorer, "log-probability": logprob})
    assert found == json.loads(json.dumps(expected.as_json()))
    by_hand = [score(logprob, [q.prompt] * len(q.options), q.options).argmax() == q.answer for q in questions]
    assert found["right"]["log-probability"]["value"] == pytest.approx(sum(by_hand) / 3)
    assert (
        main(["multiple-choice", "--questions", str(tmp_path / "q.jsonl"), "--reward-model", str(models / "rm")]) == 0
    )
    assert capsys.readouterr().out.startswith("reward is right on ")
    assert main(["multiple-choice", "--questions", str(tmp_path / "q.jsonl")]) == 2
    assert "needs --reward-model" in capsys.readouterr().err
    (tmp_path / "none.jsonl").write_text("")
    assert main(["multiple-choice", "--questions", str(tmp_path / "none.jsonl"), *words]) == 2
    assert "none.jsonl has no questions" in capsys.readouterr().err
    words[3] = str(models / "rm")
    assert (
        main(["generate", *words, "--prompts", str(tmp_path / "none.jsonl"), "--out", str(tmp_path / "a.jsonl")]) == 2
    )
    assert "none.jsonl has no prompts" in capsys.readouterr().err
