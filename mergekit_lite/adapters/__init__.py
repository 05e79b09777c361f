"""Adapters (LoRA and its relatives) on a base, as checkpoints like any other."""
