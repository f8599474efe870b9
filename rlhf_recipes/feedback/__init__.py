"""Human feedback itself: data checked, responses sampled, judged by people or by a model, and weighed.

    check      what a stage will do with a file
    sample     K responses a prompt, from the policies of a run  -> samples
    label      a local page on which people rank samples         -> labels
    judge      a model ranks samples in their place              -> labels
    agreement  how far the labelers agree, and what each is worth
    critique   a model criticises and revises its own answers    -> demonstrations

A sample is a JSONL row {"id", "prompt", "responses", ...}. A label is the same row with "ranking", "labeler" and how
the judgement came about: a file of labels is data for the `reward` stage as it is.
"""
