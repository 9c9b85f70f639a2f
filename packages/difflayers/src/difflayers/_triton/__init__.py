"""The Triton kernels of difflayers; imported on first use."""
