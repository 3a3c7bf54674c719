"""The implementation of the layers in `jaxnorm.linen` and `jaxnorm.nnx`."""
