"""Learned rounding and clipping on the file's own grids, layer by layer, without the model.

Published methods learn on a block's outputs for batches of tokens; with second moments the same
loss of one layer is a quadratic form, so a step is one product of matrices. What the second moments
cannot tell (later layers, other text) no number of steps will find, see DECISIONS.md 59.
"""

from dataclasses import dataclass

import numpy as np
from gguf.constants import GGMLQuantizationType

from cpu_kernels.block_formats import FORMATS
from edgeq.errors import RecipeError
from edgeq.quantizers import Inputs, Rounded
from edgeq.quantizers.factor import check_damping, damped
from edgeq.quantizers.feedback import Rounding
from edgeq.quantizers.gptq import Gptq, check_moments, row_losses
from edgeq.quantizers.learning import METHODS, learn
from edgeq.registry import unknown_name
from edgeq.runtime.encoders import FloatArray, encode

SLOPES = ("secant", "straight")
STARTS = ("gptq", "rtn")


@dataclass(frozen=True)
class Learned:
    """Gradient descent on rounding offsets and on scales, started from another quantizer.

    Nothing is drawn at random, so there is no seed.

    Attributes
    ----------
    method : ``sign`` (AutoRound: offsets and clipping by the sign of the gradient), ``adaround``
        (rectified sigmoids and a regularizer; codes only) or ``flexround`` (learned divisors of
        weights and rows, and scales)
    slope : what stands for the derivative of rounding, but for ``adaround``: ``secant``, from the
        lower to the upper of a weight's two codes, or ``straight`` through, as published
    steps : of the descent; each is a product with the second moments
    lr : size of a step; 0: the method's own (``sign``: 1/steps)
    start : ``gptq`` or ``rtn``: codes and scales to start from; kept where no step is better
    sweeps : of coordinate descent before learning, where `start` is ``gptq``
    dampening_frac, shrinkage : see ``edgeq.quantizers.gptq.Gptq``
    """

    method: str = "sign"
    slope: str = "secant"
    steps: int = 50
    lr: float = 0.0
    start: str = "gptq"
    sweeps: int = 1
    dampening_frac: float = 0.01
    shrinkage: float = 0.5

    uses_hessian = True

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise RecipeError(f"learned: {unknown_name('method', self.method, list(METHODS))}")
        if self.slope not in SLOPES:
            raise RecipeError(f"learned: {unknown_name('slope', self.slope, list(SLOPES))}")
        if self.start not in STARTS:
            raise RecipeError(f"learned: {unknown_name('start', self.start, list(STARTS))}")
        check_damping("learned", self.shrinkage, self.dampening_frac)
        if self.steps < 1 or self.sweeps < 0 or not 0 <= self.lr <= 1:
            raise RecipeError(
                f"learned: steps={self.steps}, sweeps={self.sweeps}, lr={self.lr}; expected a step "
                "or more, 0 sweeps or more and a step size from 0 to 1."
            )

    def quantize(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        inputs: Inputs,
        *,
        n_threads: int | None = None,
    ) -> Rounded:
        """Return the packed rows of a weight, see ``edgeq.quantizers.Quantizer``.

        What has no grid of single weights (IQ1, IQ2, IQ3, Q1_0) or no second moments stays as it
        starts; the facts then say why.

        Raises
        ------
        CalibrationError
            The second moments have another shape, or are not finite.
        """
        started = self._start(name, weight, qtype, inputs, n_threads)
        if inputs.hessian is None:
            return Rounded(started.packed, {"fallback": "rtn: no second moments of its inputs"})
        check_moments(name, inputs.hessian, weight.shape)
        if qtype not in FORMATS:
            reason = f"{self.start}: the codes of {qtype.name} do not stand for single weights"
            return Rounded(started.packed, {"fallback": reason, **started.facts})
        matrices = weight.reshape(len(inputs.hessian), -1, weight.shape[-1])
        rows = started.packed.reshape(len(matrices), -1, started.packed.shape[1])
        out = rows.copy()
        before = after = 0.0
        n_lower = n_unreached = 0
        for number, matrix in enumerate(matrices):
            if not np.diagonal(inputs.hessian[number]).max() > 0 or not np.any(matrix):
                n_unreached += 1
                continue
            matrix = np.ascontiguousarray(matrix)
            hessian = damped(inputs.hessian[number], self.shrinkage, self.dampening_frac)
            start = Rounding.of(FORMATS[qtype], rows[number])
            found = learn(
                start,
                matrix,
                hessian,
                method=self.method,
                is_straight=self.slope == "straight",
                steps=self.steps,
                rate=self.lr or None,
            )
            out[number] = found.packed()
            losses = [row_losses(one.values - matrix, hessian) for one in (start, found)]
            before += float(losses[0].sum(dtype=np.float64))
            after += float(losses[1].sum(dtype=np.float64))
            n_lower += int((losses[1] < losses[0]).sum())
        facts: dict[str, float | str] = dict(started.facts)
        if n_unreached < len(matrices):
            n_rows = rows.shape[1] * (len(matrices) - n_unreached)
            facts.setdefault("loss_rtn", before)  # gptq tells it
            facts |= {
                "loss": after,
                "loss_start": before,
                "rows_better_than_start": n_lower / n_rows,
            }
        if n_unreached:
            facts["fallback"] = f"rtn: {n_unreached} of its matrices saw no input, or are zero"
        return Rounded(out.reshape(started.packed.shape), facts)

    def _start(
        self,
        name: str,
        weight: FloatArray,
        qtype: GGMLQuantizationType,
        inputs: Inputs,
        n_threads: int | None,
    ) -> Rounded:
        if self.start == "gptq":
            gptq = Gptq(
                dampening_frac=self.dampening_frac, shrinkage=self.shrinkage, sweeps=self.sweeps
            )
            return gptq.quantize(name, weight, qtype, inputs, n_threads=n_threads)
        return Rounded(encode(weight, qtype, inputs.importances, n_threads=n_threads, name=name))
