"""A trained policy as a file: a small network from eleven features to a bit offset, in numpy."""

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
            about = json.loads((file.metadata() or {})["edgeq.policy"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RecipeError(
            f"{path}: no readable policy ({error!r}). Train one with --allocator ramp:save=FILE."
        ) from error
    if about.get("schema") != SCHEMA or about.get("features") != list(NAMES):
        raise RecipeError(
            f"{path}: a policy of schema {about.get('schema')!r} on {about.get('features')!r:.60}, "
            f"expected schema {SCHEMA} on {len(NAMES)} features, {', '.join(NAMES):.60}... "
            "Train it again with this version."
        )
    layers = tuple((arrays[f"{n}.weight"], arrays[f"{n}.bias"]) for n in range(len(arrays) // 2))
    return Policy(layers, str(about.get("trained on", "")))
