"""Sampling from roles and scoring the samples: which tokens count, and that batches change nothing."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ppo import (
    EOS,
    PROMPTS,
    STOPS,
    Scripted,
    in_sampling_order,
    sampler,
    scripted,
    shared_base,
)
from support.tiny_models import make_tokenizer, save_model

from rlhf_recipes.model.decode import cache_argument


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


# --- Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_a_response_runs_up_to_and_including_its_first_stop_token(folder: Path, pad: str) -> None:
    tokenizer = make_tokenizer(pad)
    p = tokenizer.pad_token_id
    cases = [  # response, length, ended
        ([5, 6, EOS, p, p], 3, True),
        ([5, 6, 7, 8, EOS], 5, True),  # EOS as the last possible token
        ([EOS, p, p, p, p], 1, True),
        ([5, 6, 7, 8, 9], 5, False),
        ([5, 50, p, p, p], 2, True),  # the second stop token
        ([5, 50, EOS, 7, 7], 2, True),
        ([0, 5, 0, EOS, p], 4, True),  # sampled padding tokens, where padding is token 0
    ]
    samples = scripted(folder, [case[0] for case in cases], tokenizer=tokenizer, stop_token_ids=[50])
    assert samples.lengths.tolist() == [length for _, length, _ in cases]
    assert samples.ended.tolist() == [ended for _, _, ended in cases]
    assert samples.responses() == [response[:length] for response, length, _ in cases]
    for i, prompt in enumerate(PROMPTS[: len(cases)]):
        assert samples.input_ids[i][samples.attention_mask[i]].tolist() == [*prompt, *cases[i][0][: cases[i][1]]]
        assert samples.response_mask[i].tolist() == [t < cases[i][1] for t in range(5)]


def test_a_response_may_end_in_padding_tokens_without_having_ended(folder: Path) -> None:
    samples = scripted(folder, [[5, 0, 0], [EOS, 0, 0]], stop_token_ids=[])
    assert samples.lengths.tolist() == [3, 1]
    assert samples.ended.tolist() == [False, True]


def test_responses_of_batches_of_different_length_are_put_together(folder: Path) -> None:
    samples = sampler(shared_base(folder), batch_size=1).sample("policy", PROMPTS)
    assert len(set(samples.lengths.tolist())) > 2
    for prompt, response, ended, ids, kept in zip(
        PROMPTS, samples.responses(), samples.ended, samples.input_ids, samples.attention_mask, strict=True
    ):
        assert ids[kept].tolist() == prompt + response
        assert ended == (response[-1] in {EOS, *STOPS}) and not {EOS, *STOPS} & set(response[:-1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_from_the_tempered_softmax_and_from_nothing_else(tmp_path: Path, temperature: float) -> None:
    warped = {"do_sample": True, "top_k": 1, "repetition_penalty": 5.0, "min_new_tokens": 3, "temperature": 7.0}
    (save_model(tmp_path) / "generation_config.json").write_text(json.dumps(warped))
    model, count = shared_base(tmp_path), 4000
    one_token = sampler(model, count, response_length=1, temperature=temperature)
    seen = one_token.sample("policy", [PROMPTS[1]] * count).input_ids[:, -1].bincount(minlength=64)
    with torch.no_grad(), model.role("policy"):
        logits = model.causal(torch.tensor([PROMPTS[1]])).logits[0, -1]

    def chi_square(tau: float) -> float:
        expected = count * (logits / tau).softmax(0)
        return ((seen - expected) ** 2 / expected).sum().item()

    # Of 64 tokens: mean 63, standard deviation 11.2.
    assert chi_square(temperature) < 63 + 5 * 11.2
    assert chi_square(temperature * 2) > 63 + 5 * 11.2


def test_generation_and_the_training_forward_agree_under_left_padding(folder: Path) -> None:
    greedy = sampler(shared_base(folder), temperature=1e-4)
    samples = greedy.sample("policy", PROMPTS)
    log_probs, entropy = greedy.log_probs("policy", samples, with_entropy=True)
    # Almost no temperature samples the best token, so the training forward must find it certain.
    assert log_probs.abs().max() < 1e-3 and entropy.max() < 1e-2


def test_the_batch_size_changes_no_sample(folder: Path) -> None:
    model, found = shared_base(folder), []
    for batch_size in (64, 5, 1):
        torch.manual_seed(0)
        found.append(sampler(model, batch_size, response_length=20).sample("policy", PROMPTS).responses())
    assert found[0] == found[1] == found[2]
    assert len({len(response) for response in found[0]}) > 4, "rows leave the batch at different times"


def test_finished_rows_leave_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = shared_base(folder), []
    assert model.caching.left_padding  # looked up now, so that its forwards are not counted
    real = model.backbone.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return real(*args, **kwargs)

    monkeypatch.setattr(model.backbone, "forward", forward)
    samples = sampler(model, response_length=20).sample("policy", PROMPTS)
    alive = [int((samples.lengths > t).sum()) for t in range(int(samples.lengths.max()))]
    # A quarter of the batch may have finished before it is made smaller, and it ends with its last row.
    assert len(rows) == len(alive) and all(n <= in_batch <= n / 0.75 for n, in_batch in zip(alive, rows, strict=True))
    assert rows[0] == 12 and rows[-1] < 4


def test_the_kv_cache_has_the_name_by_which_the_model_takes_it(folder: Path) -> None:
    class Older(torch.nn.Module):  # before transformers 5.24
        def forward(self, input_ids: Any, past_key_values: Any = None) -> None: ...

    class Newer(torch.nn.Module):
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    assert cache_argument(Older(), None) == {"past_key_values": None}
    assert cache_argument(Newer(), None) == {"cache": None}
    backbone = shared_base(folder).backbone
    assert cache_argument(backbone, None).keys() <= inspect.signature(type(backbone).forward).parameters.keys()


def test_a_long_prompt_goes_through_the_model_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, found = shared_base(folder), []
    for tokens in (10_000, 24):  # all at once, or two tokens of each of the 12 prompts
        monkeypatch.setattr("rlhf_recipes.model.decode.TOKENS_AT_ONCE", tokens)
        torch.manual_seed(0)
        found.append(sampler(model).sample("policy", PROMPTS).responses())
    assert found[0] == found[1]


# --- Scoring ----------------------------------------------------------------------------------------------------------


def test_the_batch_size_changes_no_log_prob_value_or_score(folder: Path) -> None:
    model = shared_base(folder)
    samples = sampler(model).sample("policy", PROMPTS)
    found = []
    for batch_size in (64, 5, 1):
        scorer = sampler(model, batch_size)
        found.append((*scorer.log_probs("policy", samples), scorer.values(samples), scorer.reward_scores(samples)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=2e-6)


def test_log_probs_are_zero_outside_the_response_and_the_models_own_inside(folder: Path) -> None:
    model = shared_base(folder)
    scorer = sampler(model, 5, temperature=0.7)
    samples = scorer.sample("policy", PROMPTS)
    log_probs, entropy = scorer.log_probs("reference", samples, with_entropy=True)
    assert not log_probs[~samples.response_mask].any() and not entropy[~samples.response_mask].any()
    for i, (prompt, response) in enumerate(zip(PROMPTS, samples.responses(), strict=True)):
        with torch.no_grad(), model.role("reference"):
            logits = model.causal(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.7).log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(log_probs[i, : len(response)], chosen, rtol=0, atol=5e-6)
        torch.testing.assert_close(entropy[i, : len(response)], -(expected.exp() * expected).sum(-1), rtol=0, atol=5e-6)


@pytest.mark.parametrize("stop_token_ids", [STOPS, ()])
def test_the_reward_is_the_head_at_the_last_response_token(folder: Path, stop_token_ids: Any) -> None:
    model = shared_base(folder)
    scorer = sampler(model, 5, response_length=3, stop_token_ids=stop_token_ids)
    samples = scorer.sample("policy", PROMPTS)
    assert 0 < samples.ended.sum() < 12 if stop_token_ids else not samples.ended.all()
    scores = scorer.reward_scores(samples)
    assert scores.unique().numel() == len(PROMPTS)
    for score, prompt, response in zip(scores, PROMPTS, samples.responses(), strict=True):
        with torch.no_grad(), model.role("reward"):
            hidden = model.causal(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[-1]
            expected = model.heads["reward"](hidden[0, -1])
        torch.testing.assert_close(score, expected[0], rtol=0, atol=2e-6)


def test_the_reward_where_padding_is_eos_and_where_padding_was_sampled(folder: Path) -> None:
    model = shared_base(folder, Scripted)
    assert isinstance(model, Scripted)
    responses = [[5, EOS, EOS, EOS], [5, 6, 7, EOS], [5, 6, 7, 8], [EOS] * 4, [0, 0, 5, 0]]
    model.script = in_sampling_order(responses, PROMPTS[:5])
    scorer = sampler(model, tokenizer=make_tokenizer("<eos>"), stop_token_ids=[])
    samples = scorer.sample("policy", PROMPTS[:5])
    wanted = [[5, EOS], [5, 6, 7, EOS], [5, 6, 7, 8], [EOS], [0, 0, 5, 0]]
    for score, prompt, response in zip(scorer.reward_scores(samples), PROMPTS, wanted, strict=False):
        ids = torch.tensor([prompt + response])
        with torch.no_grad(), model.role("reward"):
            expected = model.head_outputs(ids, torch.ones_like(ids))[0, -1]
        torch.testing.assert_close(score, expected, rtol=0, atol=2e-6)


def test_a_value_is_of_the_state_before_its_token(folder: Path) -> None:
    responses = [[20, 21, 22, 23, 24, 25]] * 6
    prompts = [PROMPTS[1]] * 6
    changed = [[*row[:t], *(50 + i for i in range(6 - t))] for t, row in enumerate(responses)]
    model = shared_base(folder, Scripted)
    assert isinstance(model, Scripted)
    scorer, values = sampler(model), []
    for model.script in (torch.tensor(responses), torch.tensor(changed)):
        values.append(scorer.values(scorer.sample("policy", prompts)))
    for t in range(6):  # row t has other tokens from token t on
        torch.testing.assert_close(values[1][t, : t + 1], values[0][t, : t + 1], rtol=0, atol=1e-6)
        assert (values[1][t, t + 1 :] - values[0][t, t + 1 :]).abs().gt(1e-4).all()
        with torch.no_grad(), model.role("critic"):
            ids = torch.tensor([prompts[t] + responses[t][:t]])
            expected = model.head_outputs(ids, torch.ones_like(ids))[0, -1]
        torch.testing.assert_close(values[0][t, t], expected, rtol=0, atol=2e-6)
