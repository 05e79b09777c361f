"""Blocks: how rows of floats become the bytes of each type of GGUF, and come back."""
