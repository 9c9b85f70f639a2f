"""The Triton kernels of diffmax; imported on first use."""
