"""Where each parameter of the torch model lies in the GGUF file: the converter's rules, inverted.

The converter says what becomes of a parameter: under which names it goes into the file, in which
order of rows, with what added. An order of rows is read off by sending numbered rows through it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from converters.architectures import Architecture
from converters.architectures.description import Arrangement, Config, Shape
from converters.convert import pieces_of
from converters.gguf_file import GgufFile
from edgeq.errors import CalibrationError

FloatArray = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Origin:
    """One GGUF tensor, or one matrix of it, that a torch parameter, or some of its rows, holds.

    Attributes
    ----------
    name : the GGUF tensor
    rows : row of the parameter for each row of the tensor, (n_out,) int64; None: all, in order.
        Rows are those of the last but one axis; elements where the parameter is a vector.
    is_transposed : the parameter is (n_in, n_out)
    offset : the tensor is this much larger than the parameter
    matrix : which matrix of the tensor the parameter is; None: the whole tensor
    """

    name: str
    rows: Rows | None
    is_transposed: bool
    offset: float
    matrix: int | None


def origins_of(
    parameters: Mapping[str, Shape],
    reference: GgufFile,
    architecture: Architecture,
    config: Config,
    output: str,
) -> dict[str, tuple[Origin, ...]]:
    """Return the origins of every parameter.

    Parameters
    ----------
    parameters : shapes by the names that transformers gives them
    output : the parameter that is the output matrix; the embedding where the file has no other
    config : as ``converters.architectures.settings.settings`` returns it

    Raises
    ------
    CalibrationError
        A parameter has no place in the file or another shape there, or a tensor of a layer has no
        place in the model.
    """
    names = gguf.get_tensor_name_map(architecture.model_arch, config["num_hidden_layers"])
    found: dict[str, tuple[Origin, ...]] = {}
    for parameter, shape in parameters.items():
        origins = []
        for name, piece in pieces_of(parameter, parameter, architecture):
            target = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if parameter == output:
                is_tied = "output.weight" not in reference.tensors
                target = "token_embd.weight" if is_tied else "output.weight"
            rows, is_transposed = _order(piece.output.arrange, parameter, shape, config)
            origin = Origin(target, rows, is_transposed, piece.output.offset, piece.index)
            _check_shape(reference, parameter, shape, origin)
            origins.append(origin)
        _check_covered(reference, parameter, shape, origins)
        found[parameter] = tuple(origins)
    used = {origin.name for origins in found.values() for origin in origins}
    surplus = [name for name in reference.tensors if name.startswith("blk.") and name not in used]
    if surplus:
        raise CalibrationError(
            f"{reference.path}: the torch model has no place for {surplus[0]}"
            f"{f' and {len(surplus) - 1} more tensors' if len(surplus) > 1 else ''}: it would "
            "compute something else. Give the checkpoint's directory instead of the GGUF alone."
        )
    return found


def _order(
    arrange: Arrangement | None, parameter: str, shape: Shape, config: Config
) -> tuple[Rows | None, bool]:
    """Return (rows, is_transposed) of an arrangement, see ``Origin``."""
    if arrange is None:
        return None, False
    if len(shape) == 1:
        return arrange.apply(np.arange(shape[0]), config), False
    numbered = np.arange(2 * shape[-2]).reshape(-1, 2)  # two columns stand for all
    arranged = arrange.apply(numbered, config)
    if np.array_equal(arranged, numbered.T):
        return None, True
    rows: Rows = arranged[:, 0] // 2
    if not np.array_equal(arranged, 2 * rows[:, None] + np.arange(2)):
        raise CalibrationError(
            f"{parameter}: the converter rearranges more than its rows; expected an order of rows "
            "or a transposition. Mend the architecture's description."
        )
    return rows, False


def _check_shape(reference: GgufFile, parameter: str, shape: Shape, origin: Origin) -> None:
    if origin.name not in reference.tensors:
        raise CalibrationError(
            f"{reference.path}: {origin.name or parameter} is missing, which {parameter} of the "
            "torch model needs. The file and the configuration belong to different models."
        )
    found = tuple(reference.tensors[origin.name].shape)
    if origin.matrix is not None:
        found = found[1:]
    *outer, n_out, n_in = shape if len(shape) > 1 else (*shape, 1)
    expected: Shape = (*outer, n_out if origin.rows is None else len(origin.rows), n_in)
    if origin.is_transposed:
        expected = (*outer, n_in, n_out)
    if len(shape) == 1:
        expected = expected[:-1]
    if found != expected:
        raise CalibrationError(
            f"{reference.path}: {origin.name} is {found}, but {parameter} of the torch model wants "
            f"{expected}. The file and the configuration belong to different models."
        )


def _check_covered(
    reference: GgufFile, parameter: str, shape: Shape, origins: list[Origin]
) -> None:
    n_rows = shape[-2] if len(shape) > 1 else shape[0]
    counts = np.zeros(n_rows, np.int64)
    for origin in origins:
        counts[slice(None) if origin.rows is None else origin.rows] += 1
    if not np.all(counts == 1):
        raise CalibrationError(
            f"{reference.path}: {np.count_nonzero(counts != 1)} of the {n_rows} rows of "
            f"{parameter} are not filled exactly once from the file. Mend the architecture's "
            "description."
        )


def fill(out: npt.NDArray[np.float32], origin: Origin, values: FloatArray) -> None:
    """Write a GGUF tensor into a parameter.

    Parameters
    ----------
    out : the parameter, *written*
    values : the whole tensor, float32 in its shape in the file
    """
    part: Any = values if origin.matrix is None else values[origin.matrix]
    target = out.swapaxes(-1, -2) if origin.is_transposed else out
    if origin.offset:
        part = part - np.float32(origin.offset)
    if origin.rows is None:
        target[...] = part
    elif out.ndim == 1:
        target[origin.rows] = part
    else:
        target[..., origin.rows, :] = part
