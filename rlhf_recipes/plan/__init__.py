"""Does it fit, and how long does it take? Found before a weight is read.

plan      each stage's memory, phase by phase, and its work
dry_run   the stages' own code on tensors without storage
others    reward models of others, labelers and vLLM
kept      what they said, kept on disk for the next plan
meter     adds up what these tensors would allocate
skeleton  the base on the meta device, and its weights in bytes
cards     GPUs by name
hours     seconds of a step on one of them
advice    what to change where a stage does not fit
fit       what a run asks of all this
"""
