"""Numbers on the CPU: numba kernels over arrays, blocks and bytes. Nothing here knows a model.

``block_formats`` takes packed rows of every scalar format apart and puts them together (its
layouts in ``block_formats_bits``, its numbers in ``block_formats_numbers``); ``rounding`` chooses
codes and scales under a Hessian. ``divergence`` compares rows of logits; ``reference_rows`` packs
the rows of a compact reference and ``reference_bounds`` compares with them; ``_numba`` holds the
one decorator, and why its options are what they are.

Products: ``isa`` chooses the CPU's instructions and ``simd`` writes them; ``tiles`` rearranges a
weight, ``inputs`` rounds what it is multiplied by, ``products`` multiplies, ``attention`` attends;
``threads`` runs such operations one after the other on a few threads. ``bandwidth`` reads memory.
``lookup_tiles`` and ``lookup`` are the other family of products, ``choice`` chooses between the two
by timing; ``sherry`` is a format of 1.25 bits for it.
"""
