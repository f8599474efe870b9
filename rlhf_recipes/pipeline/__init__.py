"""A recipe becomes a run.

run      `run(recipe)`: one run, or a sweep of its variants
check    what is wrong with a recipe, before anything is loaded
one_run  the run folder, the stages in order, the summary
stage    one stage between two writes of the manifest
rounds   more feedback after PPO: sampled, labelled, trained on
variants the recipes of a sweep
sweep    the variants run, sharing what they need alike
"""
