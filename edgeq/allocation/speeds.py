"""Seconds of a token by type: what ``edgeq bench --types`` measured, laid over the costs."""

import json
import math
from dataclasses import replace
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from edgeq.allocation.costs import Costs
from edgeq.errors import RecipeError

NsPerWeight = dict[GGMLQuantizationType, float]


def read_speeds(path: Path) -> NsPerWeight:
    """Read how long llama.cpp takes for a weight of every type with one token.

    Of several numbers of threads the largest counts: that is how the file will run.

    Parameters
    ----------
    path : ``speeds.json`` of ``edgeq bench --types -o``

    Raises
    ------
    RecipeError
        The file is none.
    """
    known = {qtype.name: qtype for qtype in GGMLQuantizationType}
    found: dict[GGMLQuantizationType, tuple[int, float]] = {}
    try:
        for row in json.loads(path.read_text("utf-8"))["types"]:
            qtype, threads = known[row["type"]], int(row["threads"])
            spent = float(row["ggml_ns_per_weight"])
            if not (math.isfinite(spent) and spent > 0):
                raise ValueError(f"{row['type']} takes {spent} ns")
            if int(row["n"]) == 1 and threads >= found.get(qtype, (0, 0.0))[0]:
                found[qtype] = (threads, spent)
    except OSError as error:
        raise RecipeError(f"--speeds: {path}: {error.strerror}. Give a readable file.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"--speeds: {path}: no table of speeds ({error}). Make one with: "
            "edgeq bench --types -o speeds.json"
        ) from error
    return {qtype: spent for qtype, (_, spent) in found.items()}


def timed(costs: Costs, speeds: NsPerWeight, *, has_output: bool) -> Costs:
    """Return the costs with the seconds of a token, and without types that were not timed.

    Parameters
    ----------
    costs : of a model
    speeds : nanoseconds of a weight
    has_output : whether the output has a matrix of its own; rows of the embedding are then only
        looked up

    Raises
    ------
    RecipeError
        None of a tensor's types was timed.
    """
    tensors = []
    for tensor in costs.tensors:
        is_product = not (has_output and tensor.name == "token_embd.weight")
        timed_ones = tuple(
            replace(one, seconds=1e-9 * speeds[one.qtype] * tensor.n_weights * is_product)
            for one in tensor.candidates
            if one.qtype in speeds
        )
        if not timed_ones:
            wanted = ", ".join(one.qtype.name for one in tensor.candidates)
            raise RecipeError(
                f"--speeds: none of {tensor.name}'s types was timed: {wanted}. Leave --type out of "
                "edgeq bench --types."
            )
        tensors.append(replace(tensor, candidates=timed_ones))
    return replace(costs, tensors=tuple(tensors))
