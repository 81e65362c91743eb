"""3×3 convolutions.

Axes: b batch, h and w height and width of a map, i and o channels before and after.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from fastervit_jax.ops.kernels import chosen

FEW_CHANNELS = 4


def conv3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "_ _ _ _"], *, stride: int = 1, groups: int = 1,
    layout: str = "HWIO", kernels: str = "auto",
) -> Float[Array, "b high wide o"]:
    """3×3 convolution that pads one pixel on every side. `layout`: of the kernel's axes, HWIO or OHWI.

    `kernels`: one of `ops.kernels.KERNELS`. Strided convolutions of a few channels, so of images, have a form of their
    own: see `space_to_depth`. Those without stride have their input's gradient as a convolution like themselves.
    """
    if groups == 1 and chosen(kernels, x.dtype, ""):
        if stride == 2 and x.shape[-1] <= FEW_CHANNELS:
            return space_to_depth(x, kernel if layout == "HWIO" else rearrange(kernel, "o h w i -> h w i o"))
        if stride == 1 and layout == "HWIO":
            return _same(x, kernel)
    return _convolve(x, kernel, stride, groups, layout)


def _convolve(x: Array, kernel: Array, stride: int = 1, groups: int = 1, layout: str = "HWIO") -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", layout, "NHWC"),
        feature_group_count=groups)


@jax.custom_vjp
def _same(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b h w o"]:
    return _convolve(x, kernel)


def _same_backward(residuals: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    d_kernel, = jax.linear_transpose(lambda kernel: _convolve(x, kernel), kernel)(d_out)
    # Behind the barrier XLA does not find that this is a gradient, and so has cuDNN add to it what comes past the
    # residual block, which for gradients is a pass over the map of its own.
    turned = jax.lax.optimization_barrier(kernel[::-1, ::-1].swapaxes(2, 3))
    return _convolve(d_out, turned), d_kernel


_same.defvjp(lambda x, kernel: (_convolve(x, kernel), (x, kernel)), _same_backward)


def space_to_depth(x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]) -> Float[Array, "b high wide o"]:
    """The strided convolution as one of 2×2 pixels without stride, on squares of 2×2 pixels side by side as channels.

    Libraries are slow for 3 channels: they pad them to 8, and then fill a quarter of what the hardware multiplies.
    Channels are padded to a multiple of 8 here.
    """
    high, wide = ((side + 1) // 2 for side in x.shape[1:3])
    more = -4 * x.shape[-1] % 8
    # Two rows and columns of zeros come before the image, of which the kernel sees one, and one after an odd side.
    x = jnp.pad(x, ((0, 0), (2, x.shape[1] % 2), (2, x.shape[2] % 2), (0, 0)))
    x = rearrange(x, "b (h p) (w q) i -> b h w (p q i)", p=2, q=2)
    kernel = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    kernel = rearrange(kernel, "(h p) (w q) i o -> h w (p q i) o", p=2, q=2)
    x, kernel = jnp.pad(x, ((0, 0),) * 3 + ((0, more),)), jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
    out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert out.shape[1:3] == (high, wide)
    return out
