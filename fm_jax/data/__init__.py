"""Data: `toy` distributions in JAX, `digits` and `images` in memory, and the `pipeline` that feeds training."""
