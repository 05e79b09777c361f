"""One package per output format; each takes a checkpoint and writes files."""
