"""Human feedback itself: responses sampled, judged by people or by a model, and the judgements weighed.

A file or two for each command:

    sample        K responses a prompt, from the policies of a run  -> samples
    label, board  a local page on which people rank samples         -> labels; sheet: what else it asks
    simulate      a function ranks them, whose truth is known       -> labels
    judge         a model ranks samples in their place              -> labels
    critique      a model criticises and revises its own answers    -> demonstrations
    agreement     how far the labelers agree, and what each is worth; with agreement_warnings, agreement_tables

What they stand on:

    rows          files of samples and labels, and beside them what they are made with
    pairs         judgements as pairs of responses, and statistics of them
    habits        how one labeler works
    worth         Dawid and Skene's model: weights of labelers, and judgements merged
    client        a model that answers, whatever it is; connect makes one: local or endpoint
    constitution  what a model is asked when it judges or criticises
    ledger        what it was asked and answered, and what that cost
    parallel      many questions at once

A sample is a JSONL row {"id", "prompt", "responses", ...}. A label is the same row with "ranking", "labeler" and how
the judgement came about: a file of labels is data for the `reward` stage as it is.
"""
