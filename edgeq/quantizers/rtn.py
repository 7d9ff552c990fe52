"""Round to nearest with an imatrix, through ggml's own encoders: the baseline."""

from gguf.constants import GGMLQuantizationType

from edgeq.runtime.encoders import FloatArray, Packed, encode


class RoundToNearest:
    """Every weight to the code that ggml's encoder gives it, byte for byte."""

    def quantize(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        importances: FloatArray | None,
        *,
        n_threads: int | None = None,
    ) -> Packed:
        """Return the packed rows of a weight, see ``edgeq.quantizers.Quantizer``."""
        return encode(weight, qtype, importances, n_threads=n_threads, name=name)
