"""Measures what a model makes of text, one decoder layer at a time."""
