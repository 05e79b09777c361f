"""pack: merge, quantize and release language models, one tensor at a time."""

__version__ = "0.1.0"
