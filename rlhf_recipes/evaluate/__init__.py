"""Measuring what training did: win rates, behaviour and the alignment tax of a run's models on held-out prompts.

models      models by name, the base that they share, and their answers
judges      who says which answer is better: gold, reward models, functions, models that are asked
wins        win rates with bootstrap intervals, plain and length-controlled
behaviour   what answers are like, whatever their quality
tax         perplexity, and the tasks of lm-evaluation-harness
evaluation  all of it for a run, kept by content, into RUN/evaluation
verdict     which checkpoint to ship, what to distrust, and the tables
overoptimization  reward and quality over KL in several runs, with Gao et al.'s fit
"""
