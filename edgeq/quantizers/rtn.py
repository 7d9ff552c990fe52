"""Round to nearest with an imatrix, through ggml's own encoders: the baseline."""

from gguf.constants import GGMLQuantizationType

from edgeq.quantizers import Inputs, Rounded
from edgeq.runtime.encoders import FloatArray, encode


class RoundToNearest:
    """Every weight to the code that ggml's encoder gives it, byte for byte."""

    uses_hessian = False

    def quantize(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        inputs: Inputs,
        *,
        n_threads: int | None = None,
    ) -> Rounded:
        """Return the packed rows of a weight, see ``edgeq.quantizers.Quantizer``."""
        return Rounded(encode(weight, qtype, inputs.importances, n_threads=n_threads, name=name))
