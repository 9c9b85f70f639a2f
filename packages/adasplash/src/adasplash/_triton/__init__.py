"""The Triton path. Imported on first use of a kernel, never before."""
