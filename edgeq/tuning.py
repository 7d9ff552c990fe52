"""Tune what a quantized file stores in floating point: scales and offsets of blocks, norms, biases.

Codes stay as they are. The quantized model runs in torch, layer by layer, and the gradients of its
KL divergence from the float model move the scales. Each round of steps is an artefact, so that an
interrupted run goes on; the round with the least divergence on text held out for it is taken.

Layers, logits and the gradients at weights are computed on the models' device, a GPU where torch
sees one; blocks are taken apart and put together by numpy. The same bytes again are only promised
on the CPU, with the same number of threads. ``made_by`` has to name the device: a run that goes on
elsewhere then starts the tuning anew.

Sources: Kim et al., PEQA, arXiv:2305.14152, and Chen et al., EfficientQAT, arXiv:2407.11062,
section 3.3, train the scales alone; here by the divergence from the float model instead of the
text's own tokens, and with everything snapped to what the file can hold at each step.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from cpu_kernels.block_formats import FORMATS, Fields
from cpu_kernels.block_formats_numbers import Half
from cpu_kernels.lattice_formats import LATTICES, Points
from edgeq.calibration.collector import check_fits, free_bytes
from edgeq.console import Progress
from edgeq.runtime.encoders import FloatArray, Packed
from edgeq.runtime.model import Tokens
from edgeq.workdir import WorkDirectory, file_sha256, save_arrays

if TYPE_CHECKING:
    from edgeq.layerwise import Layer, LayerwiseModel, Product

_BATCH = 2  # chunks of a step
_RATE = 1e-3  # relative change of a scale in the first steps
_ROUND = 8  # steps between two looks at the tuning text
_PATIENCE = 3  # rounds without a new best
_BETAS = (0.9, 0.99)  # of Adam; steps are few
_MEMORY_FRACTION = 0.25  # of what is free, for keeping the layers of a step


class _Knob(Protocol):
    """A tensor with numbers to be tuned; zeros leave it as it is."""

    size: int

    def values(self, theta: FloatArray) -> FloatArray:
        """Return the tensor in its shape."""

    def gradient(self, theta: FloatArray, at_values: FloatArray) -> FloatArray:
        """Return the gradient at `theta`, given the one at the values."""

    def packed(self, theta: FloatArray) -> Packed:
        """Return the bytes of the file."""


class Blocks:
    """A tensor in blocks: logarithms of factors for its super-block scales and offsets."""

    def __init__(self, packed: Packed, shape: tuple[int, ...], qtype: GGMLQuantizationType) -> None:
        self.shape = shape
        self.format = FORMATS[qtype]
        self.fields, self.codes = self.format.unpack(packed.reshape(-1, packed.shape[-1]))
        n_scales = self.fields.super_scale.size
        self.size = 2 * n_scales if self.format.has_offset else n_scales

    def _fields(self, theta: FloatArray) -> Fields:
        old = self.fields
        factors = np.exp(theta).reshape(-1, *old.super_scale.shape)
        offset = old.super_offset
        if self.format.has_offset:
            offset = self.format.snap_super_offset(offset * factors[1])
        scale = self.format.snap_super_scale(old.super_scale * factors[0])
        return Fields(scale, offset, old.sub_scale, old.sub_offset)

    def values(self, theta: FloatArray) -> FloatArray:
        """Return the tensor in its shape."""
        return self.format.decode(self._fields(theta), self.codes).reshape(self.shape)

    def gradient(self, theta: FloatArray, at_values: FloatArray) -> FloatArray:
        """Return the gradient at `theta`: sums over what each scale or offset contributes to."""
        fields = self._fields(theta)
        scale, offset = self.format.grid(fields)
        of_groups = at_values.reshape(*scale.shape, -1)
        levels = self.format.levels[self.codes].reshape(of_groups.shape)
        parts = [np.einsum("rgi,rgi->rg", of_groups, levels) * scale]
        if self.format.has_offset:
            parts.append(of_groups.sum(axis=2) * offset)
        blocks = fields.super_scale.shape
        return np.concatenate([p.reshape(*blocks, -1).sum(axis=2).ravel() for p in parts])

    def packed(self, theta: FloatArray) -> Packed:
        """Return the bytes of the file."""
        rows = self.format.pack(self._fields(theta), self.codes)
        return rows.reshape(*self.shape[:-1], -1)


class LatticeBlocks:
    """A tensor of lattice points: logarithms of factors for its super-block scales."""

    def __init__(self, packed: Packed, shape: tuple[int, ...], qtype: GGMLQuantizationType) -> None:
        self.shape = shape
        self.format = LATTICES[qtype]
        self.points = self.format.unpack(packed.reshape(-1, packed.shape[-1]))
        self.size = self.points.super_scale.size

    def _points(self, theta: FloatArray) -> Points:
        scale = self.points.super_scale
        scale = self.format.snap_super_scale(scale * np.exp(theta).reshape(scale.shape))
        return replace(self.points, super_scale=scale)

    def values(self, theta: FloatArray) -> FloatArray:
        """Return the tensor in its shape."""
        return self.format.decode(self._points(theta)).reshape(self.shape)

    def gradient(self, theta: FloatArray, at_values: FloatArray) -> FloatArray:
        """Return the gradient at `theta`: sums over each block."""
        size = self.format.block_size
        blocks = at_values.reshape(-1, size), self.values(theta).reshape(-1, size)
        found: FloatArray = np.einsum("bi,bi->b", *blocks)
        return found

    def packed(self, theta: FloatArray) -> Packed:
        """Return the bytes of the file."""
        return self.format.pack(self._points(theta)).reshape(*self.shape[:-1], -1)


class _Vector:
    """A norm or bias in float32: changes in units of its root mean square."""

    def __init__(self, start: FloatArray) -> None:
        self.start = start
        self.unit: np.float32 = np.sqrt(np.mean(np.square(self.start)))
        self.size = self.start.size

    def values(self, theta: FloatArray) -> FloatArray:
        """Return the tensor."""
        values: FloatArray = self.start + self.unit * theta
        return values

    def gradient(self, theta: FloatArray, at_values: FloatArray) -> FloatArray:
        """Return the gradient at `theta`."""
        found: FloatArray = self.unit * at_values
        return found

    def packed(self, theta: FloatArray) -> Packed:
        """Return the bytes of the file."""
        return self.values(theta).view(np.uint8)


def tune(
    teacher: "LayerwiseModel",
    student: "LayerwiseModel",
    tokens: Tokens,
    tuning: Tokens,
    out: Path,
    *,
    steps: int,
    seed: int,
    made_by: Mapping[str, Any],
    work: WorkDirectory,
    progress: Progress,
    frozen: frozenset[str] = frozenset(),
) -> None:
    """Write the student's tensors with scales, offsets, norms and biases tuned.

    Parameters
    ----------
    teacher : the float model
    student : opened from the quantized file, on the same device or another
    tokens, tuning : (n_chunks, n_tokens) int32, to learn from and to judge by
    out : a safetensors file with each tensor's packed rows in its shape
    steps : at most
    seed : of the order of the chunks
    made_by : all that the result depends on, the student's device too
    frozen : names of tensors that stay as they are
    """
    tuner = _Tuner(teacher, student, tokens, tuning, steps, seed, frozen)
    paths: list[Path] = []
    klds: list[float] = []
    for number in range(math.ceil(steps / _ROUND) + 1):
        before = paths[-1] if paths else None
        path = work.artefact(
            f"tune/{number}.safetensors",
            {**made_by, "before": None if before is None else file_sha256(before)},
            lambda out, number=number, before=before: tuner.round(number, before, out),  # type: ignore[misc]
        )
        paths.append(path)
        with safe_open(path, framework="numpy") as part:
            klds.append(float(json.loads(part.metadata()["about"])["kld"]))
        progress(min(number * _ROUND, steps), steps)
        if number - int(np.argmin(klds)) >= _PATIENCE:
            break
    with safe_open(paths[int(np.argmin(klds))], framework="numpy") as part:
        save_arrays(tuner.packed(part.get_tensor("theta")), out, {"klds": json.dumps(klds)})


def check_memory(model: "LayerwiseModel", tokens: Tokens, tuning: Tokens) -> None:
    """Refuse before anything takes time what cannot fit: see what ``_Tuner`` holds at once.

    Parameters
    ----------
    model : the float model, of the student's shapes
    tokens, tuning : see ``tune``

    Raises
    ------
    CalibrationError
        It would not fit into the memory that is free.
    """
    wanted = (tokens.size + tuning.size) * model.n_embd
    of_a_step = (model.n_layers + 1) * _BATCH * tokens.shape[1] * model.n_embd
    needed = 4 * (wanted + of_a_step) + 3 * model.largest_layer_bytes
    check_fits(
        f"--tune: {len(tokens)} chunks of {tokens.shape[1]} tokens and a layer of "
        f"{model.reference.path.name}",
        needed,
        "Give fewer --chunks, or --tune 0.",
    )


class _Tuner:
    """The parameters, and the steps that change them."""

    def __init__(
        self,
        teacher: "LayerwiseModel",
        student: "LayerwiseModel",
        tokens: Tokens,
        tuning: Tokens,
        steps: int,
        seed: int,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        self.teacher, self.student = teacher, student
        self.tokens, self.tuning = tokens, tuning
        self.steps, self.seed, self.frozen = steps, seed, frozen
        self.knobs: dict[str, _Knob] = {}
        self.at: dict[str, slice] = {}
        file, end = student.reference, 0
        for layer in (*range(student.n_layers), None):
            for name in self._tunable(layer):
                info = file.tensors[name]
                knob: _Knob
                if info.qtype == GGMLQuantizationType.F32:
                    knob = _Vector(file.read_float(name))
                else:
                    kind = LatticeBlocks if info.qtype in LATTICES else Blocks
                    knob = kind(file.read_bytes(name), info.shape, info.qtype)
                self.knobs[name], self.at[name] = knob, slice(end, end + knob.size)
                end += knob.size
        self.size = end

    def _tunable(self, layer: int | None) -> list[str]:
        """Return a layer's tensors that have something to tune; None: what is behind the layers."""
        tensors = self.student.reference.tensors
        vectors = self.student.vectors(layer)
        found = [name for name in vectors if tensors[name].qtype == GGMLQuantizationType.F32]
        if layer is not None:
            found += [n for n in self.student.matrices(layer) if has_scales(tensors[n].qtype)]
        return [name for name in found if name not in self.frozen]

    def packed(self, theta: FloatArray) -> dict[str, Packed]:
        """Return all tensors as the file holds them."""
        return {name: knob.packed(theta[self.at[name]]) for name, knob in self.knobs.items()}

    def round(self, number: int, before: Path | None, out: Path) -> None:
        """Take the steps of a round and judge; the first round only judges."""
        import torch

        state = {
            name: np.zeros(self.size, np.float32) for name in ("theta", "exp_avg", "exp_avg_sq")
        }
        if before is not None:
            with safe_open(before, framework="numpy") as part:
                state = {name: part.get_tensor(name) for name in state}
            done = (number - 1) * _ROUND
            theta = torch.nn.Parameter(torch.from_numpy(state.pop("theta")))
            adam = torch.optim.Adam([theta], betas=_BETAS, eps=1e-16)
            moments = {name: torch.from_numpy(array) for name, array in state.items()}
            adam.state[theta] = {"step": torch.tensor(float(done)), **moments}
            for step in range(done, min(done + _ROUND, self.steps)):
                rate = _RATE * 0.5 * (1 + math.cos(math.pi * step / self.steps))
                adam.param_groups[0]["lr"] = rate
                theta.grad = torch.from_numpy(self._gradient(theta.detach().numpy(), step))
                adam.step()
            state = {name: adam.state[theta][name].numpy() for name in moments}
            state["theta"] = theta.detach().numpy()
        kld = self._judge(state["theta"])
        save_arrays(state, out, {"about": json.dumps({"kld": kld})})

    def _chunks(self, step: int) -> list[int]:
        """Return the chunks of a step: every epoch has all of them, in an order of its own."""
        n = len(self.tokens)
        places = range(step * _BATCH, (step + 1) * _BATCH)
        orders = {
            epoch: np.random.default_rng((self.seed, epoch)).permutation(n)
            for epoch in {place // n for place in places}
        }
        return [int(orders[place // n][place % n]) for place in places]

    def _gradient(self, theta: FloatArray, step: int) -> FloatArray:
        """Return the gradient of the mean divergence of one step's chunks."""
        chunks = self._chunks(step)
        gradient = np.zeros(self.size, np.float32)

        def add(name: str, at_values: FloatArray) -> None:
            if name in self.knobs:
                place = self.at[name]
                gradient[place] += self.knobs[name].gradient(theta[place], at_values)

        self._set_behind(theta)
        load = functools.lru_cache(self._n_kept())(lambda number: self._load(number, theta))
        states = [self.student.embed(self.tokens[chunks])]
        for number in range(self.student.n_layers):
            states.append([load(number).run(hidden) for hidden in states[-1]])
        gradients = [
            self.student.divergence(hidden, self.wanted[chunk], self.teacher, add)[1]
            for hidden, chunk in zip(states.pop(), chunks, strict=True)
        ]
        for number in reversed(range(self.student.n_layers)):
            products: dict[str, Any] = {}
            on_product = self._adder(products)
            gradients = [
                load(number).backward(hidden, gradient, on_product, add)
                for hidden, gradient in zip(states.pop(), gradients, strict=True)
            ]
            for name, at_values in products.items():
                add(name, at_values.cpu().numpy())
        gradient /= len(chunks)
        return gradient

    def _adder(self, sums: dict[str, Any]) -> "Callable[[Product], None]":
        """Return what adds up the gradients at the weights of a layer, each in its shape."""
        import torch

        device = self.student.device

        def add(product: "Product") -> None:
            if product.name not in self.knobs or product.gradient is None:
                return
            shape = self.student.reference.tensors[product.name].shape
            if product.name not in sums:
                sums[product.name] = torch.zeros(shape, device=device)
            gradient, inputs = (
                torch.from_numpy(part).to(device) for part in (product.gradient, product.inputs)
            )
            total = sums[product.name].view(-1, *shape[-2:])[product.matrix]
            total.addmm_(gradient.T, inputs)

        return add

    def _judge(self, theta: FloatArray) -> float:
        """Return the mean divergence on the tuning text."""
        self._set_behind(theta)
        states = self.student.embed(self.tuning)
        for number in range(self.student.n_layers):
            layer = self._load(number, theta)
            states = [layer.run(hidden) for hidden in states]
        pairs = zip(states, self.wanted_tuning, strict=True)
        return float(np.mean([self.student.divergence(*p, self.teacher)[0] for p in pairs]))

    def _load(self, number: int, theta: FloatArray) -> "Layer":
        """Return one of the student's layers."""
        names = self._tunable(number)
        return self.student.load(
            number, {name: self.knobs[name].values(theta[self.at[name]]) for name in names}
        )

    def _set_behind(self, theta: FloatArray) -> None:
        """Give the student the norms behind its layers."""
        for name in self._tunable(None):
            self.student.set_vector(name, self.knobs[name].values(theta[self.at[name]]))

    def _n_kept(self) -> int:
        """Return how many layers in float32 fit into a quarter of the free memory."""
        from edgeq.layerwise import free_bytes_on

        device = self.student.device
        is_cpu = device.type == "cpu"
        free = free_bytes(unknown=1 << 32) if is_cpu else free_bytes_on(device)
        return max(1, int(_MEMORY_FRACTION * free) // self.student.largest_layer_bytes)

    @functools.cached_property
    def wanted(self) -> list[FloatArray]:
        """What leaves the float model's last layer, by chunk."""
        return self._float_states(self.tokens)

    @functools.cached_property
    def wanted_tuning(self) -> list[FloatArray]:
        """The same of the tuning text."""
        return self._float_states(self.tuning)

    def _float_states(self, tokens: Tokens) -> list[FloatArray]:
        states = self.teacher.embed(tokens)
        for number in range(self.teacher.n_layers):
            layer = self.teacher.load(number)
            states = [layer.run(hidden) for hidden in states]
        return states


def has_scales(qtype: GGMLQuantizationType) -> bool:
    """Whether blocks of a type hold scales that can be tuned: half floats, no powers of two."""
    if qtype in LATTICES:
        return True
    return qtype in FORMATS and isinstance(FORMATS[qtype].super_scale, Half)
