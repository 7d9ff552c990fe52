"""What each step of an export computes, as amounts of work; and what it holds in memory.

Everything here follows the walk (``edgeq.pipeline``) and knows nothing of any machine but the rates
that it is given.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gguf.constants import GGMLQuantizationType

from converters.gguf_file import tensor_bytes
from edgeq.calibration.fisher import groups_of_rows
from edgeq.forecast.machine import Machine
from edgeq.forecast.outline import Outline, Tensor
from edgeq.layer_rounding import JUDGED_ROWS
from edgeq.opening import AUTO_CHUNKS
from edgeq.quantizers import make_quantizer
from edgeq.quantizers.gptq import Gptq
from edgeq.recipe import Recipe
from edgeq.transforms.search import GRIDS

_DUAL_STEPS = 6
_BATCH = 64  # sequences that a model writes at once
_PASSES = 12  # over a weight-sized array: unpacking, decoding, copies
_SCORE_PASSES = 8  # over the logits of a scored token


@dataclass(frozen=True)
class Share:
    """Seconds of a step, and how far workers take some of them.

    Attributes
    ----------
    alone : seconds that stay with one process
    shared : seconds of tasks that workers share
    n_tasks : that can run at the same time
    """

    alone: float
    shared: float = 0.0
    n_tasks: int = 1

    def seconds(self, speedup: float) -> float:
        """Return the wall time where tasks are done `speedup` times as fast together."""
        return self.alone + self.shared / max(1.0, min(speedup, float(self.n_tasks)))


class Amounts:
    """The work of one export of one model.

    Parameters
    ----------
    outline, recipe, machine : see ``edgeq.forecast.forecast``
    """

    def __init__(self, outline: Outline, recipe: Recipe, machine: Machine) -> None:
        self.outline, self.recipe, self.machine = outline, recipe, machine
        self.method = recipe.method
        quantizer = make_quantizer(self.method.quantizer)
        self.feeds_back = quantizer.uses_hessian
        self.sweeps = quantizer.sweeps if isinstance(quantizer, Gptq) else 2
        self.layers: dict[int, list[Tensor]] = {}
        for one in outline.tensors:
            if one.layer is not None:
                self.layers.setdefault(one.layer, []).append(one)
        texts = recipe.texts
        calibrates = recipe.use_imatrix
        self.uses_moments = calibrates and (self.feeds_back or bool(self.method.transforms))
        n_chunks = texts.chunks
        if n_chunks is None:
            n_chunks = recipe.budget.chunks if self.uses_moments or recipe.target.is_set else 0
            if texts.is_auto:
                n_chunks = min(n_chunks or AUTO_CHUNKS, AUTO_CHUNKS)
        self.n_chunks = (n_chunks or AUTO_CHUNKS) if calibrates else 0
        judges = self.method.is_verified or self.method.tune_steps > 0 or recipe.target.is_set
        self.tuning_chunks = recipe.budget.tuning_chunks if judges and calibrates else 0
        self.n_ctx = texts.n_ctx
        self.weighs = self.uses_moments and self.method.fisher > 0
        self.feeds_rows = self.uses_moments and self.method.output_feedback

    # --- pieces ----------------------------------------------------------------------------------

    def active(self, one: Tensor) -> float:
        """Return how many of a tensor's weights a token goes through."""
        share = self.outline.n_used / one.n_mat if one.n_mat > 1 else 1.0
        return one.n_weights * share

    def flops(self, tokens: float, *, head: bool) -> float:
        """Return the operations of a forward pass, attention included."""
        blocks = sum(self.active(t) for ts in self.layers.values() for t in ts if t.is_matrix)
        attention = 2 * self.n_ctx * self.outline.embedding.n_in * self.outline.n_layers
        return 2 * tokens * (blocks + attention + (self.outline.embedding.n_weights if head else 0))

    def layer_flops(self, tensors: Iterable[Tensor], tokens: float) -> float:
        """Return the operations of a forward pass through one layer."""
        attention = 2 * self.n_ctx * self.outline.embedding.n_in
        return 2 * tokens * (attention + sum(self.active(t) for t in tensors if t.is_matrix))

    def weights(self, tensors: Iterable[Tensor]) -> int:
        """Return the weights of some tensors together."""
        return sum(one.n_weights for one in tensors)

    def loading(self, tensors: Iterable[Tensor]) -> float:
        """Return seconds to read and decode tensors and to put them in their places."""
        return sum(
            tensor_bytes(t.source, t.shape) / self.machine.read_rate
            + 3 * t.n_weights * self.machine.element
            for t in tensors
        )

    def distinct(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors that have second moments of their own; others share them."""
        matrices = [one for one in tensors if one.is_matrix]
        if self.weighs:
            return matrices
        found: dict[tuple[str, int, int], Tensor] = {}
        for one in matrices:
            part = one.name.split(".")[2]
            sees = "attention" if part in ("attn_q", "attn_k", "attn_v") else part
            if part.startswith(("ffn_gate", "ffn_up")):
                sees = "ffn"
            found.setdefault((sees, one.n_mat, one.n_in), one)
        return list(found.values())

    def moments_bytes(self, tensors: Sequence[Tensor]) -> int:
        """Return the bytes of a layer's second moments; experts have one matrix each."""
        groups = self.method.fisher_groups if self.weighs else 1
        once = sum(
            4 * (one.n_mat if one.n_mat > 1 else groups) * one.n_in**2
            for one in self.distinct(tensors)
        )
        return once * (2 if self.method.asymmetric > 0 else 1)

    def output_bytes(self, tensors: Iterable[Tensor]) -> int:
        """Return the bytes of second moments of gradients at outputs."""
        return sum(4 * n * size**2 for n, size in map(_groups, self.feeding(tensors)))

    def feeding(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """Return the tensors whose errors are fed back from row to row."""
        return [t for t in tensors if self.feeds_rows and t.is_matrix and t.n_mat == 1]

    def filed_bytes(self, tensors: Sequence[Tensor]) -> int:
        """Return how many of these lie in files of the work directory: those of experts."""
        return self.moments_bytes([one for one in tensors if one.n_mat > 1])

    # --- steps -----------------------------------------------------------------------------------

    def opened(self) -> Share:
        """Convert, or read the whole file once: its hash, and whether all is finite."""
        m, outline = self.machine, self.outline
        n_bytes = outline.reference_bytes
        seconds = n_bytes / m.hash_rate + 2 * outline.n_parameters * m.element
        if outline.checkpoint_bytes:
            seconds += outline.checkpoint_bytes / m.read_rate + 2 * n_bytes / m.hash_rate
            seconds += n_bytes / m.write_rate + 2 * outline.n_parameters * m.element
        else:
            seconds += n_bytes / m.read_rate
        return Share(seconds)

    def text(self) -> Share:
        """Sample the model's own text; files are read in next to no time."""
        texts = self.recipe.texts
        if not texts.is_auto:
            return Share(0.0)
        n_own = self.n_chunks + self.tuning_chunks
        n_own += texts.evaluation_chunks if self.recipe.prove and not texts.evaluation else 0
        batches = math.ceil(n_own / _BATCH)
        sequences = min(n_own, _BATCH)
        reading = self.outline.reference_bytes / self.machine.read_rate
        step = max(self.flops(sequences, head=True) / self.reference_rate, 0.0)
        step += _SCORE_PASSES * sequences * self.outline.embedding.shape[0] * self.machine.element
        return Share(reading + batches * self.n_ctx * step)

    @property
    def reference_rate(self) -> float:
        """Operations a second of llama.cpp's products with the float model."""
        return self.machine.ggml_flops[self.outline.embedding.source]

    @property
    def output_rate(self) -> float:
        """The same with the file to be written."""
        largest: dict[GGMLQuantizationType, int] = {}
        for one in self.outline.tensors:
            if one.is_matrix:
                largest[one.qtype] = largest.get(one.qtype, 0) + one.n_weights
        seconds = sum(n / self.machine.ggml_flops[kind] for kind, n in largest.items())
        return sum(largest.values()) / seconds

    def calibrated(self) -> Share:
        """Make the importance matrix: llama.cpp's pass, sums over every product's inputs."""
        if not self.recipe.use_imatrix or self.recipe.imatrix is not None:
            return Share(0.0)
        tokens = self.n_chunks * self.n_ctx
        inputs = sum(
            t.n_in * (self.outline.n_used if t.n_mat > 1 else 1)
            for ts in self.layers.values()
            for t in self.distinct(ts)
        )
        seconds = self.flops(tokens, head=False) / self.reference_rate
        seconds += self.flops(self.n_ctx, head=True) / self.reference_rate
        seconds += 6 * tokens * inputs * self.machine.element
        return Share(seconds + self.outline.reference_bytes / self.machine.read_rate)

    def agreed(self) -> Share:
        """Open the torch model; let one chunk through it and through llama.cpp."""
        if not self.uses_moments:
            return Share(0.0)
        m, n_vocab = self.machine, self.outline.embedding.shape[0]
        seconds = m.import_seconds + self.loading(self.outline.tensors)
        seconds += self.flops(self.n_ctx, head=True) * (1 / m.torch_flops + 1 / self.reference_rate)
        logits = self.n_ctx * n_vocab
        return Share(seconds + logits * (3 * m.exponential + 40 * m.element))

    def gradients(self, n_chunks: int | None = None) -> Share:
        """Square the gradients of every product: forward, then both ways in a fast type."""
        if n_chunks is None and not (self.weighs or self.feeds_rows):
            return Share(0.0)
        m, chunks = self.machine, n_chunks or self.n_chunks
        tokens, vocabulary = chunks * self.n_ctx, self.outline.embedding.shape[0]
        batches = math.ceil(chunks / self.chunks_at_once(chunks))
        loads = 2 * batches * sum(self.loading(ts) for ts in self.layers.values())
        blocks = self.flops(tokens, head=False)
        head = 2 * 2 * tokens * self.outline.embedding.n_weights / m.torch_flops
        outputs = sum(self.active(t) / t.n_in for ts in self.layers.values() for t in ts)
        elements = tokens * (8 * vocabulary + 4 * outputs) * m.element
        products = blocks / m.torch_flops + 2 * blocks / m.torch_fast_flops
        if n_chunks is None:
            summed = sum(self.output_bytes(ts) for ts in self.layers.values())
            products += tokens * summed / 2 / m.torch_flops
            loads += summed * (1 / m.write_rate + 1 / m.read_rate + 3 / m.hash_rate)
        return Share(loads + head + elements + products)

    def chunks_at_once(self, n_chunks: int) -> int:
        """Return how many chunks' hidden states gradients keep: a quarter of what is free."""
        states = (self.outline.n_layers + 1) * self.n_ctx * self.outline.embedding.n_in * 4
        return max(1, min(n_chunks, self.machine.free_bytes // 4 // states))

    def layer_moments(self) -> Share:
        """Sum up second moments: each layer runs to see inputs, and again to pass them on."""
        if not self.uses_moments:
            return Share(0.0)
        m, tokens = self.machine, self.n_chunks * self.n_ctx
        runs = (2 if self.method.sequential else 1) + (2 if self.method.asymmetric > 0 else 0)
        seconds = 0.0
        for tensors in self.layers.values():
            seconds += runs * self.loading(tensors)
            seconds += runs * self.layer_flops(tensors, tokens) / m.torch_flops
            for one in self.distinct(tensors):
                rows = tokens * (self.outline.n_used if one.n_mat > 1 else 1)
                seconds += 2 * rows * one.n_in**2 / m.torch_flops
                seconds += 3 * one.n_mat * one.n_in**2 * m.element
                seconds += 4 * rows * one.n_in * m.element
        return Share(seconds)

    def folds(self) -> Share:
        """Search for folds: every candidate is rounded and judged on some rows."""
        if not self.method.transforms or not self.uses_moments:
            return Share(0.0)
        tried = 1 + sum(len(GRIDS[one]) for one in self.method.transforms if one in GRIDS)
        tried += _DUAL_STEPS if "dual" in self.method.transforms else 0
        seconds = 0.0
        for one in self.folded():
            seconds += tried * self.thinned(one, one.qtype)
            seconds += 3 * one.n_mat * one.n_in**2 * self.machine.element
        return Share(0.0, seconds, 4)

    def folded(self) -> list[Tensor]:
        """Return the tensors that scales fold into: those of layers, but for routers."""
        return [t for ts in self.layers.values() for t in ts if t.is_matrix and t.is_rounded]

    def thinned(self, one: Tensor, qtype: GGMLQuantizationType) -> float:
        """Return seconds to round some rows of every matrix and to weigh their errors."""
        m = self.machine
        rows = min(JUDGED_ROWS, one.n_weights // one.n_mat // one.n_in)
        per_weight = m.encode[qtype] + 2 * one.n_in / m.numpy_flops + _PASSES * m.element
        return one.n_mat * rows * one.n_in * per_weight

    def rounded(self) -> Share:
        """Round all tensors, and store them."""
        if not self.feeds_back or not self.uses_moments:
            return self.nearest()
        m = self.machine
        shared = 0.0
        for one in self.outline.tensors:
            if not (one.is_rounded and one.is_matrix):
                continue
            per_weight = m.encode[one.qtype] + _PASSES * m.element
            if one.layer is not None and one.qtype in m.rounding:
                products = one.n_in * (1 + 4 + 2 * self.sweeps) / m.numpy_flops
                what = m.rounding[one.qtype]
                per_weight += what.feedback + self.sweeps * what.sweep + products
                cubic, quadratic = m.factor
                shared += one.n_mat * (cubic * one.n_in**3 + quadratic * one.n_in**2)
                for n, size in map(_groups, self.feeding([one])):
                    shared += n * (cubic * size**3 + quadratic * size**2)
                    per_weight += m.encode[one.qtype] + _PASSES * m.element / 3
                    per_weight += size / m.numpy_flops
                shared += 2 * one.n_mat * one.n_in**2 * m.element
            shared += per_weight * one.n_weights
        at_once = max((sum(t.is_rounded for t in ts) for ts in self.layers.values()), default=1)
        return Share(self._stored(), shared, max(1, at_once))

    def nearest(self) -> Share:
        """Round to nearest, and store it."""
        m = self.machine
        rounded = [one for one in self.outline.tensors if one.is_rounded and one.is_matrix]
        shared = sum(
            one.n_weights * (m.encode[one.qtype] + _PASSES * m.element / 3) for one in rounded
        )
        return Share(self._stored(), shared, max(1, len(rounded) // self.outline.n_layers))

    def _stored(self) -> float:
        written = self.outline.output_bytes
        return written * (1 / self.machine.write_rate + 2 / self.machine.hash_rate)

    def tuned(self) -> Share:
        """Tune scales and norms: two chunks a step.

        Layers run forward twice and backward for inputs and weights; the head is computed of both
        models and once backward.
        """
        steps = self.method.tune_steps
        if not steps:
            return Share(0.0)
        m = self.machine
        step = 2 * self.n_ctx
        head = 2 * step * self.outline.embedding.n_weights
        of_step = (4 * self.flops(step, head=False) + 3 * head) / m.torch_flops
        of_step += 3 * _PASSES * self.outline.n_parameters * m.element
        judged = self.flops(self.tuning_chunks * self.n_ctx, head=True) * 2 / m.torch_flops
        wanted = self.flops((self.n_chunks + self.tuning_chunks) * self.n_ctx, head=False)
        return Share(steps * of_step + (steps // 8 + 1) * judged + wanted / m.torch_flops)

    def judged(self, n_chunks: int, *, both: bool) -> float:
        """Return seconds to compare a file with the float model on some chunks."""
        tokens, vocabulary = n_chunks * self.n_ctx, self.outline.embedding.shape[0]
        seconds = self.flops(tokens, head=True) / self.output_rate
        if both:
            seconds += self.flops(tokens, head=True) / self.reference_rate
        m, scored = self.machine, tokens / 2 * vocabulary
        return seconds + scored * (3 * m.exponential + _SCORE_PASSES * m.element)

    def verified(self) -> Share:
        """Round to nearest too; write and judge both on tuning text."""
        if not self.method.is_verified or not self.tuning_chunks:
            return Share(0.0)
        nearest = self.nearest()
        n_files = 2 + (1 if self.method.tune_steps else 0)
        seconds = n_files * (self.judged(self.tuning_chunks, both=False) + self.written().alone)
        seconds += self.flops(self.tuning_chunks * self.n_ctx, head=True) / self.reference_rate
        return Share(nearest.alone + seconds, nearest.shared, nearest.n_tasks)

    def written(self) -> Share:
        """Write the file and read it back."""
        n_bytes, m = self.outline.output_bytes, self.machine
        return Share(n_bytes * (1 / m.write_rate + 1 / m.read_rate + 2 / m.hash_rate))

    def evaluated(self) -> Share:
        """Judge the file, and llama.cpp's own beside it, on evaluation text."""
        if not self.recipe.prove:
            return Share(0.0)
        n_chunks = self.recipe.texts.evaluation_chunks
        seconds = self.judged(n_chunks, both=True) * (2 if self.recipe.baseline else 1)
        return Share(2 * self.outline.output_bytes / self.machine.hash_rate, seconds, n_chunks)


def _groups(one: Tensor) -> tuple[int, int]:
    """Return groups of a matrix's rows, and the rows of each."""
    return groups_of_rows(one.n_weights // one.n_in)
