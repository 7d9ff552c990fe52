"""llama.cpp's file types: which type every tensor gets, asked of llama.cpp itself.

``llama_model_quantize`` with ``dry_run`` reads a header, decides every tensor's type with all of
its rules (mixes, tied embeddings, row-size fallbacks, overrides) and logs the decisions: 30 ms for
272 tensors. That log is read here. The other door, ``llama_quant_compute_types`` of
``src/llama-ext.h``, is C++-mangled and forgets the imatrix: it resets ``has_imatrix``, on which
Q4_0, Q5_0, IQ3_XXS, IQ4_NL and IQ4_XS depend.
"""

import ctypes
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from converters.errors import ConversionError
from converters.gguf_file import GgufFile, open_gguf
from converters.output import temporary_beside
from cpu_kernels.threads import available_cpus
from edgeq.errors import CalibrationError, RecipeError, RuntimeLibraryError
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import FloatArray, check_row, needs_importances, type_names
from edgeq.runtime.library import load

_T = GGMLQuantizationType


@dataclass(frozen=True)
class Preset:
    """One file type: its number in ``general.file_type`` and the type that its mix starts from."""

    name: str
    ftype: int
    qtype: GGMLQuantizationType


# enum llama_ftype of include/llama.h and llama_ftype_get_default_type of src/llama-quant.cpp,
# llama.cpp 0c1e57098. Left out: Q2_0 (41), whose tensor type gguf 0.19 does not know, and NVFP4
# (39), which llama.cpp's quantizer has no mix for.
# fmt: off
_TABLE = (
    ("F32", 0, _T.F32), ("F16", 1, _T.F16), ("BF16", 32, _T.BF16),
    ("Q8_0", 7, _T.Q8_0), ("Q6_K", 18, _T.Q6_K),
    ("Q5_K_M", 17, _T.Q5_K), ("Q5_K_S", 16, _T.Q5_K), ("Q5_1", 9, _T.Q5_1), ("Q5_0", 8, _T.Q5_0),
    ("Q4_K_M", 15, _T.Q4_K), ("Q4_K_S", 14, _T.Q4_K), ("Q4_1", 3, _T.Q4_1), ("Q4_0", 2, _T.Q4_0),
    ("IQ4_NL", 25, _T.IQ4_NL), ("IQ4_XS", 30, _T.IQ4_XS), ("MXFP4_MOE", 38, _T.MXFP4),
    ("Q3_K_L", 13, _T.Q3_K), ("Q3_K_M", 12, _T.Q3_K), ("Q3_K_S", 11, _T.Q3_K),
    ("IQ3_M", 27, _T.IQ3_S), ("IQ3_S", 26, _T.IQ3_S), ("IQ3_XS", 22, _T.IQ3_S),
    ("IQ3_XXS", 23, _T.IQ3_XXS),
    ("Q2_K", 10, _T.Q2_K), ("Q2_K_S", 21, _T.Q2_K),
    ("IQ2_M", 29, _T.IQ2_S), ("IQ2_S", 28, _T.IQ2_XS), ("IQ2_XS", 20, _T.IQ2_XS),
    ("IQ2_XXS", 19, _T.IQ2_XXS), ("IQ1_M", 31, _T.IQ1_M), ("IQ1_S", 24, _T.IQ1_S),
    ("TQ2_0", 37, _T.TQ2_0), ("TQ1_0", 36, _T.TQ1_0), ("Q1_0", 40, _T.Q1_0),
)
# fmt: on
PRESETS = {name: Preset(name, ftype, qtype) for name, ftype, qtype in _TABLE}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

