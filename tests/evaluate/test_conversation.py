"""Talking to a run: the answers are the models' own, with their rewards, and do nothing to the terminal."""

import io
import json
from pathlib import Path

import pytest
import torch
from support.chat_templates import BY_NAME
from support.command_line import error_of, failed
from support.worded import make_recipe

from rlhf_recipes import Recipe, replace, run
from rlhf_recipes.cli.main import main_cli
from rlhf_recipes.data.tokens import response_texts, tokenize_pair, tokenize_prompt
from rlhf_recipes.evaluate.conversation import Conversation, Streamer
from rlhf_recipes.records.folder import adapter_folder, last_model, newest_round_first, policy_checkpoints
from rlhf_recipes.stages.reward.adapters import score_rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return replace(make_recipe(tmp_path_factory.mktemp("talk")), rounds=None)


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("talk-run") / "run"
    run(recipe, folder)
    return folder


def said(talk: Conversation, text: str) -> Conversation:
    talk.messages = [*talk.start, {"role": "user", "content": text}]
    return talk


def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str, lines: str) -> str:
    """What the command prints when these lines are typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    main_cli(["chat", *words])
    return capsys.readouterr().out


def test_at_temperature_0_each_model_says_its_likeliest_tokens(finished: Path) -> None:
    talk = said(Conversation(finished, ["ppo", "sft", "base"], 0.0, 6), "w5 w6 w7")
    prompt = tokenize_prompt(talk.tokenizer, talk.messages)
    for name in talk.names:
        ids = list(prompt)
        with talk.shared.role(name), torch.no_grad():
            for _ in range(6):
                ids.append(int(talk.shared.causal(torch.tensor([ids])).logits[0, -1].argmax()))
                if ids[-1] in talk.sampler.stop_token_ids:
                    break
        answer = talk.answer(name)
        assert answer.text == talk.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
        assert answer.tokens == len(ids) - len(prompt) and answer.ended == (ids[-1] in talk.sampler.stop_token_ids)
        (score,) = score_rows(talk.shared, [ids])
        assert answer.reward == pytest.approx(score.item(), abs=1e-5)


def test_the_prompt_is_what_the_model_was_trained_on(finished: Path) -> None:
    talk = Conversation(finished, ["sft"], 1.0, 4, system="w9")
    talk.messages += [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    talk.messages += [{"role": "user", "content": "w7"}]
    prompt = tokenize_prompt(talk.tokenizer, talk.messages)
    assert prompt == tokenize_pair(talk.tokenizer, talk.messages, [{"role": "assistant", "content": "w8"}])[0]
    assert talk.messages[0] == {"role": "system", "content": "w9"}


def test_what_streams_is_what_is_answered_and_a_seed_repeats_it(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(finished), "--temperature", "1", "--max-tokens", "8"]
    first = chat(monkeypatch, capsys, *words, lines="w5 w6\nw7\n")
    assert first == chat(monkeypatch, capsys, *words, lines="w5 w6\nw7\n/quit\nw8\n")
    assert first != chat(monkeypatch, capsys, *words, "--seed", "1", lines="w5 w6\nw7\n")
    talk = said(Conversation(finished, ["ppo"], 1.0, 8), "w5 w6")
    torch.manual_seed(0)
    answer = talk.answer("ppo")
    lines = first.splitlines()
    assert lines[0].startswith("ppo. ") and lines[1] == answer.text
    assert lines[2] == f"reward {answer.reward:.2f}, {answer.tokens} tokens" + ("" if answer.ended else ", cut off")
    assert len(lines) == 5


def test_models_side_by_side_and_commands(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "w5 w6\n/compare nobody\n/compare base\n/retry\n/nonsense\n/help\n/reset\n/retry\n/compare\nw5 w6\n"
    words = [str(finished), "--compare", "sft", "--temperature", "0", "--max-tokens", "3"]
    printed = chat(monkeypatch, capsys, *words, lines=lines)
    talk = said(Conversation(finished, ["ppo", "sft", "base"], 0.0, 3), "w5 w6")
    ppo, sft, base = (talk.answer(name) for name in talk.names)
    tables = printed.split("┏")
    assert all(answer.text in tables[1] and f"reward {answer.reward:.2f}" in tables[1] for answer in (ppo, sft))
    assert "has no finished model 'nobody'" in " ".join(tables[1].split())
    assert base.text in tables[2] and ppo.text in tables[2], "the last message was answered again"
    for part in ("There is no /nonsense here", "/retry  ", "There is nothing yet to answer again."):
        assert part in printed
    assert printed.rstrip().endswith("tokens, cut off" if not ppo.ended else "tokens")
    assert printed.splitlines()[-2] == ppo.text


def test_what_cannot_be_compared_is_said_and_the_conversation_goes_on(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = f"/compare {'b' * 300}\n/compare ./sft\n/compare reward\nw5 w6\n"
    printed = " ".join(chat(monkeypatch, capsys, str(finished), "--max-tokens", "3", lines=lines).split())
    assert "File name too long" in printed and "No model can be called './sft', with a dot" in printed
    assert printed.count(" tokens") == 1


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_is_typed_must_be_utf8(
    finished: Path, errors: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"w5\xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", typed)
    assert "What is typed, or comes from a file, must be UTF-8" in failed(capsys, ["chat", str(finished)])


def test_a_reward_model_without_its_bias_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bias = finished / "reward" / "score_bias.json"
    written = bias.read_text()
    readers = [
        ["chat", str(finished)],
        ["evaluate", str(finished), "--models", "sft", "--against", "base", "--judge", "reward", "--limit", "1"],
        ["export", str(finished), "--format", "reward", "--to", str(tmp_path / "reward")],
    ]
    try:
        for text, part in ((None, "is missing: run the same recipe again"), ('{"bias": null}', "None is no bias")):
            bias.unlink() if text is None else bias.write_text(text)
            for words in readers:
                said = failed(capsys, [*words, "--out", str(tmp_path / "out")] if words[0] == "evaluate" else words)
                assert f"{bias}" in said and part in said, words
    finally:
        bias.write_text(written)


@pytest.mark.parametrize(
    "text",
    [
        '{"input_ids": [[1]]}',
        '{"input_ids": [], "scores": []}',
        '{"input_ids": [[1], []], "scores": [0, 0]}',
        '{"input_ids": [[1.5]], "scores": [0]}',
        '{"input_ids": [[1]], "scores": [NaN]}',
        '{"input_ids": [[1]], "scores": "x"}',
        '{"input_ids": [[1, 99999]], "scores": [0]}',
    ],
)
def test_damaged_probes_of_a_reward_model_are_named(
    finished: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    probes = finished / "reward" / "probe.json"
    written = probes.read_text()
    try:
        probes.write_text(text)
        assert f"{probes} is missing, or holds no rows with their scores" in failed(capsys, ["chat", str(finished)])
    finally:
        probes.write_text(written)


def test_an_export_says_what_the_run_says(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, adapter, reward = (str(tmp_path / name) for name in ("merged", "adapter", "reward"))
    main_cli(["export", str(finished), "--to", merged])
    main_cli(["export", str(finished), "--to", reward, "--format", "reward"])
    base_id = json.loads((finished / "recipe.json").read_text())["base"]["model"]
    main_cli(["export", str(finished), "--to", adapter, "--format", "adapter", "--base-id", base_id])
    words = ["--temperature", "0", "--max-tokens", "6"]
    of_run = said(Conversation(finished, ["ppo"], 0.0, 6), "w5 w6 w7").answer("ppo")
    ended = "" if of_run.ended else ", cut off"
    for folder in (merged, adapter):
        lines = chat(monkeypatch, capsys, folder, *words, lines="w5 w6 w7\n").splitlines()
        assert lines[-2:] == [of_run.text, f"{of_run.tokens} tokens{ended}"], "no reward model comes with it"
    beside_run = said(Conversation(finished, [None, merged], 0.0, 6), "w5 w6 w7")
    assert beside_run.names == ["ppo", merged]
    assert beside_run.answer(merged).text == of_run.text
    assert beside_run.answer(merged).reward == pytest.approx(of_run.reward, abs=1e-5), "of the run's reward model"
    assert chat(monkeypatch, capsys, merged, *words, "--compare", adapter, lines="w5 w6\n").count("tokens") == 2
    assert Conversation(Path(merged), [], None, 6).config.temperature == 0.7, "as it was sampled in training"
    assert "is no policy that was exported" in failed(capsys, ["chat", reward])
    assert "ppo is no export." in failed(capsys, ["chat", merged, "--compare", "ppo"])
    record = json.loads((Path(adapter) / "export.json").read_text())
    (Path(adapter) / "export.json").write_text(json.dumps({**record, "base_id": "os:abort"}))
    assert "must be a Hub id or a folder, and is 'os:abort'" in failed(capsys, ["chat", adapter])
    record["base"]["chat_template"] = "another"
    (Path(adapter) / "export.json").write_text(json.dumps(record))
    assert "has another tokenizer or chat template than ppo" in failed(
        capsys, ["chat", str(finished), "--compare", adapter]
    )


def test_a_model_can_do_nothing_to_the_terminal(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = Streamer(Conversation(finished, ["base"], 0.0, 1).tokenizer)
    capsys.readouterr()
    streamer.on_finalized_text(" \x1b[2J")
    streamer.on_finalized_text("a\tb\n\x07\u202e", stream_end=True)
    assert capsys.readouterr().out == "\\x1b[2Ja\tb\n\\x07\\u202e\n"


def test_what_the_template_puts_before_an_answer_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = BY_NAME["qwen3"].tokenizer()
    for text in ("<think>\n\n</think>\n\nYes, it is.", "Yes, it is.", "<think>\nHm.</think>"):
        ids = tokenizer(text + "<|im_end|>", add_special_tokens=False).input_ids
        streamer = Streamer(tokenizer)
        for part in ([1, 2], *([token] for token in ids)):  # the first is the prompt
            streamer.put(torch.tensor(part))
        streamer.end()
        assert capsys.readouterr().out == response_texts(tokenizer, [ids], conversational=True)[0] + "\n"


def test_what_cannot_be_is_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "is no run folder" in error_of(capsys, ["chat", str(tmp_path)])
    assert "Did you mean sft?" in error_of(capsys, ["chat", str(finished), "--model", "sff"])
    assert "--temperature must not be below 0" in error_of(capsys, ["chat", str(finished), "--temperature", "-1"])
    assert "--max-tokens=100000 leaves no room" in error_of(capsys, ["chat", str(finished), "--max-tokens", "100000"])
    context = json.loads((Path(finished) / "recipe.json").read_text())["base"]["model"]
    most = json.loads((Path(context) / "config.json").read_text())["max_position_embeddings"]
    printed = chat(monkeypatch, capsys, str(finished), "--max-tokens", "4", lines="w5 " * most + "\nw6\n")
    assert "and room for" in printed and "reward" in printed.splitlines()[-1], "the conversation goes on"


def test_the_last_model_is_that_of_the_newest_finished_round(recipe: Recipe, tmp_path: Path) -> None:
    assert last_model(tmp_path, recipe) == "ppo" and last_model(tmp_path, replace(recipe, ppo=None)) == "sft"
    for number, name in ((2, "adapter_config.json"), (10, "adapter_config.json"), (11, "other.json")):
        folder = tmp_path / f"round-{number}" / "ppo" / "policy"
        folder.mkdir(parents=True)
        (folder / name).touch()
    assert last_model(tmp_path, recipe) == "round-10/ppo"
    assert [folder.name for folder in newest_round_first(tmp_path)[:-1]] == ["round-11", "round-10", "round-2"]


def test_checkpoints_are_models_by_name(recipe: Recipe, finished: Path) -> None:
    names = policy_checkpoints(finished)
    steps = [int(name.removeprefix("ppo/checkpoint-")) for name in names]
    assert steps == sorted(steps) and len(steps) == 2
    assert [adapter_folder(finished, recipe, name) for name in names] == [finished / name / "policy" for name in names]
