"""The projector of an image embedding into a generator's condition."""

import jax
from flax import nnx

from diva_jax.models.layers import ACTIVATIONS, Array, Layers


class Projector(nnx.Module):
    """LayerNorm, linear, GELU, linear: an embedding [B, d] -> the condition's width [B, C]."""

    def __init__(self, n_in: int, n_out: int, layers: Layers):
        self.norm = layers.layer_norm(n_in, 1e-5)
        self.fc1 = layers.linear(n_in, n_out)
        self.fc2 = layers.linear(n_out, n_out)

        # As PyTorch's nn.Linear, which the authors use: uniform in +-1/sqrt(fan in), the bias too.
        for layer in (self.fc1, self.fc2):
            bound = layer.in_features**-0.5
            for var in (layer.kernel, layer.bias):
                var[...] = jax.random.uniform(layers.rngs.params(), var.shape, var.dtype, -bound, bound)

    def __call__(self, x: Array) -> Array:
        return self.fc2(ACTIVATIONS["gelu"](self.fc1(self.norm(x))))
