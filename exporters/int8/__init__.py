"""Weights of 8 bits, with inputs of 8 bits or of 16."""
