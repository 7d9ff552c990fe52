"""The divergence of a model with some weights replaced in memory: no file per candidate."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from edgeq.errors import EvaluationError
from edgeq.evaluation import chunks as chunking
from edgeq.evaluation.base_logits import is_base_file
from edgeq.evaluation.evaluate import run_chunks
from edgeq.evaluation.references import BaseReference
from edgeq.evaluation.statistics import Estimate, mean
from edgeq.runtime.patching import FloatArray, PatchableModel


class PatchedModel(AbstractContextManager["PatchedModel", None]):
    """A float model in llama.cpp's memory, some of whose weights are another's. A context manager.

    What is measured lacks one thing that a file has: llama.cpp rounds the inputs of quantized
    weights to 8 bits. It is of the size of Q8_0's own error.

    Parameters
    ----------
    path : the float model, its matrices F32
    base : a base file of its logits, see ``store_reference``
    names : of the weights that may be replaced
    """

    def __init__(
        self, path: Path, base: Path, names: tuple[str, ...], *, n_threads: int | None = None
    ) -> None:
        if not is_base_file(base):
            raise EvaluationError(f"{base}: not a base file. Store the reference's logits first.")
        self._reference = BaseReference(base)
        chunks = self._reference.chunks
        if chunks is None:
            raise EvaluationError(f"{base}: holds no chunks. Store the reference's logits again.")
        self._chunks = chunks
        n_ctx = chunks.shape[1]
        n_seq = chunking.sequences_at_once(n_ctx)
        self._model = PatchableModel(path, names, n_ctx=n_ctx, n_seq=n_seq, n_threads=n_threads)
        self._reference.check(self._model)
        self._patched: dict[str, tuple[object, FloatArray]] = {}

    def put(self, weights: Mapping[str, tuple[object, Callable[[], FloatArray]]]) -> None:
        """Let the model have these weights, and its own everywhere else.

        Parameters
        ----------
        weights : name to a label and a function that gives the values, (n_out, n_in) or
            (n_mat, n_out, n_in) float32; what is there under the same label is left as it is
        """
        for name in [name for name in self._patched if name not in weights]:
            self._model.weight(name)[...] = self._patched.pop(name)[1]
        for name, (label, load) in weights.items():
            known = self._patched.get(name)
            if known is not None and known[0] == label:
                continue
            place = self._model.weight(name)
            own = place.copy() if known is None else known[1]
            place[...] = load().reshape(place.shape)
            self._patched[name] = (label, own)

    def judge(self, n_chunks: int | None = None) -> tuple[Estimate, Estimate]:
        """Return the mean KL divergence from the float model, nats, and the mean of ln PPL/PPL'.

        Parameters
        ----------
        n_chunks : of the base's text, the first; None: all
        """
        found = run_chunks(self._model, self._reference, self._chunks[:n_chunks], None)
        return mean(found["kld"]), mean(found["nll"] - found["nll_reference"])

    def close(self) -> None:
        """Free the model and the base."""
        self._model.close()
        self._reference.__exit__()

    def __exit__(self, *_error: object) -> None:
        self.close()
