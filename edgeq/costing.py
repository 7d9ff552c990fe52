"""What every type costs every tensor, by one of several estimators.

Cheap estimators look at a sample of each tensor's rows. The measured one swaps a tensor at a time
in the model that llama.cpp has loaded, for one type, and takes the shape over the types from the
second moments: a tensor's errors grow from type to type as they do, only the scale is its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.gguf_file import layer_of, tensor_bytes
from converters.gguf_header import DEFAULT_ALIGNMENT
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.lattice_formats import LATTICES
from edgeq.allocation.costs import (
    Budget,
    Candidate,
    Costs,
    Problem,
    TensorCosts,
    by_size,
    read_costs,
    write_costs,
)
from edgeq.allocation.knapsack import Knapsack
from edgeq.calibration.fisher import token_weights
from edgeq.calibration.moments import LayerwiseMoments
from edgeq.errors import CalibrationError, RecipeError
from edgeq.layer_rounding import JUDGED_ROWS, thinned
from edgeq.measuring import Measurer, Types
from edgeq.opening import UsedText
from edgeq.quantizers import Quantizer
from edgeq.recipe import DEFAULT_PRESET
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import FloatArray, decode, encodable_types
from edgeq.runtime.presets import requires_importances

_T = GGMLQuantizationType
ESTIMATORS = ("weight", "imatrix", "hessian", "relative", "fisher", "measured")
# fmt: off
TYPES = (
    _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.Q2_K, _T.IQ3_XXS, _T.IQ3_S, _T.Q3_K, _T.MXFP4, _T.IQ4_XS,
    _T.IQ4_NL, _T.Q4_0, _T.Q4_1, _T.Q4_K, _T.Q5_0, _T.Q5_1, _T.Q5_K, _T.Q6_K, _T.Q8_0,
)
# fmt: on
_TINY = 1e-30
HEADER_RESERVE = 1 << 14  # bytes of what edgeq adds to the reference's header, beside the sketches
FISHER_CHUNKS = 8  # squared gradients of so many: more lower the error of a mean by little
MEASURABLE = 1e11  # weights times tensors: SmolLM2-135M has 3e10, Gemma-3-270M 5e10
SWAP_CHUNKS = 1  # of tuning text for one swap: its standard error is some 8 % of the divergence
_JOINT_SIZES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the way from the smallest to the largest, in ratios
_PROBE_BPW = 3.4  # a swap is measured at the type next to it: a divergence well above rounding


def choose_estimator(measurer: Measurer) -> str:
    """Return the best estimator that a model's size and its texts allow.

    Swaps are measured up to about half an hour of two cores. Beyond it squared gradients rank
    tensors best.
    """
    ground = measurer.ground
    if ground.calibration is None or ground.tuning is None:
        return "weight" if ground.importances is None else "imatrix"
    if ground.reference.file.n_parameters * len(measurer.names) <= MEASURABLE:
        return "measured"
    return "fisher"


def make_costs(measurer: Measurer, estimator: str) -> Costs:
    """Return the costs of every tensor and type by one of ``ESTIMATORS``, or from a file.

    Parameters
    ----------
    estimator : a name, ``auto``, or the path of a ``costs-*.json`` that an earlier run left

    Raises
    ------
    RecipeError
        No such estimator or file, it is of another model, or it needs text and there is none.
    CalibrationError
        `fisher` without a torch model of the architecture.
    """
    if estimator == "auto":
        estimator = choose_estimator(measurer)
        if estimator == "fisher":
            try:
                return make_costs(measurer, estimator)
            except CalibrationError as error:  # no torch, or no such model there
                estimator = "relative"
                measurer.notes.append(f"Costs are relative errors, not squared gradients: {error}")
    if estimator.endswith(".json"):
        return _given_costs(Path(estimator), measurer)
    if estimator not in ESTIMATORS:
        known = ["auto", *ESTIMATORS]
        raise RecipeError(f"--costs: {unknown_name('estimator', estimator, known)}")
    ground = measurer.ground
    if estimator == "imatrix" and ground.importances is None:
        raise RecipeError("--costs imatrix: there is no imatrix. Leave --no-imatrix out.")
    if estimator in ("hessian", "relative", "fisher", "measured") and ground.calibration is None:
        raise RecipeError(f"--costs {estimator}: there is no calibration text. Give --text.")
    path = measurer.work.artefact(
        f"costs-{estimator}.json",
        {
            **ground.about,
            "estimator": estimator,
            "types": [qtype.name for qtype in ground.types],
            "seed": ground.seed,
        },
        lambda out: write_costs(_Costing(measurer, estimator).costs(), out),
    )
    return read_costs(path)


def _given_costs(path: Path, measurer: Measurer) -> Costs:
    costs = read_costs(path)
    sha256 = measurer.ground.reference.sha256
    if costs.model_sha256 != sha256 or [t.name for t in costs.tensors] != list(measurer.names):
        raise RecipeError(
            f"--costs {path}: of another model, SHA-256 {costs.model_sha256:.12}..., expected "
            f"{sha256:.12}... Name an estimator to make them for this one."
        )
    types = {*measurer.ground.types, _T.F16}
    tensors = tuple(
        replace(t, candidates=tuple(c for c in t.candidates if c.qtype in types))
        for t in costs.tensors
    )
    bare = next((tensor.name for tensor in tensors if not tensor.candidates), None)
    if bare is not None:
        raise RecipeError(
            f"--costs {path}: holds none of the types that {bare} may get. Name an estimator "
            "to make them for these types."
        )
    return replace(costs, tensors=tensors)


def default_types(quantizer: Quantizer) -> tuple[GGMLQuantizationType, ...]:
    """Return the types that tensors may get: of a quantizer that feeds errors back, its own."""
    return tuple(t for t in TYPES if not quantizer.uses_hessian or t in FORMATS or t in LATTICES)


def parse_types(text: str) -> tuple[GGMLQuantizationType, ...]:
    """Return the types that ``Q4_K,Q6_K`` names.

    Raises
    ------
    RecipeError
    """
    known = {qtype.name: qtype for qtype in encodable_types()}
    names = [name.strip() for name in text.upper().split(",")]
    for name in names:
        if name not in known:
            raise RecipeError(f"--types: {unknown_name('type', name, list(known))}")
    return tuple(known[name] for name in dict.fromkeys(names))


class _Costing:
    """One making of the costs."""

    def __init__(self, measurer: Measurer, estimator: str) -> None:
        self.measurer = measurer
        self.ground = measurer.ground
        self.file = measurer.file
        self.estimator = estimator
        self.cheap = "hessian" if estimator in ("measured", "relative") else estimator
        layers = {name.split(".")[1] for name in self.file.tensors if name.startswith("blk.")}
        self.n_branches = 2 * len(layers)  # that write into the residual stream

    def costs(self) -> Costs:
        """Return the costs."""
        names = self.measurer.names
        found: dict[str, tuple[Candidate, ...]] = {}
        with self.measurer.steps.step("costs") as progress:
            for done, (name, hessian, scale) in enumerate(self._moments(), start=1):
                found[name] = self._estimated(name, hessian, scale)
                progress(done, len(names))
        swapped = names if self.estimator == "measured" else ()
        if self.estimator == "fisher":  # no gradients outside of layers
            swapped = tuple(name for name in names if not name.startswith("blk."))
        found |= self._swapped({name: found[name] for name in swapped})
        others = [info for name, info in self.file.tensors.items() if name not in found]
        texts = [text for text in (self.ground.calibration, self.ground.tuning) if text is not None]
        header = min(info.offset for info in self.file.tensors.values()) + HEADER_RESERVE
        header += 8 * sum(len(text.sketch) for text in texts)
        costs = Costs(
            self.ground.reference.sha256,
            self.estimator,
            self.ground.quantizer,
            header + sum(padded(tensor_bytes(info.qtype, info.shape)) for info in others),
            sum(math.prod(info.shape) for info in others),
            tuple(TensorCosts(name, self.file.tensors[name].shape, found[name]) for name in names),
        )
        return self._joined(costs) if self.estimator == "measured" else costs

    def _moments(self) -> Iterator[tuple[str, FloatArray | None, float]]:
        """Yield every tensor's second moments, (n_mat, n_in, n_in), and the scale of its loss."""
        text = self.ground.calibration
        if self.cheap == "fisher" and text is not None:
            yield from self._guided(text)
            return
        uses_them = self.cheap == "hessian" or self.measurer.quantizer.uses_hessian
        if not uses_them:
            yield from ((name, None, 1.0) for name in self.measurer.names)
            return
        yield from ((name, hessian, 1.0) for name, hessian in self.measurer.moments())

    def _guided(self, text: UsedText) -> Iterator[tuple[str, FloatArray | None, float]]:
        """Yield second moments weighted by squared gradients; a layer's are freed after it."""
        from edgeq.layerwise import LayerwiseModel

        reference, rows = self.ground.reference, text.rows[:FISHER_CHUNKS]
        model = LayerwiseModel.open(
            reference.file, reference.checkpoint, n_threads=self.ground.n_threads
        )
        with self.measurer.steps.step("gradients") as progress:
            weights = token_weights(model, rows, seed=self.ground.seed, progress=progress)
        work = self.measurer.work.path
        source = LayerwiseMoments(model, rows, weights=weights, sequential=False, directory=work)
        layers: dict[int, list[str]] = {}
        for name in self.measurer.names:
            number = layer_of(name)
            layers.setdefault(-1 if number is None else number, []).append(name)
        for number, names in sorted(layers.items()):
            moments = source.of_layer(number) if number >= 0 else {}
            for name in names:
                if name in moments and name in weights:
                    # moments hold twice the mean, their weights have mean 1: 1/2 E[g^2 (e x)^2]
                    squares = float(weights[name][..., 1:].mean())
                    yield name, moments[name].hessian, 0.5 * squares
                else:
                    yield name, None, 1.0

    def _estimated(
        self, name: str, hessian: FloatArray | None, scale: float
    ) -> tuple[Candidate, ...]:
        """Return the candidates of a tensor with losses from a sample of its rows."""
        shape = self.file.tensors[name].shape
        weight = thinned(self.file.read_float(name), JUDGED_ROWS)
        n_rows = math.prod(shape[:-1])
        inputs = self.measurer.inputs(name, hessian)
        if self.estimator == "relative":
            energy = float(_row_losses(weight, self.cheap, inputs.importances, hessian).mean())
            scale = self._share(name) / max(n_rows * energy, _TINY)
        found = []
        for qtype in self._types(name, shape, inputs.importances is not None):
            rounded = self.measurer.quantizer.quantize(
                name, weight, qtype, inputs, n_threads=self.ground.n_threads
            )
            error = decode(rounded.packed, qtype).reshape(weight.shape) - weight
            rows = scale * _row_losses(error, self.cheap, inputs.importances, hessian)
            spread = float(rows.std(ddof=1)) if len(rows) > 1 else 0.0
            unseen = max(0.0, 1 - len(rows) / n_rows)
            loss_error = n_rows * spread * math.sqrt(unseen / len(rows))
            size = padded(tensor_bytes(qtype, shape))
            found.append(Candidate(qtype, size, n_rows * float(rows.mean()), loss_error))
        return by_size(found)

    def _share(self, name: str) -> float:
        """Return how much a relative error of a tensor's outputs counts.

        A branch is one of many in the residual stream; the output matrix is all of the logits.
        """
        output = "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"
        return float(self.n_branches) if name == output else 1.0

    def _types(
        self, name: str, shape: tuple[int, ...], has_importances: bool
    ) -> list[GGMLQuantizationType]:
        """Return the types that a tensor can have."""
        found = [
            qtype
            for qtype in self.ground.types
            if shape[-1] % GGML_QUANT_SIZES[qtype][0] == 0
            and (has_importances or not requires_importances(name, qtype, DEFAULT_PRESET))
        ]
        return found or [_T.F16]

    def _swapped(
        self, tensors: Mapping[str, tuple[Candidate, ...]]
    ) -> dict[str, tuple[Candidate, ...]]:
        """Scale each tensor's losses so that one type's is the measured loss of its swap."""
        probes = {
            name: _probe(candidates, math.prod(self.file.tensors[name].shape))
            for name, candidates in tensors.items()
        }
        swapped: list[Types] = [{name: probe.qtype} for name, probe in probes.items()]
        with self.measurer.steps.step("swaps") as progress:
            swaps = self.measurer.joints(swapped, SWAP_CHUNKS, progress)
        found = {}
        for (name, candidates), swap in zip(tensors.items(), swaps, strict=True):
            probe = probes[name]
            scale = swap.kld / probe.loss if probe.loss > 0 else 0.0
            relative = swap.kld_error / swap.kld if swap.kld > 0 else 0.0
            found[name] = tuple(
                Candidate(c.qtype, c.size_bytes, scale * c.loss, scale * c.loss * relative)
                for c in candidates
            )
        return found

    def _joined(self, costs: Costs) -> Costs:
        """Add what whole choices of some sizes do: swaps do not quite add up."""
        least, most = (costs.size_bytes(choice) for choice in (costs.smallest, costs.largest))
        joint = {}
        with self.measurer.steps.step("swaps"):
            for share in _JOINT_SIZES:
                budget = Budget(size_bytes=int(least * (most / least) ** share))
                choice = Knapsack().allocate(Problem(costs, self.file), budget).choice
                kld = self.measurer.joint(costs.types(choice)).kld
                if costs.loss(choice) > 0 and kld > 0:
                    joint[costs.loss(choice)] = kld
        return replace(costs, joint=tuple(sorted(joint.items())))


def padded(n_bytes: int) -> int:
    """Return the bytes that a tensor takes in a file."""
    return -(-n_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _row_losses(
    error: FloatArray,
    estimator: str,
    importances: FloatArray | None,
    hessian: FloatArray | None,
) -> FloatArray:
    """Return the loss of every row's error e: |e|^2, weighted by importances, or (1/2) e H e.

    Without what the estimator wants, all inputs count alike: the loss is then |e|^2.

    Parameters
    ----------
    error : (n_out, n_in) or (n_mat, n_out, n_in)
    importances : (n_mat, n_in)
    hessian : (n_mat, n_in, n_in)
    """
    matrices = error.reshape(-1, *error.shape[-2:])
    if estimator in ("hessian", "fisher") and hessian is not None:
        squares = 0.5 * (matrices @ hessian) * matrices
    else:
        squares = np.square(matrices)
        if estimator != "weight" and importances is not None:
            squares *= importances[:, None, :]
    losses: FloatArray = squares.sum(axis=2).ravel()
    return losses


def _probe(candidates: Sequence[Candidate], n_weights: int) -> Candidate:
    """Return the candidate at which a swap is measured."""
    return min(candidates, key=lambda one: abs(8 * one.size_bytes / n_weights - _PROBE_BPW))
