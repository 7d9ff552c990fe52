"""Fine-tune a torch model for the file that it will become: quantization-aware training.

``simulate`` lets every weight of a model pass through the blocks of its type, bit for bit as
``edgeq export --quantizer rtn`` will write them, with a gradient that ignores the rounding. The
weights themselves stay float; what is trained is written by ``save``, and exported to the very
blocks that were simulated.

Steps can be learned too (``lsq``), though ggml's encoders choose the scales themselves: a group of
weights is cut off at a limit of its own before it is encoded, and the limit, which is then the
group's largest weight, is what the encoder takes the step from. ``save`` writes the weights as they
were cut off, so an export needs to know of no limit.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from torch.nn.utils import parametrize

from converters.architectures import known_architectures
from converters.architectures.description import Architecture
from converters.architectures.settings import settings
from converters.gguf_file import GgufFile, open_gguf
from converters.gguf_header import FLOATS
from cpu_kernels.block_formats import FORMATS
from cpu_kernels.block_formats_numbers import Half
from edgeq.allocation import Plan, read_plan
from edgeq.errors import CalibrationError, RecipeError
from edgeq.layerwise.origins import Origin, origins_of
from edgeq.layerwise.shell import output_name
from edgeq.pipeline import given_imatrix, importances_of
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import FloatArray, decode, encode

ESTIMATORS = ("straight-through", "trust", "lsq")
_LEAST = 1e-6  # a limit that steps lead below it
_TRUST = 1.0  # root mean squares of the rounding error; beyond it a weight gets no gradient


def simulate(
    model: Any,
    reference: Path | str,
    plan: Path | str,
    *,
    imatrix: Path | str | None = None,
    estimator: str = "straight-through",
    n_threads: int | None = None,
) -> Plan:
    """Let a model's weights pass through the blocks of their types whenever they are used.

    The parameters keep their float values under ``parametrizations.*.original``, where optimizers
    find them; their modules' ``weight`` is what the file will hold. Norms and biases are float in
    the file too.

    Parameters
    ----------
    model : transformers' model with a head, in float32; changed in place
    reference : the GGUF file that ``edgeq convert`` makes of it, for its names
    plan : of ``edgeq plan``
    imatrix : the importances that the export will use; None: it will use none
    estimator : ``straight-through``: the gradient at a weight is that at its rounded value;
        ``trust``: 0 where a weight is further from it than the errors' root mean square;
        ``lsq``: as the first within learned limits, 0 at a weight that is cut off. The limits are
        parameters of the model, ``*.limits``: give them no weight decay

    Returns
    -------
    The plan.

    Raises
    ------
    CalibrationError
        Model and file do not fit each other.
    RecipeError, PlanError, ConversionError
        The plan, the imatrix or the file is bad; no such estimator; ``lsq`` with a type that has no
        steps to learn.

    References
    ----------
    Bengio et al., arXiv:1308.3432, straight-through; Panferov et al., QuEST, arXiv:2502.05003,
    section 3.2, trust: a distance beyond which the rounded value's gradient says too little; Esser
    et al., LSQ, arXiv:1902.08153, sections 2.1 and 2.2.
    """
    if estimator not in ESTIMATORS:
        raise RecipeError(f"estimator: {unknown_name('estimator', estimator, list(ESTIMATORS))}")
    file = open_gguf(Path(reference))
    found = read_plan(Path(plan), file)
    given = given_imatrix(None if imatrix is None else Path(imatrix), file)
    importances = importances_of(given, file) or {}
    simulate_plan(model, file, found, importances, estimator=estimator, n_threads=n_threads)
    return found


def simulate_plan(
    model: Any,
    file: GgufFile,
    plan: Plan,
    importances: Mapping[str, FloatArray],
    *,
    estimator: str = "straight-through",
    n_threads: int | None = None,
) -> None:
    """Do what ``simulate`` does, by a plan and importances that have been read and checked.

    Parameters
    ----------
    file : names and shapes of the model's tensors; its weights are not looked at
    importances : tensor name to mean squared inputs, (n_mat, n_in) float32
    """
    if estimator == "lsq":
        _check_steps(plan)
    origins = parameter_origins(model, file)
    made: dict[int, _Blocks] = {}
    for name, parameter in dict(model.named_parameters(remove_duplicate=False)).items():
        types = {origin.name: plan.types[origin.name] for origin in origins[name]}
        if all(qtype == GGMLQuantizationType.F32 for qtype in types.values()):
            continue
        path, _, leaf = name.rpartition(".")
        blocks = made.get(id(parameter))  # a tied output is the embedding
        if blocks is None:
            blocks = _Blocks(origins[name], types, importances, estimator, n_threads)
            if estimator == "lsq":
                blocks.learn_steps(parameter)
            made[id(parameter)] = blocks
        parametrize.register_parametrization(model.get_submodule(path), leaf, blocks, unsafe=True)


def _check_steps(plan: Plan) -> None:
    for name, qtype in plan.types.items():
        if qtype not in FLOATS and not (
            qtype in FORMATS and isinstance(FORMATS[qtype].super_scale, Half)
        ):
            raise RecipeError(
                f"{name}: lsq learns the steps of scales that are half floats, {qtype.name} has "
                "none. Choose another type for it in the plan, or another estimator."
            )


def architecture_of(model: Any) -> Architecture:
    """Return what edgeq knows of a transformers model's family.

    Raises
    ------
    CalibrationError
        Nothing.
    """
    architecture = known_architectures().get(type(model).__name__)
    if architecture is None:
        raise CalibrationError(
            f"{type(model).__name__}: no architecture that edgeq converts; expected a causal LM "
            "with its head, as AutoModelForCausalLM loads it."
        )
    return architecture


def parameter_origins(model: Any, file: GgufFile) -> dict[str, tuple[Origin, ...]]:
    """Return where the parameters of a float32 model lie in its file, tied ones by every name.

    Raises
    ------
    CalibrationError
        Model and file do not fit each other, or a parameter is not float32.
    """
    architecture = architecture_of(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in named.items():
        if parameter.dtype != torch.float32:
            raise CalibrationError(
                f"{name}: {parameter.dtype}, expected torch.float32. Load the model with "
                "dtype=torch.float32: smaller steps are lost."
            )
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    config = settings(model.config.to_dict(), architecture)
    return origins_of(shapes, file, architecture, config, output_name(model))


def save(model: Any, directory: Path | str) -> None:
    """Write the float weights of a simulated model as a checkpoint, and end the simulation.

    With ``lsq`` they are cut off at the limits that were learned.

    ``edgeq export DIRECTORY out.gguf --plan PLAN --quantizer rtn`` with the same ``--imatrix``, or
    with ``--no-imatrix``, then writes the blocks that were simulated.

    Raises
    ------
    CalibrationError
        Nothing is simulated in the model.
    """
    if not end_simulation(model, keeps_rounded=False):
        raise CalibrationError(
            f"{type(model).__name__}: none of its weights is simulated; expected a model that "
            "edgeq.qat.simulate has changed."
        )
    model.save_pretrained(directory)


def simulated_modules(model: Any) -> list[Any]:
    """Return the modules with weights that pass through blocks."""
    return [module for module in model.modules() if parametrize.is_parametrized(module)]


def end_simulation(model: Any, *, keeps_rounded: bool) -> bool:
    """Make the weights plain parameters again; return whether any was simulated.

    Parameters
    ----------
    keeps_rounded : their values become those of the blocks; False: stay the float ones, cut off
        where limits were learned
    """
    simulated = simulated_modules(model)
    values: dict[int, tuple[Any, Any]] = {}  # tied ones once: rounded values would be rounded again
    for module in simulated:
        for name in list(module.parametrizations):
            held = module.parametrizations[name]
            original = held.original
            if id(original) not in values:
                kept = getattr(module, name) if keeps_rounded else held[0].limited(original)
                values[id(original)] = original, kept.detach()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    with torch.no_grad():
        for original, kept in values.values():
            original.copy_(kept)
    model.tie_weights()
    return bool(simulated)


class _Blocks(torch.nn.Module):  # type: ignore[misc]
    """Rounds a parameter as the tensors of the file that it becomes are rounded."""

    def __init__(
        self,
        origins: tuple[Origin, ...],
        types: Mapping[str, GGMLQuantizationType],
        importances: Mapping[str, FloatArray],
        estimator: str,
        n_threads: int | None,
    ) -> None:
        super().__init__()
        self.origins = origins
        self.types = types
        self.importances = importances
        self.estimator = estimator
        self.n_threads = n_threads
        self.steps = torch.nn.ModuleList()
        self._kept: tuple[Any, Any] = (None, None)

    def learn_steps(self, weight: Any) -> None:
        """Make the steps of every quantized tensor parameters, from the weights that it has."""
        for origin in self.origins:
            if self.types[origin.name] not in FLOATS:
                self.steps.append(_Steps(origin, self.types[origin.name], weight.detach()))

    def limited(self, weight: Any) -> Any:
        """Return the weights that are encoded: cut off where steps are learned."""
        if not self.steps:
            return weight
        out = weight.detach().clone()
        for steps in self.steps:
            part = _rows_of(out, steps.origin)
            _set_rows(out, steps.origin, steps.limited(part))
        return out

    def forward(self, weight: Any) -> Any:
        """Return the rounded values, of the same shape."""
        if self.steps:
            limits = [steps.limits for steps in self.steps]
            return _LearnedSteps.apply(weight, self._rounded(weight), self, *limits)
        masks = self.estimator == "trust"
        return _StraightThrough.apply(weight, self._rounded(weight), masks, self.forget)

    def forget(self) -> None:
        """Round anew at the next use: a fused optimizer changes weights and no version tells."""
        self._kept = (None, None)

    def _rounded(self, weight: Any) -> Any:
        """Return the rounded values; those of before where the weight is still the same."""
        parts = (weight, *(steps.limits for steps in self.steps))
        at = tuple((part.data_ptr(), part._version) for part in parts)
        if self._kept[0] == at:
            return self._kept[1]
        if weight.dtype != torch.float32:
            raise CalibrationError(
                f"{self.origins[0].name}: its simulated weights are {weight.dtype}, expected "
                "torch.float32. Leave the model's dtype as it is."
            )
        values = self.limited(weight).detach().cpu().numpy()
        out = np.empty_like(values)
        for origin in self.origins:
            self._fill(origin, values, out)
        rounded = torch.from_numpy(out).to(weight.device)
        self._kept = (at, rounded)
        return rounded

    def _fill(self, origin: Origin, values: FloatArray, out: FloatArray) -> None:
        """Round the rows of one tensor of the file, each in its own order."""
        mine = np.ascontiguousarray(_rows_of(values, origin))
        qtype, importances = self.types[origin.name], self.importances.get(origin.name)
        if importances is not None and origin.matrix is not None:
            importances = importances[origin.matrix : origin.matrix + 1]
        packed = encode(mine, qtype, importances, n_threads=self.n_threads, name=origin.name)
        _set_rows(out, origin, decode(packed, qtype).reshape(mine.shape))


class _StraightThrough(torch.autograd.Function):  # type: ignore[misc]
    """Rounded values forwards; the gradient as it is, or where it can be trusted, backwards."""

    @staticmethod
    def forward(
        ctx: Any, weight: Any, rounded: Any, masks: bool, forget: Callable[[], None]
    ) -> Any:
        error = (rounded - weight).abs()
        within = error <= _TRUST * error.square().mean().sqrt() if masks else None
        ctx.forget = forget
        ctx.save_for_backward(*(() if within is None else (within,)))
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, None, None, None]:
        ctx.forget()
        for within in ctx.saved_tensors:
            gradient = gradient * within
        return gradient, None, None, None


class _Steps(torch.nn.Module):  # type: ignore[misc]
    """The steps of one tensor of the file: for each group of weights the limit it is cut off at.

    Attributes
    ----------
    limits : (..., n_rows, n_groups), in the file's order of rows; 2^(b-1) steps of a type of b bits
    """

    def __init__(self, origin: Origin, qtype: GGMLQuantizationType, weight: Any) -> None:
        super().__init__()
        self.origin = origin
        self.group_size = FORMATS[qtype].group_size
        n_steps = len(FORMATS[qtype].levels) // 2  # of ternary 1
        size = self._groups(_rows_of(weight, origin)).abs()
        start = 2 * math.sqrt(n_steps) * size.mean(dim=-1)  # LSQ's start, n_steps times its step
        self.limits = torch.nn.Parameter(torch.minimum(start, size.amax(dim=-1)))
        # LSQ multiplies a step's gradient by 1/sqrt(N Q). A limit is Q steps: the step's gradient
        # is Q times the limit's, and a descent that moves steps as LSQ does moves limits Q times.
        self.gradient_scale = n_steps**1.5 / math.sqrt(self.group_size)

    def limited(self, part: Any) -> Any:
        """Return weights, (..., n_rows, n_in), cut off at the limits."""
        limit = self._limit(self.limits.detach())
        groups = self._groups(part)
        return torch.minimum(torch.maximum(groups, -limit), limit).reshape(part.shape)

    def gradients(self, limits: Any, part: Any, rounded: Any, at_rounded: Any) -> tuple[Any, Any]:
        """Return the gradients at weights and at limits.

        Encoders are equivariant: weights and limit times a are the rounded weights times a. So for
        each rounded weight r, with Euler, limit * dr/dlimit = r - w * dr/dw, where dr/dw is 1
        within the limit by the straight-through estimate, and 0 beyond. That is LSQ's equation 3.
        A limit that cuts nothing off changes nothing.
        """
        limit = self._limit(limits)
        weights, values, gradient = (self._groups(one) for one in (part, rounded, at_rounded))
        within = weights.abs() < limit
        at_limits = (gradient * (values - weights * within) / limit).sum(dim=-1)
        at_limits = at_limits * (~within).any(dim=-1) * self.gradient_scale
        return (gradient * within).reshape(part.shape), at_limits

    def _groups(self, part: Any) -> Any:
        return part.unflatten(-1, (-1, self.group_size))

    def _limit(self, limits: Any) -> Any:
        return limits.clamp(min=_LEAST).unsqueeze(-1)


class _LearnedSteps(torch.autograd.Function):  # type: ignore[misc]
    """Rounded values forwards; the gradients at weights and limits backwards."""

    @staticmethod
    def forward(ctx: Any, weight: Any, rounded: Any, blocks: _Blocks, *limits: Any) -> Any:
        ctx.blocks = blocks
        ctx.save_for_backward(weight, rounded, *limits)
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> tuple[Any, ...]:
        weight, rounded, *limits = ctx.saved_tensors
        ctx.blocks.forget()
        at_weight, at_limits = gradient.clone(), []
        for steps, limit in zip(ctx.blocks.steps, limits, strict=True):
            parts = (_rows_of(one, steps.origin) for one in (weight, rounded, gradient))
            at_part, at_limit = steps.gradients(limit, *parts)
            _set_rows(at_weight, steps.origin, at_part)
            at_limits.append(at_limit)
        return at_weight, None, None, *at_limits


def _rows_of(parameter: Any, origin: Origin) -> Any:
    """Return a tensor of the file, in its own order, from the parameter that holds it."""
    theirs = parameter.swapaxes(-1, -2) if origin.is_transposed else parameter
    return theirs[..., slice(None) if origin.rows is None else origin.rows, :]


def _set_rows(parameter: Any, origin: Origin, part: Any) -> None:
    """Write a tensor of the file into the parameter that holds it, *written*."""
    theirs = parameter.swapaxes(-1, -2) if origin.is_transposed else parameter
    theirs[..., slice(None) if origin.rows is None else origin.rows, :] = part