# tensor_requires_imatrix of src/llama-quant.cpp, for all but embeddings and output
_GARBAGE_WITHOUT_IMATRIX = frozenset(
    {_T.IQ3_XXS, _T.IQ2_XXS, _T.IQ2_XS, _T.IQ2_S, _T.IQ1_M, _T.IQ1_S}
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"

_DECISION = re.compile(
    r"^\[ *\d+/ *\d+\] (?P<name>.*?) *- \[[ \d,]+\], type = +(?P<source>\S+), "
    r"size = +[\d.]+ MiB(?: -> +[\d.]+ MiB \((?P<qtype>\S+)\))?$",
    re.MULTILINE,
)
_FALLBACK = re.compile(
    r"^warning: (?P<name>.*?) *- ncols +\d+ not divisible by +\d+ "
    r"\(required for type +(?P<wanted>\S+)\) .*-> falling back to +\S+$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class MixOptions:
    """How a preset's mix is changed; llama-quantize's options of the same names.

    Attributes
    ----------
    pure : every tensor gets the preset's first type
    output_type : type of ``output.weight``, and of the token embedding if it is both
    token_embedding_type : type of the token embedding
    overrides : (regular expression, type) pairs, searched in the name; the first match wins
    quantize_output : False leaves ``output.weight`` as it is
    """

    pure: bool = False
    output_type: GGMLQuantizationType | None = None
    token_embedding_type: GGMLQuantizationType | None = None
    overrides: tuple[tuple[str, GGMLQuantizationType], ...] = ()
    quantize_output: bool = True


@dataclass(frozen=True)
class TypeChoice:
    """What llama.cpp decided for one tensor.

    Attributes
    ----------
    source : its type in the source file
    qtype : its type in the quantized file
    wanted : the type that the mix asked for and whose blocks do not fill a row; None: no fallback
    n_in : columns
    preset : name of the file type
    """

    source: GGMLQuantizationType
    qtype: GGMLQuantizationType
    wanted: GGMLQuantizationType | None
    n_in: int
    preset: str

    @property
    def is_fallback(self) -> bool:
        """Whether the row size forced another type than the mix wants."""
        return self.wanted is not None

    @property
    def reason(self) -> str:
        """One phrase for people."""
        if self.wanted is not None:
            block_size = GGML_QUANT_SIZES[self.wanted][0]
            return (
                f"{self.n_in} columns do not divide into {self.wanted.name} blocks of {block_size}"
            )
        if self.source == self.qtype:
            return f"kept as {self.source.name}"
        return f"as {self.preset} chooses"


def find_preset(name: str) -> Preset:
    """Return the file type called `name`, in any case; Q4_K means Q4_K_M as in llama.cpp.

    Raises
    ------
    RecipeError
        llama.cpp, or the installed gguf package, has no such file type.
    """
    upper = name.upper()
    preset = PRESETS.get(_ALIASES.get(upper, upper))
    if preset is None:
        raise RecipeError(unknown_name("preset", upper, list(PRESETS)))
    return preset


def requires_importances(name: str, qtype: GGMLQuantizationType, preset: str) -> bool:
    """Whether llama.cpp refuses to quantize the tensor `name` so without an imatrix entry.

    References
    ----------
    llama.cpp 0c1e57098: src/llama-quant.cpp, tensor_requires_imatrix.
    """
    if needs_importances(qtype):
        return True  # for embeddings llama.cpp passes its own check and ends the process in ggml
    if name in (*_EMBEDDINGS, _OUTPUT):
        return False
    is_small_mix = qtype == _T.Q2_K and find_preset(preset).name == "Q2_K_S"
    return qtype in _GARBAGE_WITHOUT_IMATRIX or is_small_mix


def choose_types(
    path: Path, preset: str, *, has_imatrix: bool, options: MixOptions | None = None
) -> dict[str, TypeChoice]:
    """Return the type that llama.cpp gives every tensor of a GGUF file, in its own order.

    Parameters
    ----------
    path : GGUF file; of a split model the first part. Only its header is read.
    has_imatrix : some mixes are bolder with an imatrix, whatever it holds

    Raises
    ------
    RecipeError
        Unknown preset, or an option's type that ggml cannot encode or that the rows do not fit.
    RuntimeLibraryError
        llama.cpp has no type for some rows, cannot read the file, or logs in another form.
    """
    file = open_gguf(path)
    imatrix = {"-": np.ones((1, 1), np.float32)} if has_imatrix else None
    job = _Job(find_preset(preset), options or MixOptions(), imatrix, dry_run=True)
    _check_options(job.options, file)
    return _read_decisions(job.run(file.paths[0], path), file, job.preset)


def _check_options(options: MixOptions, file: GgufFile) -> None:
    """Refuse types that end the process in ggml: llama.cpp takes these as they are asked."""
    for name in _EMBEDDINGS:
        if options.token_embedding_type is not None and name in file.tensors:
            check_row(name, file.tensors[name].shape[-1], options.token_embedding_type)
    if options.output_type is not None:
        name = _OUTPUT if _OUTPUT in file.tensors else _EMBEDDINGS[0]
        if name in file.tensors:
            check_row(name, file.tensors[name].shape[-1], options.output_type)
    for pattern, qtype in options.overrides:
        check_row(pattern, GGML_QUANT_SIZES[qtype][0], qtype)  # rows have a fallback here


def quantizable_tensors(path: Path) -> frozenset[str]:
    """Return the names of the tensors that llama.cpp is ready to quantize at all.

    Found by asking for two pure types: a tensor that stays what it is in both is kept.
    """
    found: set[str] = set()
    for preset in ("Q4_0", "Q8_0"):
        choices = choose_types(path, preset, has_imatrix=False, options=MixOptions(pure=True))
        found |= {
            name
            for name, choice in choices.items()
            if choice.is_fallback or choice.qtype != choice.source
        }
    return frozenset(found)


def quantize_with_llama_cpp(
    source: Path,
    out: Path,
    preset: str,
    imatrix: Mapping[str, FloatArray] | None,
    *,
    n_threads: int | None = None,
    options: MixOptions | None = None,
    allow_requantize: bool = False,
) -> str:
    """Quantize with llama.cpp's own quantizer, in process: the baseline.

    Parameters
    ----------
    source : float GGUF; of a split model any part
    out : written under a temporary name beside it, then renamed; replaced if it exists
    imatrix : tensor name to mean squared inputs, (n_mat, n_in) float32; None: none

    Returns
    -------
    What llama.cpp logged.

    Raises
    ------
    RecipeError
        Unknown preset, or an option's type that ggml cannot encode or that the rows do not fit.
    CalibrationError
        A type needs importances that `imatrix` does not have, or some are not finite.
    RuntimeLibraryError
        llama.cpp failed; its own reason is passed on.
    """
    imatrix = imatrix or None  # llama-quantize too takes an empty one for none
    job = _Job(
        find_preset(preset),
        options or MixOptions(),
        imatrix,
        n_threads=n_threads or available_cpus(),
        allow_requantize=allow_requantize,
    )
    file = open_gguf(source)
    choices = choose_types(source, preset, has_imatrix=imatrix is not None, options=options)
    for name, choice in choices.items():
        if choice.source != choice.qtype:
            shape = file.tensors[name].shape
            n_values = math.prod(shape[:-2]) * shape[-1]
            usable = imatrix is not None and name in imatrix and imatrix[name].size == n_values
            check_importances(name, choice.qtype, preset, has_importances=usable)
    try:
        with temporary_beside(out) as temporary:
            log = job.run(file.paths[0], temporary)
            _check_written(temporary, file)
            temporary.replace(out)
    except (OSError, ConversionError) as error:
        raise RuntimeLibraryError(
            f"{out}: llama.cpp's quantizer left no complete file ({error}). "
            "Free some space or choose another place."
        ) from error
    return log


def check_importances(
    name: str, qtype: GGMLQuantizationType, preset: str, *, has_importances: bool
) -> None:
    """Refuse a tensor that would be garbage, or end the process, for want of importances.

    Raises
    ------
    CalibrationError
    """
    if requires_importances(name, qtype, preset) and not has_importances:
        raise CalibrationError(
            f"{name}: {qtype.name} in {preset} needs importances and there are none for it. "
            "Give an imatrix of this model, or choose another type or preset."
        )


@dataclass(frozen=True)
class _Job:
    """One call of ``llama_model_quantize``, without its files."""

    preset: Preset
    options: MixOptions
    imatrix: Mapping[str, FloatArray] | None
    n_threads: int = 1
    allow_requantize: bool = False
    dry_run: bool = False

    def run(self, source: Path, out: Path) -> str:
        """Quantize, and return what llama.cpp logged."""
        library = load()
        llama: Any = library.llama
        params = llama.llama_model_quantize_default_params()
        params.ftype = self.preset.ftype
        params.nthread = self.n_threads
        params.dry_run = self.dry_run
        params.allow_requantize = self.allow_requantize
        params.pure = self.options.pure
        params.quantize_output_tensor = self.options.quantize_output
        if self.options.output_type is not None:
            params.output_tensor_type = int(self.options.output_type)
        if self.options.token_embedding_type is not None:
            params.token_embedding_type = int(self.options.token_embedding_type)
        overrides = [(pattern.encode(), int(qtype)) for pattern, qtype in self.options.overrides]
        end_mark: tuple[bytes | None, int] = (None, 0)  # a null pattern ends the list
        params.tt_overrides = (llama.llama_model_tensor_override * (len(overrides) + 1))(
            *overrides, end_mark
        )
        if self.imatrix is not None:
            values = _checked_imatrix(self.imatrix)  # named: it must outlive the call
            params.imatrix = _imatrix_entries(llama, values)
        library.clear_log()
        with library.collected_log() as pieces:
            status = llama.llama_model_quantize(
                os.fsencode(source), os.fsencode(out), ctypes.byref(params)
            )
        log = "".join(pieces)
        if status != 0:
            found = re.search(r"failed to quantize: (.*)", log)
            reason = found[1].strip() if found else library.last_error()
            raise RuntimeLibraryError(
                f"{source}: llama.cpp cannot quantize it to {self.preset.name}: {reason}"
            )
        return log


def _checked_imatrix(imatrix: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    checked = {name: np.ascontiguousarray(v, np.float32) for name, v in imatrix.items()}
    for name, values in checked.items():
        if not (np.isfinite(values).all() and (values >= 0).all()):
            raise CalibrationError(
                f"{name}: its importances are not all finite and positive or zero. "
                "Make the imatrix anew."
            )
    return checked


def _imatrix_entries(llama: Any, imatrix: Mapping[str, FloatArray]) -> Any:
    """Return a null-ended ``llama_model_imatrix_data`` array that points into `imatrix`."""
    entries = (llama.llama_model_imatrix_data * (len(imatrix) + 1))()
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    return entries


def _read_decisions(log: str, file: GgufFile, preset: Preset) -> dict[str, TypeChoice]:
    """Return the decisions of a dry run's log; every tensor must be there once."""
    known = type_names()
    wanted = {match["name"]: match["wanted"] for match in _FALLBACK.finditer(log)}
    is_tied = _OUTPUT not in file.tensors
    choices: dict[str, TypeChoice] = {}
    for match in _DECISION.finditer(log):
        name, source = match["name"], match["source"]
        qtype, asked = match["qtype"] or source, wanted.get(name)
        if name not in file.tensors or name in choices or {qtype, source} - set(known):
            break
        choices[name] = TypeChoice(
            known[source],
            known[qtype],
            known[asked] if asked is not None else None,
            file.tensors[name].shape[-1],
            preset.name,
        )
    if set(choices) != set(file.tensors) or set(wanted) - set(choices):
        raise RuntimeLibraryError(
            f"{file.path}: llama.cpp's log names {len(choices)} of {len(file.tensors)} tensors in "
            "the form that edgeq reads. Install: pip install llama-cpp-python==0.3.36"
        )
    for name in (_OUTPUT, _EMBEDDINGS[0]) if is_tied else (_OUTPUT,):
        if name in choices:
            choices[name] = _with_silent_fallback(choices[name], preset)
    return choices


def _with_silent_fallback(choice: TypeChoice, preset: Preset) -> TypeChoice:
    """Mark the output matrix where llama.cpp takes Q8_0 for its row size without a log line.

    References
    ----------
    llama.cpp 0c1e57098: src/llama-quant.cpp, llama_tensor_get_type_impl, the branch of OUTPUT.
    """
    does_not_fit = choice.n_in % GGML_QUANT_SIZES[preset.qtype][0] != 0
    if does_not_fit and choice.qtype == _T.Q8_0 and choice.source != choice.qtype:
        return dataclasses.replace(choice, wanted=preset.qtype)
    return choice


def _check_written(path: Path, source: GgufFile) -> None:
    """Refuse a file that llama.cpp left incomplete: it does not notice every full device."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    if open_gguf(path).tensors.keys() != source.tensors.keys():
        raise ConversionError(f"{path}: other tensors than in {source.path}")
