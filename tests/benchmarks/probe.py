"""What a base knows of comparisons before any training: a linear model on its hidden states, by source.

    python tests/benchmarks/probe.py MODEL DATA [--columns source=tranche] [--chat-template chatml] [--dtype bfloat16]

The base reads prompt + response; the mean of its last hidden states over the response, the better one's less the worse
one's, goes through a logistic regression without intercept (each state over its standard deviation; five folds). What
it gets right on the folds that it has not seen is about what a reward model of so many comparisons can hope for. Once
fitted to all sources together, and once to each alone: where the second is far better, the sources ask for things that
contradict each other, and the base is too small to tell which is asked for.
"""

import argparse
import sys

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from rlhf_recipes import Base, Stage
from rlhf_recipes.data.prepare import prepare
from rlhf_recipes.model.base import load_base, load_tokenizer
from rlhf_recipes.records.rates import mean_rate

ROWS = 32  # that the base reads at once
FOLDS = 5
STRENGTH = 1e-3  # of the regression: scikit-learn's C, the inverse of the penalty


def mean_states(base: Base, rows: list[tuple[list[int], int]]) -> np.ndarray:
    """The base's last hidden states, averaged over the response of each row: (N, H).

    Args:
        rows: token ids of prompt + response, and the prompt's length.
    """
    model = load_base(base).base_model.eval()
    order, states = sorted(range(len(rows)), key=lambda index: len(rows[index][0])), {}
    with torch.no_grad():
        for start in tqdm(range(0, len(rows), ROWS), desc="read", disable=None):
            part = order[start : start + ROWS]
            ids = torch.zeros(len(part), max(len(rows[index][0]) for index in part), dtype=torch.long)  # (B, T)
            for row, index in enumerate(part):
                ids[row, : len(rows[index][0])] = torch.tensor(rows[index][0])
            # Padding on the right is seen by no token before it.
            hidden = model(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
            for row, index in enumerate(part):
                tokens, prompt = rows[index]
                states[index] = hidden[row, prompt : len(tokens)].float().mean(0).numpy()
    return np.stack([states[index] for index in range(len(rows))])


def right_by_probe(better: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Whether each pair (N,) is ranked right by a regression on the other folds' pairs.

    Args:
        better: (N, H) by how much the better response's states are above the worse one's.
        folds: (N,) the fold of each pair.
    """
    right = np.zeros(len(better))
    for fold in range(FOLDS):
        seen = better[folds != fold]
        both = np.concatenate([seen, -seen])  # each pair in both orders
        labels = np.repeat([1, 0], len(seen))
        probe = LogisticRegression(C=STRENGTH, fit_intercept=False, max_iter=300).fit(both, labels)
        right[folds == fold] = better[folds == fold] @ probe.coef_[0] > 0
    return right


def main() -> None:
    """Print a line for all comparisons, and two for each source."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--columns", nargs="*", default=[], metavar="OURS=THEIRS")
    parser.add_argument("--chat-template")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    base = Base(options.model, chat_template=options.chat_template, dtype=options.dtype)
    columns = dict(word.split("=", 1) for word in options.columns)
    source = Stage(options.data, columns=columns, heldout=0.0)
    pairs = prepare("reward", source, load_tokenizer(base), options.max_length, 0).train.to_list()
    pairs = [pair for pair in pairs if sorted(pair["ranking"]) == [1, 2]]
    if not pairs:
        sys.exit(f"{options.data} has no comparison of two responses with a preference.")
    rows = [
        (pair["responses_ids"][pair["ranking"].index(rank)], pair["prompt_length"]) for pair in pairs for rank in (1, 2)
    ]
    states = mean_states(base, rows)
    better = states[::2] - states[1::2]
    better /= better.std(0) + 1e-6
    longer = np.array(
        [len(chosen[0]) > len(rejected[0]) for chosen, rejected in zip(rows[::2], rows[1::2], strict=True)]
    )
    sources = np.array([str(pair.get("source")) for pair in pairs])
    folds = np.random.default_rng(0).integers(0, FOLDS, len(pairs))
    together = right_by_probe(better, folds)

    def line(name: str, right: np.ndarray, among: np.ndarray) -> None:
        rate = mean_rate(right)
        interval = f"{rate['rate']:6.1%} ({rate['low']:.1%} to {rate['high']:.1%})"
        print(f"{name:<40} {len(right):>6,} pairs {interval}; the longer one is better in {longer[among].mean():.1%}")

    line("all", together, np.ones(len(pairs), bool))
    for name in sorted({*sources}):
        among = sources == name
        line(f"{name}, fitted to all", together[among], among)
        line(f"{name}, fitted to it alone", right_by_probe(better[among], folds[among]), among)


if __name__ == "__main__":
    main()
