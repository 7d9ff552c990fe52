"""What an export holds in memory and on the disk at once."""

import math

from converters.gguf_file import tensor_bytes
from edgeq.calibration.fisher import MOST_ROWS
from edgeq.costing import FISHER_CHUNKS, padded
from edgeq.evaluation.references import REPACKED_BYTES
from edgeq.forecast.amounts import Amounts
from edgeq.forecast.outline import Tensor
from edgeq.forecast.targets import estimator_of
from edgeq.layer_rounding import JUDGED_ROWS
from edgeq.measuring import PATCHABLE
from edgeq.quantizers.gptq import SLICE

_UBATCH = 512
_LOGIT_COPIES = 4  # float32 and float64 of a chunk's logits, theirs and ours
_ROW_BYTES = 40  # a weight: float32 and codes of the nearest, the fed back, the best; errors
_SEARCH_COPIES = 14  # of the rows of one stack of experts that folds are searched on
_HEAD_BYTES = 1 << 27  # of logits that torch computes at once, for each chunk
_HEAD_COPIES = 3  # of these: logits, their probabilities, sums of them to draw from


def peak_bytes(amounts: Amounts) -> dict[str, int]:
    """Return the anonymous memory of each part of the walk; the largest is the peak.

    Files that are mapped (the weights in llama.cpp, the reference, second moments of experts) are
    the page cache's and not counted; weights that llama.cpp rearranges for the CPU are.
    """
    outline, base = amounts.outline, amounts.machine.base_bytes
    vocabulary, n_embd = outline.embedding.shape
    logits = 4 * amounts.n_ctx * vocabulary
    runtime = 4 * min(_UBATCH, amounts.n_ctx) * max(vocabulary, 8 * n_embd) + logits
    found = {"calibrate": base + runtime}
    outside = [one for one in outline.tensors if one.layer is None and one.is_matrix]
    largest = max(outside, key=lambda one: one.n_weights)
    found["write"] = base + 9 * largest.n_weights
    if amounts.recipe.prove or amounts.tuning_chunks:
        rearranged = outline.output_bytes if outline.output_bytes <= REPACKED_BYTES else 0
        found["evaluate"] = base + runtime + rearranged + _LOGIT_COPIES * logits
    if not amounts.uses_moments:
        widest = max((t for t in outline.tensors if t.is_rounded), key=lambda t: t.n_weights)
        found["quantize"] = base + 9 * widest.n_weights
        return found
    model = 4 * sum(one.n_weights for one in outside)  # torch holds what is not a layer
    copies = 2 if amounts.method.asymmetric > 0 else 1
    hidden = copies * 4 * amounts.n_chunks * amounts.n_ctx * n_embd
    layers = list(amounts.layers.values())
    for tensors in layers:
        weights = 4 * amounts.weights(tensors)
        moments = amounts.moments_bytes(tensors) - amounts.filed_bytes(tensors)
        products = 4 * amounts.n_ctx * sum(t.n_in for t in tensors if t.is_matrix and t.n_mat == 1)
        seen = base + model + 2 * hidden + weights + moments + 2 * products
        passed = base + model + 2 * hidden + 2 * weights
        rounding = base + model + hidden + moments + _rounding(amounts, tensors)
        found["moments"] = max(found.get("moments", 0), seen, passed)
        found["rounding"] = max(found.get("rounding", 0), rounding)
    check = base + model + 4 * max(amounts.weights(ts) for ts in layers) + runtime
    found["check"] = check + 2 * logits  # a copy of theirs, and ours
    if amounts.weighs or amounts.feeds_rows:
        found["gradients"] = base + model + _gradients(amounts, amounts.n_chunks)
        most = max(sum(t.n_weights // t.n_in for t in amounts.feeding(ts)) for ts in layers)
        found["gradients"] += amounts.machine.n_cpus * 4 * amounts.n_ctx * most
    if amounts.recipe.target.is_set and estimator_of(amounts) == "fisher":
        found["costs"] = base + model + _gradients(amounts, FISHER_CHUNKS)
    return found


def _gradients(amounts: Amounts, n_chunks: int) -> int:
    """Return the bytes of hidden states, a layer in two types, and squares for every token."""
    outline = amounts.outline
    states = (outline.n_layers + 1) * amounts.n_ctx * outline.embedding.n_in * 4
    largest = max(amounts.weights(ts) for ts in amounts.layers.values())
    n_products = sum(t.is_matrix for ts in amounts.layers.values() for t in ts)
    squares = 4 * n_products * n_chunks * amounts.n_ctx
    logits = min(_HEAD_BYTES, 4 * amounts.n_ctx * outline.embedding.shape[0])
    head = min(amounts.machine.n_cpus, n_chunks) * _HEAD_COPIES * logits  # chunks side by side
    return amounts.chunks_at_once(n_chunks) * states + 6 * largest + squares + head


def _rounding(amounts: Amounts, tensors: list[Tensor]) -> int:
    """Return the bytes that the tensor with most buffers needs while it is rounded."""
    packed = sum(tensor_bytes(t.qtype, t.shape) for t in tensors)
    most = 0
    for one in (each for each in tensors if each.is_matrix):
        matrix = one.n_weights // one.n_mat
        whole = 0 if one.n_mat == 1 else 4 * one.n_weights
        work = 9 * matrix
        if amounts.feeds_back:  # on some rows at a time; second moments in doubles
            work = 4 * matrix + _ROW_BYTES * min(matrix, SLICE) + 8 * one.n_in**2
        if amounts.feeding([one]):  # the folded moments, and errors of a group of rows
            work += amounts.output_bytes([one]) + 4 * min(matrix, MOST_ROWS * one.n_in)
        most = max(most, whole + work)
        if amounts.method.transforms and one.n_mat > 1:  # gate and up are searched together
            rows = min(matrix, JUDGED_ROWS * one.n_in)
            most = max(most, _SEARCH_COPIES * 4 * one.n_mat * rows)
    return packed + most


def disk_bytes(amounts: Amounts) -> int:
    """Return the most that the work directory takes at once."""
    outline, recipe, method = amounts.outline, amounts.recipe, amounts.method
    total = outline.reference_bytes if outline.checkpoint_bytes else 0
    rounded = [one for one in outline.tensors if one.is_rounded]
    layers = sum(tensor_bytes(one.qtype, one.shape) for one in rounded)
    total += layers
    inputs = sum(8 * one.n_mat * one.n_in for one in outline.tensors if one.is_matrix)
    total += inputs if recipe.use_imatrix else 0
    if amounts.weighs or amounts.feeds_rows:
        products = sum(t.is_matrix for ts in amounts.layers.values() for t in ts)
        total += 4 * products * amounts.n_chunks * amounts.n_ctx * method.fisher_groups
    outputs = sum(amounts.output_bytes(tensors) for tensors in amounts.layers.values())
    total += outputs
    most = outputs  # while they are summed up
    logits = amounts.tuning_chunks * (amounts.n_ctx // 2) * 2 * outline.embedding.shape[0]
    if method.is_verified and amounts.tuning_chunks:
        total += layers  # rounded to nearest too
        most = max(most, outline.output_bytes + logits)
    if recipe.target.is_set:
        total += logits
        n_rounded = sum(one.n_weights for one in rounded)
        total += math.ceil(n_rounded * 3.5 / 8) if estimator_of(amounts) == "measured" else 0
        if outline.n_parameters > PATCHABLE:
            most = max(most, padded(outline.reference_bytes))
    if recipe.baseline:
        total += outline.output_bytes
    if amounts.uses_moments:
        shares = amounts.recipe.jobs > 1  # workers read copies
        moments = (
            amounts.filed_bytes(ts) + (amounts.moments_bytes(ts) if shares else 0)
            for ts in amounts.layers.values()
        )
        most = max(most, *moments)
    return total + most
