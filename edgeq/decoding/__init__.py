"""A decoder on our kernels: one sequence, one GGUF file, one program a token.

It computes what llama.cpp computes for four families of models, on weights that are rearranged once
at load: the proof that the kernels' speed is that of a whole model. Files, tokens and judgement
stay with llama.cpp.

``shape`` reads a model's sizes, ``weights`` its tensors, ``building`` makes operations of them, and
``decoder`` puts these into the programs of a batch and runs them.
"""

from edgeq.decoding.decoder import BATCH, CACHES, Decoder
from edgeq.decoding.shape import ARCHITECTURES, Shape

__all__ = ["ARCHITECTURES", "BATCH", "CACHES", "Decoder", "Shape"]
