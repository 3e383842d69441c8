"""Training a text-to-image model on image-text pairs by the denoising loss."""

from imagereward_jax.experiments.cached import training_pairs
from imagereward_jax.experiments.parts import SampleEvaluation, cast_frozen, open_reward
from imagereward_jax.experiments.scratch import load_or_init_pipeline
from imagereward_jax.experiments.weights import divide
from imagereward_jax.methods.denoising import make_denoising_loss
from imagereward_jax.training.loop import Experiment
from imagereward_jax.training.step import Phase


def build(config, mesh):
    """See `experiments.build`."""
    pipeline, params = load_or_init_pipeline(config)
    reward = None
    if config.reward.path or config.reward.terms:
        reward = open_reward(config)
    names = ("unet", *pipeline.text_encoders) if config.method.train_text_encoder else ("unet",)
    weights = divide(config, pipeline, params, names)
    frozen = cast_frozen(config, pipeline, {**weights.frozen, **({"reward": reward.params} if reward else {})})
    loss = make_denoising_loss(pipeline, timestep_power=config.method.timestep_power, snr_gamma=config.method.snr_gamma)

    def loss_on_pairs(trainable, frozen, batches, key):
        return loss(trainable, frozen, batches["pairs"], key)

    size = (config.data.image_size, config.data.image_size)
    return Experiment(
        trainable=weights.trainable,
        frozen=frozen,
        phases=(Phase("denoising", loss_on_pairs),),
        streams={"pairs": training_pairs(config, pipeline, params)},
        evaluate=SampleEvaluation(config, pipeline, reward, size, mesh),
        export=weights.export,
        export_marker=weights.export_marker,
        images_per_step=config.batch_size,
    )
