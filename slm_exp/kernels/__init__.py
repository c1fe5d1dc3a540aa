"""Kernels: how alike two token states are. They shape the layer similarity matrix (and `similarity=cka`)."""
