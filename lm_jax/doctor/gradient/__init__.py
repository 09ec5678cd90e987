"""Gradients and kernels."""
