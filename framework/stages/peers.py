"""The words of other frameworks, and ours for them: whoever comes from LLaMA-Factory, TRL, verl or OpenRLHF types what
the fingers know and is told what it is called here.

Only names, never values: a word is not translated silently, for the same name may count something else there (verl's
`train_batch_size` counts prompts, Hugging Face's counts sequences of one device).
"""

from collections.abc import Collection

# A peer's word (its last part, lower case) -> our keys. The first that a stage has is the answer.
OURS: dict[str, tuple[str, ...]] = {
    # weights, data and places
    "model_name_or_path": ("init_from",),
    "pretrain": ("init_from",),
    "reward_model": ("reward_from",),
    "reward_model_path": ("reward_from",),
    "reward_pretrain": ("reward_from",),
    "dataset": ("data.train",),
    "dataset_name": ("data.train",),
    "train_file": ("data.train",),
    "train_files": ("data.train",),
    "prompt_data": ("data.train",),
    "eval_dataset": ("data.valid",),
    "val_files": ("data.valid",),
    "val_size": ("data.valid",),
    "interleave_probs": ("data.weights",),
    "dataset_dir": ("data.train",),
    "train_file_dir": ("data.train",),
    "validation_file_dir": ("data.valid",),
    "validation_split_percentage": ("data.valid",),
    "output_dir": ("run.dir",),
    "save_path": ("run.dir",),
    "default_local_dir": ("run.dir",),
    "run_name": ("name",),
    "experiment_name": ("name",),
    # lengths
    "cutoff_len": ("data.max_tokens",),
    "max_length": ("data.max_tokens",),
    "max_len": ("data.max_tokens",),
    "max_seq_length": ("data.max_tokens",),
    "max_seq_len": ("data.max_tokens",),
    "block_size": ("data.max_tokens",),
    "max_prompt_length": ("rollout.max_prompt_tokens", "data.max_tokens"),
    "prompt_max_len": ("rollout.max_prompt_tokens", "data.max_tokens"),
    "max_response_length": ("rollout.max_tokens",),
    "max_completion_length": ("rollout.max_tokens",),
    "generate_max_len": ("rollout.max_tokens",),
    "response_length": ("rollout.max_tokens",),
    "max_new_tokens": ("rollout.max_tokens", "sampling.max_tokens"),
    # batches
    "per_device_train_batch_size": ("batch.micro_size",),
    "micro_batch_size": ("batch.micro_size",),
    "micro_batch_size_per_gpu": ("batch.micro_size",),
    "micro_train_batch_size": ("batch.micro_size",),
    "ppo_micro_batch_size": ("batch.micro_size",),
    "ppo_micro_batch_size_per_gpu": ("batch.micro_size",),
    "gradient_accumulation_steps": ("batch.size",),
    "global_batch_size": ("batch.size",),
    "ppo_mini_batch_size": ("batch.size",),
    "num_mini_batches": ("batch.size",),
    "train_batch_size": ("rollout.prompts", "batch.size"),
    "rollout_batch_size": ("rollout.prompts",),
    "n_samples_per_prompt": ("rollout.samples",),
    "num_generations": ("rollout.samples",),
    # the optimizer and its schedule
    "learning_rate": ("optim.lr",),
    "actor_learning_rate": ("optim.lr",),
    "critic_learning_rate": ("critic_optim.lr",),
    "lr_scheduler_type": ("optim.schedule",),
    "lr_scheduler": ("optim.schedule",),
    "warmup_ratio": ("optim.warmup",),
    "lr_warmup_ratio": ("optim.warmup",),
    "lr_warmup_steps": ("optim.warmup",),
    "lr_warmup_steps_ratio": ("optim.warmup",),
    "warmup_steps": ("optim.warmup",),
    "min_lr_ratio": ("optim.final_lr",),
    "weight_decay": ("optim.weight_decay",),
    "l2": ("optim.weight_decay",),
    "max_grad_norm": ("optim.clip",),
    "max_norm": ("optim.clip",),
    "grad_clip": ("optim.clip",),
    "adam_beta1": ("optim.beta1",),
    "adam_beta2": ("optim.beta2",),
    "adam_epsilon": ("optim.eps",),
    # how long, how often
    "num_train_epochs": ("train.epochs",),
    "max_epochs": ("train.epochs", "ppo.epochs"),
    "total_epochs": ("train.epochs",),
    "max_steps": ("train.steps", "ppo.iterations"),
    "total_training_steps": ("train.steps", "ppo.iterations"),
    "save_steps": ("checkpoint.every",),
    "save_freq": ("checkpoint.every",),
    "save_total_limit": ("checkpoint.keep",),
    "max_ckpt_num": ("checkpoint.keep",),
    "eval_steps": ("train.validate_every",),
    "test_freq": ("train.validate_every",),
    "logging_steps": ("tracking.every",),
    "report_to": ("tracking",),
    "use_wandb": ("tracking",),
    "use_swanlab": ("tracking",),
    "project_name": ("tracking.project",),
    "wandb_project": ("tracking.project",),
    # precision, layout and machines
    "bf16": ("engine.precision",),
    "fp16": ("engine.precision",),
    "param_dtype": ("engine.precision",),
    "torch_compile": ("engine.compile",),
    "use_torch_compile": ("engine.compile",),
    "full_determinism": ("deterministic",),
    "packing": ("data.packing",),
    "packing_samples": ("data.packing",),
    "deepspeed": ("parallel",),
    "fsdp": ("parallel",),
    "zero_stage": ("parallel",),
    "num_gpus": ("cluster.workers",),
    "n_gpus_per_node": ("cluster.workers",),
    "colocate_all_models": ("cluster.colocate",),
    # PPO
    "kl_coef": ("ppo.kl_coefficient",),
    "init_kl_coef": ("ppo.kl_coefficient",),
    "kl_target": ("ppo.kl_target",),
    "target_kl": ("ppo.kl_target",),
    "kl_penalty": ("ppo.kl_kind",),
    "kl_estimator": ("ppo.kl_kind",),
    "adap_kl_ctrl": ("ppo.kl_control",),
    "horizon": ("ppo.kl_horizon",),
    "clip_ratio": ("ppo.clip_low",),
    "clip_ratio_low": ("ppo.clip_low",),
    "clip_ratio_high": ("ppo.clip_high",),
    "cliprange": ("ppo.clip_low",),
    "eps_clip": ("ppo.clip_low",),
    "cliprange_value": ("ppo.value_clip",),
    "num_ppo_epochs": ("ppo.epochs",),
    "ppo_epochs": ("ppo.epochs",),
    "adv_estimator": ("ppo.advantage",),
    "advantage_estimator": ("ppo.advantage",),
    "entropy_coeff": ("ppo.entropy_coefficient",),
    "entropy_loss_coef": ("ppo.entropy_coefficient",),
    "lambd": ("ppo.lam",),
    "freezing_actor_steps": ("ppo.critic_warmup",),
    "reward_clip_range": ("ppo.score_clip",),
    "center_rewards_coefficient": ("center_coefficient",),
}


def ours_for(word: str, known: Collection[str]) -> str:
    """What `word` (dotted, with or without dashes) is called in a stage that has the keys and groups `known`; empty
    where we do not know the word or the stage has no such thing.

    >>> ours_for("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu", ["batch.micro_size"])
    'batch.micro_size'
    """
    name = word.rpartition(".")[2].lstrip("-").replace("-", "_").lower()
    return next((key for key in OURS.get(name, ()) if key in known), "")
