"""Numbers on the CPU: numba kernels over arrays, blocks and bytes. Nothing here knows a model.

``divergence`` compares rows of logits; ``reference_rows`` packs the rows of a compact reference
and ``reference_bounds`` compares with them; ``_numba`` holds the one decorator, and why its
options are what they are.
"""
