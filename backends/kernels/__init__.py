"""Kernels that backends share: plain torch here, and what replaces it on a GPU beside it. No file here is a backend."""
