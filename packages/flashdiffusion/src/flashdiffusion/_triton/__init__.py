"""Kernels: the product of the kernel matrix with a block of vectors."""
