"""Flow matching of Stable Diffusion 3 in PyTorch, as diffusers' training scripts compute it."""

import diffusers
import numpy as np
import torch


def clean_predictions(pipe, latents, noise, share, embeds):
    """The preconditioned prediction of train_dreambooth_sd3.py, the latents that it is compared with, and the sigmas.

    Args:
        pipe: diffusers' pipeline. latents, noise: [B, h, w, c]. share: of the training schedule, [B].
        embeds: of the prompts, and pooled.
    """
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    indices = np.floor(1000 * np.array(share)).astype(int)
    sigmas, timesteps = scheduler.sigmas[indices].reshape(-1, 1, 1, 1), scheduler.timesteps[indices]
    latents, noise = (torch.tensor(np.moveaxis(np.array(array), -1, 1)) for array in (latents, noise))
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    velocity = pipe.transformer(
        noisy,
        encoder_hidden_states=torch.tensor(np.array(embeds[0])),
        pooled_projections=torch.tensor(np.array(embeds[1])),
        timestep=timesteps,
    ).sample
    return velocity * (-sigmas) + noisy, latents, sigmas
