"""Measuring what training did: win rates, behaviour and the alignment tax of a run's models on held-out prompts.

evaluation    all of it for a run, kept by content, into RUN/evaluation
plan          what is compared, found before a weight is loaded
models        models by name, the base that they share, and their answers
opponents     prompts of AlpacaEval's and Arena-Hard's files, and the answers in them
judges        who says which answer is better: gold, reward models, functions, models that are asked
people        what people say of the answers, and how far other judges agree; arena opens the page for it
measurements  what is measured of each model, base by base, and what each judge says
behaviour     what answers are like, whatever their quality; opinions.yaml asks for agreement with both sides
under_base    what the bare base makes of answers: are they language, are they about their prompts
tax           the tasks of lm-evaluation-harness
wins          win rates with intervals, plain and length-controlled
results       evaluation.json and answers.jsonl, with what earlier calls found of the same
verdict       which checkpoint to ship, and what to distrust
rewardbench   RewardBench's files by a run's reward models
comparisons   people's comparisons by a run's reward models
tables        the tables for the terminal
conversation  talking to the models of a run, with the reward of each answer
"""
