"""The same computations on torch tensors, on any device."""
