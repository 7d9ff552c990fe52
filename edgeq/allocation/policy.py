"""A trained policy as a file: a small network from eleven features to a bit offset, in numpy."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from edgeq.allocation.features import NAMES
from edgeq.errors import RecipeError
from edgeq.workdir import replacing

FloatArray = npt.NDArray[np.float32]
SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Policy:
    """The mean of a trained actor.

    Attributes
    ----------
    layers : (weight (n_out, n_in), bias (n_out,)) float32; ReLU between them, tanh at the end
    about : what it was trained on
    """

    layers: tuple[tuple[FloatArray, FloatArray], ...]
    about: str = ""

    def __call__(self, state: FloatArray) -> float:
        """Return the action for a state of 11 features, −1 to 1."""
        values = np.asarray(state, np.float32)
        for weight, bias in self.layers[:-1]:
            values = np.maximum(weight @ values + bias, 0)
        weight, bias = self.layers[-1]
        return float(np.tanh(weight @ values + bias)[0])

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        arrays = {}
        for number, (weight, bias) in enumerate(self.layers):
            arrays[f"{number}.weight"], arrays[f"{number}.bias"] = weight, bias
        about = {"schema": SCHEMA, "features": NAMES, "trained on": self.about}
        with replacing(path) as temporary:
            temporary.write_bytes(save(arrays, {"edgeq.policy": json.dumps(about)}))


def read_policy(path: Path) -> Policy:
    """Read what ``Policy.write`` wrote.

    Raises
    ------
    RecipeError
        No such file, no policy, or one of other features.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = dict(json.loads((file.metadata() or {})["edgeq.policy"]))
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from error
    if about.get("schema") != SCHEMA or about.get("features") != list(NAMES):
        raise RecipeError(
            f"{path}: a policy of schema {about.get('schema')!r} on {about.get('features')!r:.60}, "
            f"expected schema {SCHEMA} on {len(NAMES)} features, {', '.join(NAMES):.60}... "
            "Train it again with this version."
        )
    try:
        return Policy(_layers(arrays), str(about.get("trained on", "")))
    except (KeyError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> RecipeError:
    return RecipeError(
        f"{path}: no readable policy ({error!r}). Train one with --allocator ramp:save=FILE."
    )


def _layers(arrays: dict[str, FloatArray]) -> tuple[tuple[FloatArray, FloatArray], ...]:
    """Return the layers in order; a KeyError or ValueError says why they are no network."""
    layers = tuple(
        (arrays[f"{n}.weight"], arrays[f"{n}.bias"]) for n in range(-(-len(arrays) // 2))
    )
    widths = [len(NAMES), *(bias.size for _, bias in layers)]
    expected = [((out, into), (out,)) for into, out in itertools.pairwise(widths)]
    found = [(weight.shape, bias.shape) for weight, bias in layers]
    if found != expected or widths[-1] != 1:
        raise ValueError(f"layers of {found}, expected {len(NAMES)} numbers in and 1 out")
    if not all(np.isfinite(values).all() for values in arrays.values()):
        raise ValueError("a weight is not finite")
    return layers
