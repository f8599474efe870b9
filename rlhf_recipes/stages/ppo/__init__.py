"""PPO on a shared base.

stage       the `ppo` stage: roles, training, comparison
roles       its roles in one list
trainer     PPOTrainer: rollout, advantages, update, log, adapt
rollout     samples with all that an update needs
objectives  the mathematics, as pure functions
metrics     what a log says, under the names of TRL
"""
