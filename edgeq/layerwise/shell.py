"""Everything of a torch model but its decoder layers.

The whole model is built without memory, and what is not a layer is filled from the file. In place
of each layer stands a function: it records how the model calls the layer (rotations, masks,
windows), and it can hand back a given hidden state in place of the last layer's, so that whatever
the model does behind its layers is computed by the model itself.
"""

import copy
import functools
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from converters.architectures import known_architectures
from converters.architectures.settings import settings
from converters.gguf_file import GgufFile
from edgeq.errors import CalibrationError
from edgeq.layerwise.configuration import read_configuration
from edgeq.layerwise.origins import FloatArray, Origin, fill, origins_of
from edgeq.layerwise.products import Weight

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Shell:
    """A torch model whose layers are empty.

    Parameters
    ----------
    reference : the file that the weights come from
    model : transformers' model on the meta device
    origins : of its parameters
    device : where the weights go when they are read, and where everything is computed

    Attributes
    ----------
    head : the output matrix
    vectors : norms and biases outside of the layers
    """

    def __init__(
        self,
        reference: GgufFile,
        model: Any,
        origins: Mapping[str, tuple[Origin, ...]],
        device: Any,
    ) -> None:
        self.reference = reference
        self.device = device
        self.config = model.config
        self._model = model
        self._origins = origins
        self._prefix, self._layers = _find_layers(model, model.config.num_hidden_layers)
        self._calls: list[Call] = []
        self._n_tokens = 0
        self._entering: Any = None
        self._behind = threading.local()  # its `leaving`: what this thread hands to `behind`
        for layer, module in enumerate(self._layers):
            module.forward = functools.partial(self._stand_in, layer)
        self.vectors: list[Weight] = []
        self.head = self._fill_surroundings()

    def parameters_of(self, layer: int) -> dict[str, tuple[Any, tuple[Origin, ...]]]:
        """Return a layer's empty parameters and their origins, by their names in the layer."""
        return {
            name: (parameter, self._origins[f"{self._prefix}.{layer}.{name}"])
            for name, parameter in self._layers[layer].named_parameters()
        }

    def filled_layer(
        self, layer: int, replaced: Mapping[str, FloatArray]
    ) -> tuple[Any, list[Weight]]:
        """Return a copy of a layer with its weights in it, and the weights, vectors among them."""
        original = self._layers[layer]
        stand_in = original.__dict__.pop("forward")  # refers to the whole model
        try:
            module = copy.deepcopy(original, {id(self.config): self.config})
        finally:
            original.forward = stand_in
        weights = []
        for name, (empty, origins) in self.parameters_of(layer).items():
            parameter = self._filled(empty.shape, origins, replaced)
            _set_parameter(module, name, parameter)
            weights.append(Weight(parameter, origins))
        for path, part in module.named_modules():
            self._make_buffers(path, part)
        return module, weights

    def entering(self, tokens: Any) -> Any:
        """Return what enters layer 0, (n_tokens, n_embd), of (n_tokens,) int64."""
        self._calls = []
        self._n_tokens = len(tokens)
        with torch.no_grad():
            self._model.base_model(input_ids=tokens[None].to(self.device), use_cache=False)
        if len(self._calls) != len(self._layers):
            raise CalibrationError(
                f"{self.reference.path}: {type(self._model).__name__} ran {len(self._calls)} of "
                f"its {len(self._layers)} layers. Report this model to edgeq's developers."
            )
        return self._entering[0]

    def calls(self, n_tokens: int) -> Sequence[Call]:
        """Return how the model calls each layer on a chunk of `n_tokens`, less the hidden state."""
        if self._n_tokens != n_tokens:
            self.entering(torch.zeros(n_tokens, dtype=torch.int64))
        return self._calls

    def behind(self, hidden: Any) -> Any:
        """Return the logits, (n_tokens, n_vocab), of what leaves the last layer."""
        self._behind.leaving = hidden[None]
        try:
            tokens = torch.zeros((1, len(hidden)), dtype=torch.int64, device=self.device)
            return self._model(input_ids=tokens, use_cache=False).logits[0]
        finally:
            self._behind.leaving = None

    def _stand_in(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, *rest = args
        else:
            hidden, rest = kwargs.pop("hidden_states"), []
        leaving = getattr(self._behind, "leaving", None)
        if leaving is not None:
            return leaving if layer == len(self._layers) - 1 else hidden
        self._calls.append((tuple(rest), kwargs))
        if layer == 0:
            self._entering = hidden
        return hidden

    def _fill_surroundings(self) -> Weight:
        """Fill everything but the layers; return the output matrix."""
        filled: dict[str, Any] = {}
        for name, empty in dict(self._model.named_parameters(remove_duplicate=False)).items():
            if name.startswith(f"{self._prefix}."):
                continue
            origins = self._origins[name]
            if origins[0].name not in filled:  # a tied output shares the embedding's memory
                filled[origins[0].name] = self._filled(empty.shape, origins, {})
            _set_parameter(self._model, name, filled[origins[0].name])
            if empty.ndim == 1:
                self.vectors.append(Weight(filled[origins[0].name], origins))
        for path, part in self._model.named_modules():
            if not f"{path}.".startswith(f"{self._prefix}."):
                self._make_buffers(path, part)
        output = self._model.get_output_embeddings().weight
        return Weight(output, self._origins[output_name(self._model)])

    def _filled(
        self,
        shape: Sequence[int],
        origins: Sequence[Origin],
        replaced: Mapping[str, FloatArray],
    ) -> Any:
        out = np.empty(tuple(shape), np.float32)
        for origin in origins:
            values = replaced.get(origin.name)
            fill(out, origin, self.reference.read_float(origin.name) if values is None else values)
        return torch.nn.Parameter(torch.from_numpy(out).to(self.device), requires_grad=False)

    def _make_buffers(self, path: str, module: Any) -> None:
        """Compute the buffers of one module, such as rotary frequencies, that no file holds."""
        buffers = dict(module.named_buffers(recurse=False))
        empty = {name: buffer for name, buffer in buffers.items() if buffer.is_meta}
        if not empty:
            return
        for name, buffer in empty.items():
            unset = float("nan") if buffer.is_floating_point() else 0
            setattr(module, name, torch.full_like(buffer, unset, device="cpu"))
        for parameter in module.parameters(recurse=False):
            parameter._is_hf_initialized = True  # transformers leaves these alone
        self._model._init_weights(module)
        for name in empty:
            if getattr(module, name).isnan().any():
                raise CalibrationError(
                    f"{self.reference.path}: transformers does not say how {path}.{name} is made. "
                    "Report this model to edgeq's developers."
                )
        divisors = "rope_freqs.weight"  # llama 3's scaling, which metadata do not describe
        if divisors in self.reference.tensors and getattr(module, "rope_type", "") == "default":
            module.inv_freq /= torch.tensor(self.reference.read_float(divisors))
        for name in empty:
            setattr(module, name, getattr(module, name).to(self.device))


def open_shell(reference: GgufFile, checkpoint: Path | None, device: Any) -> Shell:
    """Return the shell of a GGUF file's model; see ``LayerwiseModel.open``."""
    config = read_configuration(reference, checkpoint)
    has_caps = getattr(config, "attn_logit_softcapping", None) is not None  # sdpa forgets them
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=torch.float32,
                attn_implementation="eager" if has_caps else "sdpa",
                experts_implementation="eager",
            ).eval()
    except Exception as error:
        raise CalibrationError(
            f"{reference.path}: transformers {transformers.__version__} cannot build this "
            f"model ({' '.join(str(error).split())[:200]}). Install a newer transformers, or "
            "choose a quantizer without gradients."
        ) from error
    architecture = known_architectures().get(type(model).__name__)
    if architecture is None or architecture.name != reference.architecture:
        raise CalibrationError(
            f"{reference.path}: a GGUF of architecture {reference.architecture}, but the "
            f"configuration makes a {type(model).__name__}; expected "
            f"{'a known class' if architecture is None else architecture.name}. Give the "
            "directory and the file of the same model."
        )
    model.requires_grad_(False)
    named = dict(model.named_parameters(remove_duplicate=False))
    shapes = {name: tuple(parameter.shape) for name, parameter in named.items()}
    plain = settings(model.config.to_dict(), architecture)
    output = output_name(model)
    origins = origins_of(shapes, reference, architecture, plain, output)
    return Shell(reference, model, origins, device)


def _find_layers(model: Any, n_layers: int) -> tuple[str, Any]:
    """Return the name and the list of the decoder layers."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers:
            return name, module
    raise CalibrationError(
        f"{type(model).__name__}: has no list of {n_layers} layers. Report this model to edgeq's "
        "developers."
    )


def output_name(model: Any) -> str:
    """Return the name of the output matrix among a model's parameters."""
    output = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is output)


def _set_parameter(root: Any, name: str, parameter: Any) -> None:
    path, _, leaf = name.rpartition(".")
    root.get_submodule(path)._parameters[leaf] = parameter
