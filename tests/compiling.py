"""How programs that run for long are compiled: the tests compile quickly, and what is in a loop pays for it."""

import functools

import jax

optimised = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 3})
"""`jax.jit` for trainings and other long loops: longer to compile, and a tenth of the time to run with convolutions."""
