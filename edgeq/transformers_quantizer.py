"""Quantized models in transformers: torch computes with the weights of a GGUF file.

Importing this module makes the method ``edgeq`` known to transformers:

    model = AutoModelForCausalLM.from_pretrained(
        "./model", quantization_config=EdgeqConfig(preset="Q4_K_M")
    )

Its weights are those that llama.cpp's blocks decode to, in float32: the blocks of ``edgeq export
--quantizer rtn`` with a preset or a plan, or those of a file that is there already. Products of
activations and blocks are torch's, in float32; llama.cpp rounds activations too.
"""

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from converters.architectures.description import Shape
from converters.convert import write_outline
from converters.gguf_file import open_gguf
from edgeq.allocation import Plan, read_plan
from edgeq.allocation.preset import allocate
from edgeq.errors import CalibrationError, EdgeqError, RecipeError
from edgeq.runtime.presets import find_preset

try:
    import torch
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ModuleNotFoundError as _error:
    _missing = (_error.name or "").partition(".")[0]
    raise ModuleNotFoundError(
        f"edgeq.transformers_quantizer: {_missing} is not installed. Install it with: "
        "pip install 'edgeq[torch]'",
        name=_missing,
    ) from _error

from edgeq import qat
from edgeq.layerwise.origins import FloatArray, fill
from edgeq.pipeline import given_imatrix, importances_of

METHOD = "edgeq"
_T = GGMLQuantizationType
_logger = logging.getLogger(__name__)


@register_quantization_config(METHOD)
class EdgeqConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What the weights of a model are rounded to; exactly one of the first three is given.

    ``config.json`` of a saved model holds it, a plan with all its types.

    Parameters
    ----------
    preset : llama.cpp file type, such as ``Q4_K_M``; rows that do not fit fall back as there
    plan : a ``plan.json``, its path or its content
    gguf : a quantized file of the same model, by any quantizer, folded or not: its blocks are taken
    imatrix : importances for `preset` and `plan`, as ``--imatrix``
    quant_method : ``edgeq``, as transformers writes it

    Raises
    ------
    RecipeError
        None or several are given, no such preset, or no readable plan.
    """

    def __init__(
        self,
        preset: str | None = None,
        *,
        plan: Path | str | Mapping[str, Any] | None = None,
        gguf: Path | str | None = None,
        imatrix: Path | str | None = None,
        quant_method: str = METHOD,
    ) -> None:
        given = {"preset": preset, "plan": plan, "gguf": gguf}
        names = [name for name, value in given.items() if value is not None]
        if len(names) != 1 or quant_method != METHOD:
            raise RecipeError(
                f"EdgeqConfig: got {' and '.join(names) or 'nothing'}, expected one of preset, "
                'plan and gguf. Give EdgeqConfig(preset="Q4_K_M") or the like.'
            )
        if imatrix is not None and gguf is not None:
            raise RecipeError(
                "EdgeqConfig: got an imatrix beside gguf, expected none: the file is quantized "
                "already. Leave it out."
            )
        self.quant_method = METHOD
        self.preset = None if preset is None else find_preset(preset).name
        self.plan = _plan_content(plan)
        self.gguf = None if gguf is None else str(gguf)
        self.imatrix = None if imatrix is None else str(imatrix)

    def to_dict(self) -> dict[str, Any]:
        """Return what is set, as ``config.json`` holds it."""
        return {name: value for name, value in super().to_dict().items() if value is not None}


@register_quantizer(METHOD)
class EdgeqQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers calls while it loads and saves; models have it as ``hf_quantizer``.

    Attributes
    ----------
    plan : every tensor's type, with the reason; None where the blocks are a file's
    """

    requires_calibration = False
    plan: Plan | None = None

    def validate_environment(
        self, *_: Any, device_map: Any = None, weights_only: bool | None = None
    ) -> None:
        """Refuse weights that would not be in memory."""
        places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
        for place in places:
            if str(place) in ("disk", "meta"):
                raise _offloaded(str(place))

    def update_dtype(self, dtype: Any) -> Any:
        """Return float32, whatever the checkpoint is in: others cannot hold decoded weights."""
        if dtype != torch.float32:
            _logger.info("weights are loaded in float32 instead of %s, to be rounded", dtype)
        return torch.float32

    def is_serializable(self) -> bool:
        """Whether the model can be saved: yes."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether training keeps the weights on blocks: not on those of a file."""
        return self.quantization_config.gguf is None

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the float weights behind the blocks can be trained; see ``edgeq.qat``."""
        return self.is_trainable

    def get_state_dict_and_metadata(self, model: Any) -> tuple[Any, dict[str, str]]:
        """Return what is saved: the float weights behind the blocks, under their plain names."""
        state = {
            re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", name): value
            for name, value in model.state_dict().items()
        }
        return state, {}

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, parameter in model.named_parameters():
            if parameter.is_meta:
                raise _offloaded(f"no memory for {name}")
        config: EdgeqConfig = self.quantization_config
        if config.gguf is None:
            self.plan = _simulate(model, config)
        elif not self.pre_quantized:  # a saved model has the file's weights already
            _take_weights(model, Path(config.gguf))
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        qat.end_simulation(model, keeps_rounded=True)
        return model if dtype is None else model.to(dtype)


def _offloaded(found: str) -> CalibrationError:
    return CalibrationError(
        f"device_map: got {found}, expected every weight in memory to be rounded. Load the model "
        "without device_map, or with one that offloads nothing."
    )


def _plan_content(plan: Path | str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the content of a plan; whether it is one of this model is seen at loading."""
    if plan is None or isinstance(plan, Mapping):
        return None if plan is None else dict(plan)
    try:
        content = json.loads(Path(plan).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{plan}: no readable plan ({error}). Mend it or make it anew."
        ) from error
    if not isinstance(content, dict):
        raise RecipeError(f"{plan}: no plan; got a {type(content).__name__}, expected an object.")
    return content


