"""Linear layers on grids of whole numbers: what GPTQ, AWQ and plain rounding have in common."""
