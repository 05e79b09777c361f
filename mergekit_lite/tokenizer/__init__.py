"""Tokenizer and chat template of a merge's result."""
