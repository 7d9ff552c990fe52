"""A file's tensors as the kernels read them."""

import math

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from converters.gguf_file import GgufFile
from converters.gguf_header import FLOATS
from cpu_kernels.choice import rearranged, shape_of
from cpu_kernels.products import Weight
from cpu_kernels.tiles import aligned_bytes
from edgeq.errors import EvaluationError
from edgeq.runtime.encoders import decode

Floats = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int32]

_T = GGMLQuantizationType


class Weights:
    """A file's tensors, each read and rearranged once, for so many threads."""

    def __init__(self, file: GgufFile, n_threads: int) -> None:
        self._file = file
        self._n_threads = n_threads
        self._tiles: dict[str, Weight] = {}
        self._floats: dict[str, Floats] = {}
        self._used = {"token_embd.weight", "rope_freqs.weight"}
        self._embedding = file.read_bytes("token_embd.weight")
        # one memory, in the order of the program: a stream of reads goes on from weight to weight
        self._memory = aligned_bytes(sum(math.prod(self._shape(name)) for name in self._matrices()))
        self._end = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights that a token reads."""
        matrices = [one.data.nbytes for one in self._tiles.values()]
        return sum(matrices) + sum(one.nbytes for one in self._floats.values())

    def _matrices(self) -> list[str]:
        """Return the names of the weights that are rearranged."""
        unused = "token_embd.weight" if "output.weight" in self._file.tensors else ""
        return [
            name
            for name, tensor in self._file.tensors.items()
            if len(tensor.shape) == 2 and tensor.qtype not in FLOATS and name != unused
        ]

    def _shape(self, name: str) -> tuple[int, int]:
        tensor = self._file.tensors[name]
        try:
            return shape_of(tensor.qtype, tensor.shape[0], tensor.shape[1], self._n_threads)
        except ValueError as error:
            raise EvaluationError(f"{self._file.path}: {name}: {error}") from error

    def embedding(self, tokens: Tokens) -> Floats:
        """Return rows of the embedding, (n, n_embd)."""
        qtype = self._file.tensors["token_embd.weight"].qtype
        return decode(np.ascontiguousarray(self._embedding[tokens]), qtype, n_threads=1)

    def weight(self, name: str) -> Weight | Floats:
        """Return a matrix."""
        self._used.add(name)
        tensor = self._file.tensors.get(name)
        if tensor is None:
            raise EvaluationError(f"{self._file.path}: {name} is missing. The file is damaged.")
        if tensor.qtype in FLOATS:
            return self.floats(name)
        if name not in self._tiles:
            shape = self._shape(name)
            start, self._end = self._end, self._end + math.prod(shape)
            place = self._memory[start : self._end].view(np.uint8).reshape(shape)
            packed = self._file.read_bytes(name)
            try:
                self._tiles[name] = rearranged(tensor.qtype, packed, self._n_threads, place)
            except ValueError as error:
                raise EvaluationError(f"{self._file.path}: {name}: {error}") from error
        return self._tiles[name]

    def floats(self, name: str) -> Floats:
        """Return a tensor of floats."""
        self._used.add(name)
        if name not in self._floats:
            if name not in self._file.tensors:
                raise EvaluationError(f"{self._file.path}: {name} is missing. The file is damaged.")
            self._floats[name] = np.ascontiguousarray(self._file.read_float(name), np.float32)
        return self._floats[name]

    def vector(self, name: str) -> Floats:
        """Return a vector, of norms or biases."""
        return self.floats(name)

    def optional(self, name: str) -> int:
        """Return the address of a vector, 0 where the file has none."""
        return self.floats(name).ctypes.data if name in self._file.tensors else 0

    def check_all_used(self) -> None:
        """Refuse a file with tensors that the program does not know."""
        unused = sorted(set(self._file.tensors) - self._used)
        if unused:
            raise EvaluationError(
                f"{self._file.path}: the kernels' decoder does not know {unused[0]} and "
                f"{len(unused) - 1} other tensors of this {self._file.architecture} file. "
                "Use llama.cpp."
            )
