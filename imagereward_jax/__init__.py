"""Human-preference rewards and reward-gradient tuning of text-to-image diffusion models, in JAX."""
