"""ReFL: tunes the UNet of a text-to-image model by a reward's gradient, with the denoising loss beside it."""

import numpy as np

from imagereward_jax.data.prompts import load_prompts
from imagereward_jax.diffusion.samplers import make_sampler
from imagereward_jax.experiments.cached import training_pairs
from imagereward_jax.experiments.parts import SampleEvaluation, cast_frozen, open_pipeline, open_reward, stream
from imagereward_jax.experiments.weights import divide
from imagereward_jax.methods.denoising import make_denoising_loss
from imagereward_jax.methods.refl import make_refl_loss
from imagereward_jax.training.loop import Experiment
from imagereward_jax.training.step import Phase


def build(config, mesh):
    """See `experiments.build`."""
    method = config.method
    prompts = load_prompts(config.data.prompts, column=config.data.prompts_column)
    pipeline, params = open_pipeline(config)
    reward = open_reward(config)
    sampler = make_sampler(method.sampler, pipeline.scheduler_config, method.num_steps)
    weights = divide(config, pipeline, params, ("unet",))
    frozen = cast_frozen(config, pipeline, {**weights.frozen, "reward": reward.params})
    streams = {"prompts": stream(config, prompts, lambda batch: prompt_batch(pipeline, reward, method, batch))}
    if method.pretrain != "off":
        streams["pairs"] = training_pairs(config, pipeline, params)

    return Experiment(
        trainable=weights.trainable,
        frozen=frozen,
        phases=make_phases(pipeline, reward, sampler, method),
        streams=streams,
        evaluate=SampleEvaluation(config, pipeline, reward, (method.height, method.width), mesh),
        export=weights.export,
        export_marker=weights.export_marker,
        images_per_step=config.batch_size,
        reward_metric="refl/reward",
    )


def prompt_batch(pipeline, reward, method, batch):
    """A batch of prompts for `make_refl_loss`."""
    prompts = batch["prompt"]
    negative = pipeline.tokenize([method.negative_prompt])
    return {
        "input_ids": pipeline.tokenize(prompts),
        "negative_ids": np.repeat(negative, len(prompts), axis=0),
        "reward": reward.tokenize(prompts),
    }


def make_phases(pipeline, reward, sampler, method):
    """The losses of a step, as `method.pretrain` says: ReFL's alone, the two in turn, or their sum."""
    refl = make_refl_loss(pipeline, reward, sampler, method)
    denoising = make_denoising_loss(pipeline, method.pretrain_weight, snr_gamma=method.snr_gamma)

    def refl_on_prompts(trainable, frozen, batches, key):
        return refl(trainable, frozen, batches["prompts"], key)

    def denoising_on_pairs(trainable, frozen, batches, key):
        return denoising(trainable, frozen, batches["pairs"], key)

    def both(trainable, frozen, batches, key):
        value, metrics = refl_on_prompts(trainable, frozen, batches, key)
        pretrain, pretrain_metrics = denoising_on_pairs(trainable, frozen, batches, key)
        return value + pretrain, {**metrics, **pretrain_metrics}

    if method.pretrain == "off":
        return (Phase("refl", refl_on_prompts),)
    if method.pretrain == "add":
        return (Phase("refl", both),)
    return (Phase("refl", refl_on_prompts), Phase("denoising", denoising_on_pairs))
