"""Triton kernels: forward, queries' gradients, keys' gradients. Imported on the first launch."""
