"""Learning rate as a function of the step."""

import jax.numpy as jnp
import optax


def warmup_cosine(
    *, peak: float, first: float, last: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear from `first` to `peak` over the warm-up, then cosine to `last`.

    The cosine's clock runs from step 0, not from the end of the warm-up, as in the official recipe.
    """

    def schedule(step):
        warmup = first + (peak - first) * step / max(warmup_steps, 1)
        cosine = last + 0.5 * (peak - last) * (1 + jnp.cos(jnp.pi * jnp.minimum(step / total_steps, 1.0)))
        return jnp.where(step < warmup_steps, warmup, cosine)

    return schedule
