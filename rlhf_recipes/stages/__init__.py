"""What trains: each stage, and what they share.

job        all that one stage needs
options    arguments of our trainers beside TRL's
configure  a recipe's settings as trainer configurations, checked
trials     what the libraries would refuse later, tried before
inputs     a stage's data, and what it takes beside it
callbacks  what watches a trainer
shares     what makes several processes train as one
stop       what ends it in good order
scores     what the reward of PPO is made of
compare    the models sampled on held-out prompts and scored
sft, dpo   the stages that TRL trains as they are
reward/    the reward stage
ppo/       the PPO stage
"""
