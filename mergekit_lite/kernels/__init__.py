"""The hot loops, and nothing else: numba functions that run without the interpreter's lock.

Rules that every kernel keeps, so that its bits never depend on the machine: no ``fastmath`` (no
reassociation, no fused multiply-add), sums in a fixed order that is written in the code, one
rounding at the end. Work goes tile by tile through buffers that stay in the first cache, in plain
loops that the compiler turns into vector instructions.
"""
