"""Multirun: the folder of a sweep, one process per job over GPUs or cores, and what happens when one dies."""
