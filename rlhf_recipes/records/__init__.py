"""The run folder: what is written in it, and what it holds. No torch.

contents  what each file holds, with units
files     writes that a kill leaves whole
cache     the user's cache, beside all run folders
lock      one process at a time in a folder, or at a file
digest    hashes of JSON values: keys of caches, ids of rows
trust     what of a run folder may be obeyed
folder    models, checkpoints and rounds of a run by name
checkpoints  which of a stage's are whole
manifest  what was run, and which stages are done
recorder  what a stage writes while it trains
tracking  the same for W&B, trackio or TensorBoard
rates     win rates with intervals
terminal  what may be shown in a terminal
summary   what a run achieved, as JSON and as a table
"""
