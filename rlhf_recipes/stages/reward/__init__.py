"""The reward stage: reward models from comparisons.

stage     the `reward` stage: main adapter, ensemble, judge
loss      the loss over rankings, and comparisons as tensors
trainer   TRL's RewardTrainer for rankings, ties and weights
adapters  finished reward adapters: folders, roles, probes, scores
card      what a reward model gets right, and how far to trust it
"""
