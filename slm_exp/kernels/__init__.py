"""Kernels: the similarity of two token states. They shape the layer similarity matrix (and `similarity=cka`)."""
