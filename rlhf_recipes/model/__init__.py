"""The one base, its roles, and sampling from them.

base       loading the base and its tokenizer, precision, fingerprint
shared     SharedBase: every role an adapter on the one base
log_probs  log-probabilities of tokens without keeping logits
decode     sampling a batch of responses token by token
sampler    sampling and scoring any number of rows, in batches
backends   other ways to sample: transformers' three, and vLLM
open       the models of a run folder on one base
quiet      what libraries say about themselves, kept from the terminal
memory     peak memory, and what to do where it runs out
"""
