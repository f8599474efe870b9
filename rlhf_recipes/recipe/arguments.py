"""Which arguments of the stages' trainers a recipe may set: all but these, each with its reason.

A stage's configuration has what TRL's and transformers' trainers have, over a hundred arguments. The runner sets some
of them itself, and some nothing would read, or they would do harm. Those are refused, so that no setting is silently
ignored. `{stage}` in a reason is the stage's name.
"""

PRECISION = "precision is chosen at run time; `base.dtype` sets it"
SPACE = "set the environment variable TRACKIO_SPACE_ID"

OWNED = {  # the runner sets it
    "output_dir": "--run-dir says where a run is written",
    "resume_from_checkpoint": "running the same recipe again resumes it",
    "report_to": "set `tracker` of the recipe",
    "run_name": "the tracker's runs are named after the run folder and the stage",
    "project": "set the environment variable WANDB_PROJECT or TRACKIO_PROJECT",
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), SPACE),
    **dict.fromkeys(("seed", "data_seed"), "set `seed` of the recipe"),
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), PRECISION),
    "use_cpu": "the device is chosen at run time",
    "model_init_kwargs": "the model is described by `base`",
    "trust_remote_code": "set `base.trust_remote_code`",
    "chat_template_path": "set `base.chat_template`",
    "disable_tqdm": "the runner draws the progress bar",
    "use_cache": "decoding has a KV cache and training has none",
    "remove_unused_columns": "each trainer takes the columns that it needs",
    "label_names": "each trainer takes the columns that it needs",
    "eos_token": "rows end with the EOS token of the base's tokenizer",
    "pad_token": "the padding token is one that never ends a response",
    "eval_packing": "held-out rows are never packed, so that packing leaves heldout_loss comparable",
}

WHOLE_MODEL = "each process has the whole model, and what they find is added up here; see --processes"
UPLOAD = "nothing is uploaded during a run; upload a finished stage's folder with `hf upload`"
TOKENIZED = "rows are tokenized before TRL sees them; map columns with {stage}.columns"
NO_LOGITS = "evaluations here keep no logits"

REFUSED = {  # in every stage that has it
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "local_rank"), WHOLE_MODEL),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), WHOLE_MODEL),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout"), WHOLE_MODEL),
    **dict.fromkeys(("average_tokens_across_devices", "eval_use_gather_object"), WHOLE_MODEL),
    **dict.fromkeys(("log_level_replica", "log_on_each_node", "save_on_each_node"), WHOLE_MODEL),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), UPLOAD),
    **dict.fromkeys(("hub_always_push", "hub_revision"), UPLOAD),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), "no trainer reads it; --stages chooses what runs"),
    **dict.fromkeys(("prediction_loss_only", "include_for_metrics", "batch_eval_metrics"), NO_LOGITS),
    **dict.fromkeys(("eval_accumulation_steps", "eval_do_concat_batches"), NO_LOGITS),
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs", "dataset_num_proc"), TOKENIZED),
    "enable_jit_checkpoint": "it ends training early, as if the stage were done; a run that is killed resumes anyway",
    "length_column_name": "lengths are counted from the tokens",
    "optim_target_modules": "GaLore and APOLLO, which it is for, train whole weights, and here only adapters train",
}

REFERENCE = "the reference is the SFT adapter and stays as it is"
OWN_SMOOTHING = "set {stage}.label_smoothing"
NOT_WHOLE = "PPO calls the adapters one after another, and not the model as a whole"

REFUSED_IN = {
    "sft": {
        "shuffle_dataset": "each epoch is shuffled; sft.train_sampling_strategy sets its order",
        "padding_free": "set sft.packing, which leaves the padding out",
        "packing_strategy": "packing keeps rows whole and apart (bfd)",
    },
    "reward": {"label_smoothing_factor": OWN_SMOOTHING},
    "dpo": {
        "label_smoothing_factor": OWN_SMOOTHING,
        "neftune_noise_alpha": "the noise would reach the reference too",
        "padding_free": "TRL has switched it off",
        **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), REFERENCE),
    },
    "ppo": {
        "per_device_eval_batch_size": "set ppo.rollout_micro_batch_size, by which all prompts are sampled",
        "dataloader_drop_last": "every update takes a whole rollout's prompts",
        "restore_callback_states_from_checkpoint": "a resumed run always restores them, for early stopping",
        "auto_find_batch_size": "set ppo.per_device_train_batch_size=auto",
        "label_smoothing_factor": "PPO's loss has no labels",
        "logging_nan_inf_filter": "a loss that is not finite stops PPO",
        "neftune_noise_alpha": "the noise would make the probability ratios wrong",
        "include_num_input_tokens_seen": "see the metrics `episode` and `tokens_per_second`",
        "torch_empty_cache_steps": "transformers' own training step reads it, and PPO has another",
        **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), NOT_WHOLE),
        **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), NOT_WHOLE),
    },
}


def objection(stage: str, key: str) -> str | None:
    """Why a recipe may not set an argument of a stage's trainer, naming the key; None where it may."""
    refused = REFUSED | REFUSED_IN.get(stage, {})
    if key in OWNED:
        return f"{stage}.{key} is set by the runner: {OWNED[key]}."
    return f"{stage}.{key} cannot be set: {refused[key].format(stage=stage)}." if key in refused else None
