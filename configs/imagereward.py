"""ImageReward, trained from BLIP as its authors did (arXiv 2304.05977), on people's rankings in ImageRewardDB.

    python -m imagereward_jax.train --config configs/imagereward.py --config.reward.blip=/models/model_large.pth \\
        --config.data.groups=/data/train.json --config.data.held_out_groups=/data/valid.json \\
        --config.data.test_groups=/data/test.json --config.data.images_folder=/data/images

The files are the original's JSON or the `datasets` form of ImageRewardDB, see data/groups.py; the vocabulary of
bert-base-uncased is looked for beside the BLIP weights, or named by --config.reward.tokenizer.

The original's settings: 64 pairs an update, Adam at 1e-5, cosine to 0 without warm-up, ten epochs, the embeddings, the
first 70 % of both transformers and the projections frozen, BERT's dropout 0.1, drop path 0.1, head dropout 0.2, 0.2,
0.1; four validations an epoch, the best kept by validation loss, then the test set. Here a batch holds groups: the 64
pairs come from four prompts, each image is encoded once, and the loss and gradient are those of the pairs. With
--config.method.mode=pairs --config.batch_size=64 pairs are drawn one by one, as the original does.

--config.dtype=bfloat16 computes in half the memory (weights and moments stay float32), --config.model.remat=blocks
recomputes each layer in the backward pass.

Hardware: one, two or four accelerators, which divide the four groups of a batch (the original took 4 x A100); by
`python -m imagereward_jax.plan` 4.2 GiB a chip on four chips of a TPU v5e, 10.6 on one H200, in float32. It has not
been run at full size here.
Result to expect: the paper reports a test accuracy of 65.14 %.
"""

from imagereward_jax.recipes import default_config


def get_config():
    """The recipe."""
    config = default_config("ranking")
    config.steps = 20_000  # ten epochs of some 8,000 prompts
    config.batch_size = 4
    config.reward.blip = "model_large.pth"
    config.reward.fix_rate = 0.7
    config.data.groups = "ImageRewardDB/train.json"
    config.data.held_out_groups = "ImageRewardDB/valid.json"
    config.data.test_groups = "ImageRewardDB/test.json"
    config.method.dropout = 0.1
    config.method.drop_path = 0.1
    config.method.head_dropout = (0.2, 0.2, 0.1)
    config.optimizer.learning_rate = 1e-5
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0
    config.data.workers = 8
    config.eval.num_groups = 0
    config.eval.per_epoch = 4
    config.eval.best = "-eval/loss"
    config.checkpoint.every = 500
    config.checkpoint.export = "best"
    config.log_every = 50
    return config
