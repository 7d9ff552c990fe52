"""What finding the types for a target adds to an export: losses, swaps, whole files."""

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from edgeq.costing import FISHER_CHUNKS, MEASURABLE, default_types, parse_types
from edgeq.forecast.amounts import Amounts, Share
from edgeq.measuring import LOSS_CHUNKS, PATCHABLE
from edgeq.quantizers import make_quantizer
from edgeq.recipe import Recipe

_JOINTS = {"measured": 7}  # sizes on the way, the plan and llama.cpp's mix
_JOINTS_OTHERWISE = 2


def costs_types(recipe: Recipe) -> tuple[GGMLQuantizationType, ...]:
    """Return the types whose losses are estimated for every tensor."""
    if recipe.types is not None:
        return parse_types(recipe.types)
    return default_types(make_quantizer(recipe.method.quantizer))


def estimator_of(amounts: Amounts) -> str:
    """Return which costs the recipe leads to."""
    recipe, outline = amounts.recipe, amounts.outline
    if recipe.costs != "auto":
        return recipe.costs
    if not amounts.n_chunks:
        return "weight"
    n_swaps = sum(one.is_matrix for one in outline.tensors)
    return "measured" if outline.n_parameters * n_swaps <= MEASURABLE else "fisher"


def target_steps(amounts: Amounts) -> dict[str, Share]:
    """Return the steps that find the types for a target, by the names of the report."""
    if not amounts.recipe.target.is_set:
        return {}
    m, outline = amounts.machine, amounts.outline
    matrices = [one for one in outline.tensors if one.is_matrix]
    judged = sum(
        amounts.thinned(one, kind)
        for one in matrices
        for kind in costs_types(amounts.recipe)
        if one.n_in % GGML_QUANT_SIZES[kind][0] == 0
    )
    tokens = amounts.tuning_chunks * amounts.n_ctx
    steps = {
        "costs": Share(judged),
        "tuning logits": Share(amounts.flops(tokens, head=True) / amounts.reference_rate),
    }
    estimator, n_swaps = estimator_of(amounts), 0
    if estimator in ("measured", "relative", "hessian"):
        steps["costs: moments"] = Share(_collected(amounts))
        n_swaps = len(matrices) if estimator == "measured" else 0
    if estimator == "fisher":
        steps["costs: gradients"] = amounts.gradients(FISHER_CHUNKS)
        steps["costs: moments"] = Share(_guided(amounts))
        n_swaps = sum(one.layer is None for one in matrices)
    joints = _JOINTS.get(estimator, _JOINTS_OTHERWISE)
    rounded = [one for one in matrices if one.is_rounded]
    encoded = joints * sum(one.n_weights * m.encode[one.qtype] for one in rounded)
    in_memory = outline.n_parameters <= PATCHABLE
    one_file = 0.0 if in_memory else outline.reference_bytes / m.write_rate
    swaps = n_swaps * (amounts.judged(1, both=False) + one_file)
    joint = joints * (amounts.judged(amounts.tuning_chunks, both=False) + one_file)
    steps["swaps"] = Share(joint + encoded, swaps, max(1, n_swaps) if in_memory else 1)
    return steps


def _collected(amounts: Amounts) -> float:
    """Return seconds for llama.cpp's own second moments of the whole model."""
    tokens = LOSS_CHUNKS * amounts.n_ctx
    seconds = amounts.flops(tokens, head=False) / amounts.reference_rate
    for tensors in amounts.layers.values():
        for one in amounts.distinct(tensors):
            rows = tokens * (amounts.outline.n_used if one.n_mat > 1 else 1)
            seconds += rows * one.n_in**2 / amounts.machine.numpy_flops
    return seconds


def _guided(amounts: Amounts) -> float:
    """Return seconds for second moments weighted by squared gradients, in one pass."""
    tokens, m = FISHER_CHUNKS * amounts.n_ctx, amounts.machine
    seconds = 0.0
    for tensors in amounts.layers.values():
        seconds += amounts.loading(tensors) + amounts.layer_flops(tensors, tokens) / m.torch_flops
        for one in (each for each in tensors if each.is_matrix):
            rows = tokens * (amounts.outline.n_used if one.n_mat > 1 else 1)
            seconds += 2 * rows * one.n_in**2 / m.torch_flops
    return seconds
