"""The rollout that every reward method shares: run a sampler from noise, with gradient where it is asked for."""

import jax
import jax.numpy as jnp


def rollout(denoise, sampler, noise, keys, *, stop=None, grad_steps=0):
    """Runs `sampler` from `noise` up to each sample's own stop index.

    The last `grad_steps` steps before the stop carry gradient and are rematerialised; all earlier ones carry none and
    store nothing. How many steps run is a traced value, the largest stop index: it never recompiles.

    Args:
        denoise: (latents [B, h, w, c], timesteps [B]) -> model output [B, h, w, c].
        sampler: a `diffusion.samplers.Sampler`.
        noise: standard normal, [B, h, w, c].
        keys: for stochastic samplers, [B] keys; the noise of step i comes from `fold_in(keys[b], i)`, so it depends
            neither on the batch nor on where samples stop or the gradient starts. None for deterministic ones.
        stop: [B] int32 in [0, num_steps]: the steps that each sample takes; None for all of them.
        grad_steps: static; how many steps before the stop carry gradient (DRaFT-K; ReFL takes 0).

    Returns:
        The sampler's state after `stop` steps; its `latents` are the input of step `stop`.
    """
    batch = noise.shape[0]
    stop = jnp.full((batch,), sampler.num_steps, jnp.int32) if stop is None else stop

    def advance(step, state):
        """One step at each sample's own index `step` [B]; a sample at its stop, or before step 0, stays as it is."""
        index = jnp.clip(step, 0, sampler.num_steps - 1)
        timesteps = jnp.broadcast_to(sampler.timestep(index), (batch,))
        output = denoise(sampler.model_input(state, index), timesteps)
        step_noise = _noise(keys, index, noise.shape) if sampler.stochastic else None
        new = sampler.step(state, output, index, step_noise)
        active = (step >= 0) & (step < stop)
        return jax.tree.map(lambda n, o: jnp.where(_per_sample(active, n), n, o), new, state)

    first = stop - grad_steps  # the first step that carries gradient

    def without_gradient(step, state):
        return advance(jnp.where(step < first, step, stop), state)

    state = sampler.init(noise)
    state = jax.lax.stop_gradient(jax.lax.fori_loop(0, first.max(), without_gradient, state))
    if not grad_steps:
        return state

    @jax.checkpoint
    def with_gradient(state, offset):
        return advance(first + offset, state), None

    return jax.lax.scan(with_gradient, state, jnp.arange(grad_steps))[0]


def _per_sample(flags, like):
    """[B] flags shaped to broadcast against `like` [B, ...]."""
    return flags.reshape(flags.shape + (1,) * (like.ndim - flags.ndim))


def _noise(keys, steps, shape):
    """Standard normal noise [B, ...], one stream a sample and step."""
    return jax.vmap(lambda key, step: jax.random.normal(jax.random.fold_in(key, step), shape[1:]))(keys, steps)
