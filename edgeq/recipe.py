"""What one export is asked to do, checked once, before anything is read or written."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.errors import RecipeError

AUTO_TEXT = "auto"
DEFAULT_PRESET = "Q4_K_M"
DEFAULT_COSTS = "auto"


@dataclass(frozen=True)
class TextChoice:
    """Which text calibrates, and which one judges.

    Attributes
    ----------
    calibration : files (``FILE`` or ``FILE@WEIGHT``), or ``("auto",)``: the model writes it
    evaluation : files that calibration has not seen; empty: a part held out of `calibration`
    n_ctx : tokens of one chunk
    chunks : at most so many chunks calibrate; None: all of the text (auto: 32)
    evaluation_chunks : at most so many chunks judge
    seed : of the sampling (auto) and of the split
    force : accept evaluation text that calibration has seen; the report then says so
    """

    calibration: tuple[str, ...] = (AUTO_TEXT,)
    evaluation: tuple[str, ...] = ()
    n_ctx: int = 512
    chunks: int | None = None
    evaluation_chunks: int = 16
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise RecipeError(f"--seed: got {self.seed}, expected 0 or more.")
        if AUTO_TEXT in self.calibration and len(self.calibration) > 1:
            raise RecipeError("--text: auto stands alone; leave it out or leave the files out.")
        if self.n_ctx < 32:
            raise RecipeError(f"--ctx: {self.n_ctx} tokens are too few for a chunk; at least 32.")
        for flag, value in (("--chunks", self.chunks), ("--eval-chunks", self.evaluation_chunks)):
            if value is not None and value < 1:
                raise RecipeError(f"{flag}: got {value}, expected 1 or more.")

    @property
    def files(self) -> tuple[str, ...]:
        """Every file that is read."""
        return self.evaluation if self.is_auto else (*self.calibration, *self.evaluation)

    @property
    def is_auto(self) -> bool:
        """Whether the model writes its own calibration text."""
        return self.calibration == (AUTO_TEXT,)


@dataclass(frozen=True)
class Effort:
    """What ``--quantizer auto`` may spend.

    Attributes
    ----------
    chunks : of calibration text, unless the user says how many
    tuning_chunks : of the text on which the result is verified
    fisher : see ``Method``; squared gradients cost time and, on few tokens, accuracy
    sweeps : of coordinate descent
    transforms : methods of the search for folds
    tune_steps, output_feedback : see ``Method``; without gradients there is no backward pass at all
    """

    chunks: int
    tuning_chunks: int
    fisher: float
    sweeps: int
    transforms: tuple[str, ...]
    tune_steps: int = 0
    output_feedback: bool = True


EFFORTS = {
    "fast": Effort(
        16, tuning_chunks=4, fisher=0.0, sweeps=1, transforms=("balance",), output_feedback=False
    ),
    "default": Effort(32, tuning_chunks=8, fisher=0.5, sweeps=2, transforms=("balance", "dual")),
    "max": Effort(
        64, tuning_chunks=8, fisher=0.5, sweeps=2, transforms=("balance", "dual"), tune_steps=48
    ),
}


@dataclass(frozen=True)
class Method:
    """How tensors are rounded: what `quantizer` and the settings beside it amount to.

    Attributes
    ----------
    quantizer : ``NAME`` or ``NAME:key=value,...``
    fisher : 0 to 1, how far second moments are weighted by squared gradients
    fisher_groups : groups of a weight's rows with gradients, so second moments, of their own
    output_feedback : rows make up for the errors of rows before them, as far as the gradients at
        their outputs go together
    sequential : each layer is calibrated through the quantized layers before it
    transforms : methods of the search for folds; empty: nothing is folded
    asymmetric : 0 to 1, how far weights are moved to make up for the layers before
    tune_steps : at most so many, of tuning scales and norms by KL divergence
    is_verified : compare with round-to-nearest on tuning text, and ship what is better
    """

    quantizer: str
    fisher: float = 0.5
    fisher_groups: int = 1
    output_feedback: bool = False
    sequential: bool = True
    transforms: tuple[str, ...] = ()
    asymmetric: float = 0.0
    tune_steps: int = 0
    is_verified: bool = False


@dataclass(frozen=True)
class Target:
    """What the file has to be; whatever is left open is then as good as it can be.

    Attributes
    ----------
    size_bytes : the whole file has at most so many
    bpw : bits per weight at most, over all tensors
    max_kld : mean KL divergence from the float model at most, nats, on tuning text
    max_ppl_ratio : perplexity at most so many times the float model's, on tuning text
    min_tps : decodes at least so many tokens a second on this CPU
    """

    size_bytes: int | None = None
    bpw: float | None = None
    max_kld: float | None = None
    max_ppl_ratio: float | None = None
    min_tps: float | None = None

    def __post_init__(self) -> None:
        limits: tuple[tuple[str, float | None, float], ...] = (
            ("--size", self.size_bytes, 0),
            ("--bpw", self.bpw, 0),
            ("--max-kld", self.max_kld, 0),
            ("--max-ppl-ratio", self.max_ppl_ratio, 1),
            ("--min-tps", self.min_tps, 0),
        )
        for flag, value, least in limits:
            if value is not None and not value > least:
                raise RecipeError(f"{flag}: got {value}, expected more than {least:g}.")

    @property
    def is_set(self) -> bool:
        """Whether anything is asked for."""
        return any(value is not None for value in vars(self).values())

    @property
    def is_divergence(self) -> bool:
        """Whether the divergence is given and the bytes are to be found."""
        return self.max_kld is not None or self.max_ppl_ratio is not None

    def scaled(self, factor: float) -> "Target":
        """Return the target with a divergence that is `factor` times as large."""
        kld, ratio = self.max_kld, self.max_ppl_ratio
        return dataclasses.replace(
            self,
            max_kld=None if kld is None else kld * factor,
            max_ppl_ratio=None if ratio is None else ratio**factor,
        )

    def share_of_divergence(self, kld: float, ppl_ratio: float) -> float:
        """Return how much of the allowed divergence is there; above 1 it is too much."""
        shares = [0.0]
        if self.max_kld is not None:
            shares.append(kld / self.max_kld)
        if self.max_ppl_ratio is not None:
            shares.append(math.log(max(ppl_ratio, 1.0)) / math.log(self.max_ppl_ratio))
        return max(shares)


@dataclass(frozen=True)
class Recipe:
    """One export.

    Attributes
    ----------
    model : HF directory, hub id or GGUF file
    out : the GGUF file to write
    preset : llama.cpp file type; which type every tensor gets, unless `plan` says it
    plan : a ``plan.json`` to follow
    target : what the file has to be; an allocator then chooses the types instead of `preset`
    allocator : registered name, with settings after a colon
    costs : estimator of the losses that the allocator sees, see ``edgeq.costing``
    speeds : of types on this CPU, for `target.min_tps`; None: by size alone
    types : that tensors may get, ``Q4_K,Q6_K``; None: all that llama.cpp runs well
    quantizer : registered name, with settings after a colon; ``auto`` chooses and verifies
    effort : of ``auto``, a name of ``EFFORTS``
    fisher, fisher_groups, sequential, asymmetric : see ``Method``; fisher None: the effort's
    output_feedback : see ``Method``; None: the effort's where `quantizer` is ``auto`` and rows are
        in no groups
    transform : ``fold``, ``none``, or ``auto``: fold where `quantizer` is ``auto``
    tune_steps : see ``Method``; None: the effort's where `quantizer` is ``auto``
    imatrix : a file to use instead of calibrating
    use_imatrix : False rounds without any calibration
    texts : what calibrates and what judges
    work : directory of intermediate artefacts; default beside `out`
    n_threads : None: every CPU
    jobs : processes of this machine that share the work; the bytes are the same
    cluster : address of a dask scheduler whose workers share the work; None: this machine
    cluster_data : what a task takes along, ``files`` or ``arrays``, see ``edgeq.cluster``
    split_max_bytes : write parts of at most so many bytes
    allow_requantize : accept a quantized GGUF as the reference
    allow_pickle : accept ``pytorch_model*.bin``, loaded with ``weights_only=True``
    prove : measure the file against the reference afterwards
    baseline : also quantize with llama.cpp itself at the same types and measure both
    modelfile : write Ollama's ``Modelfile`` beside `out`
    sign : private key that signs `out`, see ``edgeq.seals``
    label : what provenance calls the model, where `model` is a temporary directory
    """

    model: str
    out: Path
    preset: str = DEFAULT_PRESET
    plan: Path | None = None
    target: Target = Target()
    allocator: str = "knapsack"
    costs: str = DEFAULT_COSTS
    speeds: Path | None = None
    types: str | None = None
    quantizer: str = "auto"
    effort: str = "default"
    fisher: float | None = None
    fisher_groups: int = 1
    output_feedback: bool | None = None
    sequential: bool = True
    asymmetric: float = 0.0
    transform: str = "auto"
    tune_steps: int | None = None
    imatrix: Path | None = None
    use_imatrix: bool = True
    texts: TextChoice = TextChoice()
    work: Path | None = None
    n_threads: int | None = None
    jobs: int = 1
    cluster: str | None = None
    cluster_data: str = "files"
    split_max_bytes: int | None = None
    allow_requantize: bool = False
    allow_pickle: bool = False
    prove: bool = True
    baseline: bool = False
    modelfile: bool = False
    sign: Path | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and self.target.is_set:
            raise RecipeError("--plan says every type already; leave the target out, or the plan.")
        if self.imatrix is not None and not self.use_imatrix:
            raise RecipeError("--imatrix and --no-imatrix contradict each other; give one.")
        for flag, value, known in (
            ("--effort", self.effort, tuple(EFFORTS)),
            ("--transform", self.transform, ("auto", "fold", "none")),
        ):
            if value not in known:
                raise RecipeError(f"{flag}: got {value!r}, expected one of {', '.join(known)}.")
        for flag, strength in (("--fisher", self.fisher), ("--asymmetric", self.asymmetric)):
            if strength is not None and not 0 <= strength <= 1:
                raise RecipeError(f"{flag}: got {strength}, expected 0 to 1.")
        if self.jobs < 1:
            raise RecipeError(f"--jobs: got {self.jobs}, expected 1 or more.")
        if self.jobs > 1 and self.cluster is not None:
            raise RecipeError("--jobs, --cluster: a cluster's workers are its own. Give one.")
        if self.tune_steps is not None and self.tune_steps < 0:
            raise RecipeError(f"--tune: got {self.tune_steps} steps, expected 0 or more.")
        if self.output_feedback and not self.use_imatrix:
            raise RecipeError(
                "--output-feedback looks at gradients on calibration text: leave --no-imatrix out."
            )
        if self.tune_steps and not self.use_imatrix:
            raise RecipeError("--tune learns from calibration text: leave --no-imatrix out.")
        if self.fisher_groups < 1:
            raise RecipeError(f"--fisher-groups: got {self.fisher_groups}, expected 1 or more.")
        if self.fisher_groups > 1 and self.output_feedback:
            raise RecipeError(
                "--output-feedback: rows in groups (--fisher-groups) do not make up for each "
                "other's errors. Give one."
            )
        if self.asymmetric and not self.sequential:
            raise RecipeError(
                "--asymmetric makes up for the layers before: it needs --sequential. Give one."
            )
        if self.modelfile and self.split_max_bytes is not None:
            raise RecipeError(
                "--modelfile: Ollama loads one file, not parts. Leave --split-max-size out."
            )
        if self.out.suffix != ".gguf":
            raise RecipeError(f"{self.out}: the output is a GGUF file; name it *.gguf.")
        if not self.out.parent.is_dir():
            raise RecipeError(
                f"{self.out}: there is no directory {self.out.parent}. Make it first."
            )

    @property
    def work_directory(self) -> Path:
        """Where intermediate artefacts are kept."""
        return self.work if self.work is not None else self.out.with_suffix(".edgeq")

    @property
    def budget(self) -> Effort:
        """What ``auto`` may spend."""
        return EFFORTS[self.effort]

    @property
    def method(self) -> Method:
        """How tensors are rounded. Without calibration ``auto`` can only round to nearest."""
        is_auto = self.quantizer == "auto"
        if is_auto and not self.use_imatrix:
            return Method("rtn")
        steps = self.budget.tune_steps if is_auto else 0
        feeds_back = self.output_feedback
        if feeds_back is None:
            feeds_back = is_auto and self.budget.output_feedback and self.fisher_groups == 1
        folds = self.transform == "fold" or (self.transform == "auto" and is_auto)
        return Method(
            f"gptq:sweeps={self.budget.sweeps}" if is_auto else self.quantizer,
            self.budget.fisher if self.fisher is None else self.fisher,
            self.fisher_groups,
            feeds_back,
            self.sequential,
            self.budget.transforms if folds else (),
            self.asymmetric,
            steps if self.tune_steps is None else self.tune_steps,
            is_verified=is_auto,
        )

    @property
    def costs_quantizer(self) -> str:
        """What rounds in the costs: the quantizer; for auto the nearest, which is fast.

        Its costs rank types as gptq's do, see DECISIONS.md.
        """
        return "rtn" if self.quantizer == "auto" else self.quantizer

    def as_json(self) -> dict[str, Any]:
        """Return what shapes the bytes of the output, for its provenance."""
        # prove is not among them: it decides whether a part of the text is held out
        placing = {"out", "work", "n_threads", "jobs", "cluster", "cluster_data"}
        placing |= {"baseline", "allow_pickle", "modelfile", "sign", "label"}
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in placing}
        fields["model"] = self.label or self.model
        return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