def _simulate(model: Any, config: EdgeqConfig) -> Plan:
    """Let a model's weights pass through the blocks of their types; return all types."""
    with tempfile.TemporaryDirectory(prefix="edgeq-") as directory:
        path, written = Path(directory) / "model.gguf", Path(directory) / "plan.json"
        raw, architecture = model.config.to_dict(), qat.architecture_of(model)
        write_outline(path, _shapes(model), raw, architecture, _float_types(config.plan))
        written.write_text(json.dumps(config.plan), "utf-8")
        file = open_gguf(path)
        given = given_imatrix(None if config.imatrix is None else Path(config.imatrix), file)
        importances = importances_of(given, file) or {}
        try:
            if config.preset is not None:
                plan = allocate(file, config.preset, has_imatrix=given is not None)
            else:
                plan = read_plan(written, file)
        except EdgeqError as error:  # names files that nobody else knows
            told = str(error).replace(str(written), "EdgeqConfig.plan")
            name = model.config.name_or_path or type(model).__name__
            raise type(error)(told.replace(str(path), name).replace(path.name, name)) from error
        plan.check_importances(file, importances.__contains__)
        qat.simulate_plan(model, file, plan, importances)
    with torch.no_grad():  # rounds now what would be rounded at the first use
        for module in qat.simulated_modules(model):
            for name in module.parametrizations:
                getattr(module, name)
    _tell_fallbacks(plan)
    return plan


def _tell_fallbacks(plan: Plan) -> None:
    fallbacks = [entry for entry in plan.entries if entry.is_fallback]
    if fallbacks:
        _logger.warning(
            "%d of %d tensors have another type than %s gives them, the first is %s, now %s: %s",
            len(fallbacks),
            len(plan.entries),
            plan.preset,
            fallbacks[0].name,
            fallbacks[0].qtype.name,
            fallbacks[0].reason,
        )


def _shapes(model: Any) -> dict[str, Shape]:
    """Return the shapes of what a checkpoint of the model holds: an output that is tied is not."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _float_types(plan: Mapping[str, Any] | None) -> dict[str, GGMLQuantizationType]:
    """Return the types of what a plan leaves float: they are those of its own reference."""
    floats = {qtype.name: qtype for qtype in (_T.F32, _T.F16, _T.BF16)}
    tensors = (plan or {}).get("tensors")
    entries = tensors.items() if isinstance(tensors, Mapping) else ()
    told = {name: entry.get("type") for name, entry in entries if isinstance(entry, Mapping)}
    return {name: floats[qtype] for name, qtype in told.items() if qtype in floats}


def _take_weights(model: Any, path: Path) -> None:
    """Fill all of a model's parameters from a GGUF file."""
    file, architecture = open_gguf(path), qat.architecture_of(model)
    if file.architecture != architecture.name:
        raise CalibrationError(
            f"{path}: is of architecture {file.architecture}, but {type(model).__name__} becomes "
            f"{architecture.name}. Give the file of this model."
        )
    origins = qat.parameter_origins(model, file)
    if "output.weight" in file.tensors:
        _untie(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    done: set[int] = set()
    for name, parameter in named.items():
        if id(parameter) in done:
            continue
        done.add(id(parameter))
        values: FloatArray = np.empty(tuple(parameter.shape), np.float32)
        for origin in origins[name]:
            fill(values, origin, file.read_float(origin.name))
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(values))


def _untie(model: Any) -> None:
    """Give the output matrix memory of its own: in the file it is not the embedding."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = False
        model.all_tied_weights_keys = {}
