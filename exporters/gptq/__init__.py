"""GPTQ: rounding that makes up for the errors it has made, and the format of the same name."""
