"""docs/migration.md names every flag of the trainers that people come from, and only config fields that exist."""

import re
from pathlib import Path

import pytest

pytest.importorskip("ml_collections")

from imagereward_jax.recipes import default_config

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
IMAGEREWARD = """
adam_beta1 adam_beta2 adam_epsilon adam_weight_decay allow_tf32 apply_pre_loss apply_reward_loss cache_dir
caption_column center_crop checkpointing_steps checkpoints_total_limit dataloader_num_workers dataset_config_name
dataset_name enable_xformers_memory_efficient_attention eval_num_imgs_to_generate grad_scale gradient_accumulation_steps
gradient_checkpointing hub_model_id hub_token id_column image_base_dir image_column image_reward_version
input_pertubation learning_rate local_rank logging_dir lr_scheduler lr_warmup_steps mapping_batch_size max_grad_norm
max_train_samples max_train_steps mixed_precision noise_offset non_ema_revision num_train_epochs output_dir
prediction_type push_to_hub random_flip rank report_to resolution resume_from_checkpoint revision run_name
save_only_one_ckpt scale_lr seed snr_gamma tracker_project_name train_batch_size use_8bit_adam use_ema
validation_epochs validation_prompts
"""
ALIGNPROP = """
accelerator_kwargs allow_tf32 exp_name log_image_freq log_with logdir mixed_precision negative_prompts
num_checkpoint_limit num_epochs project_kwargs push_to_hub resume_from run_name sample_eta sample_guidance_scale
sample_num_steps save_freq seed tracker_kwargs tracker_project_name train_adam_beta1 train_adam_beta2
train_adam_epsilon train_adam_weight_decay train_batch_size train_gradient_accumulation_steps train_learning_rate
train_max_grad_norm train_use_8bit_adam truncated_backprop_rand truncated_backprop_timestep
truncated_rand_backprop_minmax
"""
DDPO = """
accelerator_kwargs allow_tf32 async_reward_computation exp_name log_with logdir max_workers mixed_precision
negative_prompts num_checkpoint_limit num_epochs per_prompt_stat_tracking per_prompt_stat_tracking_buffer_size
per_prompt_stat_tracking_min_count project_kwargs push_to_hub resume_from run_name sample_batch_size sample_eta
sample_guidance_scale sample_num_batches_per_epoch sample_num_steps save_freq seed tracker_kwargs tracker_project_name
train_adam_beta1 train_adam_beta2 train_adam_epsilon train_adam_weight_decay train_adv_clip_max train_batch_size
train_cfg train_clip_range train_gradient_accumulation_steps train_learning_rate train_max_grad_norm
train_num_inner_epochs train_timestep_fraction train_use_8bit_adam
"""
OF_DDPO = "TRL's DDPO and ddpo-pytorch"


def rows_of(heading):
    """The table rows (lists of cells) under a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]


@pytest.mark.parametrize(
    ("heading", "flags"),
    [("ImageReward's trainers", IMAGEREWARD), ("TRL's AlignProp", ALIGNPROP), (OF_DDPO, DDPO)],
    ids=["refl", "alignprop", "ddpo"],
)
def test_every_flag_has_a_line(heading, flags):
    named = {name for row in rows_of(heading) for name in re.findall(r"`(\w+)`", row[0])}
    assert not set(flags.split()) - named


def test_fields_that_are_named_exist():
    before, ddpo = PAGE.split(f"## {OF_DDPO}\n")
    for method, page, least in (("refl", before, 40), ("ddpo", ddpo, 12)):
        config = default_config(method)
        if method == "refl":
            config.method.update(default_config("reward_gradient").method.to_dict())
        sections = "model|data|method|optimizer|eval|checkpoint|mesh|lora|reward"
        named = re.findall(rf"`(?:config\.)?((?:{sections})\.\w+)", page)
        assert len(named) > least
        for name in named:
            section, _, field = name.partition(".")
            assert field in config[section], name
