"""Fine-tune a torch model for the file that it will become: quantization-aware training.

``simulate`` lets every weight of a model pass through the blocks of its type, bit for bit as
``edgeq export --quantizer rtn`` will write them, with a gradient that ignores the rounding. The
weights themselves stay float; what is trained is written by ``save``, and exported to the very
blocks that were simulated.
"""

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
from edgeq.allocation import Plan, read_plan
from edgeq.errors import CalibrationError, RecipeError
from edgeq.layerwise.origins import Origin, origins_of
from edgeq.layerwise.shell import output_name
from edgeq.pipeline import given_imatrix, importances_of
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import FloatArray, decode, encode

ESTIMATORS = ("straight-through", "trust")
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
        ``trust``: 0 where a weight is further from it than the errors' root mean square

    Returns
    -------
    The plan.

    Raises
    ------
    CalibrationError
        Model and file do not fit each other.
    RecipeError, PlanError, ConversionError
        The plan, the imatrix or the file is bad; no such estimator.

    References
    ----------
    Bengio et al., arXiv:1308.3432, straight-through; Panferov et al., QuEST, arXiv:2502.05003,
    section 3.2, trust: a distance beyond which the rounded value's gradient says too little.
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
            made[id(parameter)] = blocks
        parametrize.register_parametrization(model.get_submodule(path), leaf, blocks, unsafe=True)


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
    keeps_rounded : their values become those of the blocks; False: stay the float ones
    """
    simulated = simulated_modules(model)
    values: dict[int, tuple[Any, Any]] = {}  # tied ones once: rounded values would be rounded again
    for module in simulated:
        for name in list(module.parametrizations):
            original = module.parametrizations[name].original
            if keeps_rounded and id(original) not in values:
                values[id(original)] = original, getattr(module, name).detach()
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    with torch.no_grad():
        for original, rounded in values.values():
            original.copy_(rounded)
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
        self._kept: tuple[Any, Any] = (None, None)

    def forward(self, weight: Any) -> Any:
        """Return the rounded values, of the same shape."""
        masks = self.estimator == "trust"
        return _StraightThrough.apply(weight, self._rounded(weight), masks, self.forget)

    def forget(self) -> None:
        """Round anew at the next use: a fused optimizer changes weights and no version tells."""
        self._kept = (None, None)

    def _rounded(self, weight: Any) -> Any:
        """Return the rounded values; those of before where the weight is still the same."""
        at = (weight.data_ptr(), weight._version)
        if self._kept[0] == at:
            return self._kept[1]
        if weight.dtype != torch.float32:
            raise CalibrationError(
                f"{self.origins[0].name}: its simulated weights are {weight.dtype}, expected "
                "torch.float32. Leave the model's dtype as it is."
            )
        values = weight.detach().cpu().numpy()
        out = np.empty_like(values)
        for origin in self.origins:
            self._fill(origin, values, out)
        rounded = torch.from_numpy(out).to(weight.device)
        self._kept = (at, rounded)
        return rounded

    def _fill(self, origin: Origin, values: FloatArray, out: FloatArray) -> None:
        """Round the rows of one tensor of the file, each in its own order."""
        theirs = values.swapaxes(-1, -2) if origin.is_transposed else values
        target = out.swapaxes(-1, -2) if origin.is_transposed else out
        rows = slice(None) if origin.rows is None else origin.rows
        mine = np.ascontiguousarray(theirs[..., rows, :])
        qtype, importances = self.types[origin.name], self.importances.get(origin.name)
        if importances is not None and origin.matrix is not None:
            importances = importances[origin.matrix : origin.matrix + 1]
        packed = encode(mine, qtype, importances, n_threads=self.n_threads, name=origin.name)
        target[..., rows, :] = decode(packed, qtype).reshape(mine.shape)


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
