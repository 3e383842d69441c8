"""Training the autoencoder of a text-to-image model; the other networks are exported as they were."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagereward_jax.data.batches import make_iterator
from imagereward_jax.experiments.parts import load_pairs_of, stream
from imagereward_jax.experiments.scratch import load_or_init_pipeline
from imagereward_jax.methods.autoencoder import make_autoencoder_loss
from imagereward_jax.storage.contact_sheet import contact_sheet
from imagereward_jax.storage.files import write_text
from imagereward_jax.training.loop import Evaluation, Experiment
from imagereward_jax.training.mesh import put_whole, replicated
from imagereward_jax.training.step import Phase


def build(config, mesh):
    """See `experiments.build`."""
    pipeline, params = load_or_init_pipeline(config)
    original = {name: value for name, value in params.items() if name != "vae"}
    graphdef = nnx.graphdef(pipeline.networks["vae"])

    def autoencode(params, images, key):
        """Images [B, H, W, 3] in [0, 1] -> (reconstruction, mean, logvar); key None takes the mean."""
        vae = nnx.merge(graphdef, params["vae"])
        mean, logvar = vae.encode(images * 2 - 1)
        noise = 0.0 if key is None else jax.random.normal(key, mean.shape)
        return vae.decode(mean + jnp.exp(0.5 * logvar) * noise) * 0.5 + 0.5, mean, logvar

    loss = make_autoencoder_loss(autoencode, config.method.kl_weight)

    def loss_on_pairs(trainable, frozen, batches, key):
        return loss(trainable, frozen, batches["pairs"], key)

    held_out = make_iterator(load_pairs_of(config), batch_size=config.eval.num_images, seed=config.seed + 1)
    evaluate = Reconstruction(autoencode, next(held_out)["image"], mesh)

    def export(trainable, folder):
        """Latents are scaled to unit variance, as the diffusion model wants them."""
        _, mean, logvar = jax.jit(lambda params: autoencode(params, evaluate.images, None))(trainable)
        scale = float(1 / np.sqrt(np.mean(np.square(mean - mean.mean())) + np.mean(np.exp(logvar))))
        pipeline.save(folder, {**original, **trainable})
        path = folder / "vae" / "config.json"
        write_text(path, json.dumps({**json.loads(path.read_text()), "scaling_factor": round(scale, 5)}, indent=2))

    return Experiment(
        trainable={"vae": params["vae"]},
        frozen={},
        phases=(Phase("autoencoder", loss_on_pairs),),
        streams={"pairs": stream(config, load_pairs_of(config), lambda batch: {"image": batch["image"]})},
        evaluate=evaluate,
        export=export,
        images_per_step=config.batch_size,
    )


class Reconstruction:
    """Peak signal-to-noise ratio in dB of reconstructed pictures, `eval/psnr`; the sheet shows each beside its
    original."""

    def __init__(self, autoencode, images, mesh):
        self.images = images[: len(images) // mesh.size * mesh.size]
        self.mesh = mesh
        self._run = jax.jit(
            lambda params, images: jnp.clip(autoencode(params, images, None)[0], 0, 1), out_shardings=replicated(mesh)
        )

    def __call__(self, trainable, frozen):
        outputs = np.asarray(self._run(trainable, put_whole(self.mesh, self.images)))
        psnr = -10 * np.log10(np.mean(np.square(outputs - self.images)))
        pairs = np.stack([self.images, outputs], axis=1).reshape(-1, *outputs.shape[1:])[:32]
        return Evaluation({"eval/psnr": float(psnr)}, contact_sheet(pairs, [""] * len(pairs), columns=8))
