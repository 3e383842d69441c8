"""`jax.jit` for tests in which compiling takes most of the time, and what is compiled runs once or twice."""

import functools

import jax

# jax 0.12 has no fusion emitters to switch off
_EMITTERS = {} if jax.__version_info__ >= (0, 11) else {"xla_cpu_use_fusion_emitters": False}
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, **_EMITTERS})
