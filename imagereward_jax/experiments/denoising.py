"""Training a text-to-image model on image-text pairs by the denoising loss."""

from imagereward_jax.experiments.parts import SampleEvaluation, cast_frozen, open_pipeline, open_reward, pair_stream
from imagereward_jax.experiments.weights import divide
from imagereward_jax.methods.denoising import make_denoising_loss
from imagereward_jax.training.loop import Experiment
from imagereward_jax.training.step import Phase


def build(config, mesh):
    """See `experiments.build`."""
    pipeline, params = open_pipeline(config)
    reward = None
    if config.reward.path:
        reward = open_reward(config)
    names = ("unet", "text_encoder") if config.method.train_text_encoder else ("unet",)
    weights = divide(config, pipeline, params, names)
    frozen = cast_frozen(config, pipeline, {**weights.frozen, **({"reward": reward.params} if reward else {})})
    loss = make_denoising_loss(pipeline, timestep_power=config.method.timestep_power)

    def loss_on_pairs(trainable, frozen, batches, key):
        return loss(trainable, frozen, batches["pairs"], key)

    size = (config.data.image_size, config.data.image_size)
    return Experiment(
        trainable=weights.trainable,
        frozen=frozen,
        phases=(Phase("denoising", loss_on_pairs),),
        streams={"pairs": pair_stream(config, pipeline)},
        evaluate=SampleEvaluation(config, pipeline, reward, size, mesh),
        export=weights.export,
        export_marker=weights.export_marker,
        images_per_step=config.batch_size,
    )
