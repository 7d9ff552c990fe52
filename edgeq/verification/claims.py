"""What a file says about itself, and what is said of its tensors."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.gguf_file import GgufFile
from edgeq.errors import EvaluationError

IDENTICAL, CONSISTENT, DIFFERS, UNKNOWN = "identical", "consistent", "differs", "not shown"


@dataclass(frozen=True)
class Verdict:
    """One tensor: ``identical``, ``consistent``, ``differs`` or ``not shown``, and why."""

    name: str
    qtype: str
    verdict: str
    why: str


@dataclass(frozen=True, eq=False)
class Claim:
    """What the metadata says."""

    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    method: Mapping[str, Any]
    texts: Mapping[str, Any]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, file: GgufFile) -> "Claim":
        """Read it.

        Raises
        ------
        EvaluationError
            edgeq did not write the file, or another version of it.
        """
        found = {}
        for key in ("source", "recipe", "method", "texts", "versions"):
            try:
                found[key] = json.loads(file.value(f"edgeq.{key}", ""))
                found[key].keys()
            except (TypeError, ValueError, AttributeError) as error:
                raise EvaluationError(
                    f"{file.path}: edgeq.{key} is missing or broken: edgeq did not write this "
                    "file. Use edgeq diff --screen for files of others."
                ) from error
        try:
            claim = cls(**found)
            claim.source["sha256"], claim.folds, claim.is_exact, claim.preset
        except (KeyError, TypeError) as error:
            raise EvaluationError(
                f"{file.path}: edgeq.*: {error} is missing. Another version of edgeq wrote it."
            ) from error
        return claim

    @property
    def folds(self) -> bool:
        """Whether weights may be folded."""
        return bool(self.method["transforms"])

    @property
    def is_tuned(self) -> bool:
        """Whether scales and norms may be tuned."""
        return bool(self.method["tune_steps"])

    @property
    def is_exact(self) -> bool:
        """Whether the bytes depend on nothing but the weights and an imatrix."""
        return str(self.method["quantizer"]) == "rtn" and not self.folds and not self.is_tuned

    @property
    def feeds_rows(self) -> bool:
        """Whether rows were moved for the errors of others."""
        return bool(self.method.get("output_feedback"))

    @property
    def uses_imatrix(self) -> bool:
        """Whether anything was calibrated."""
        return bool(self.recipe["use_imatrix"])

    @property
    def preset(self) -> str | None:
        """llama.cpp's mix that gave the types; None: a plan or an allocator did."""
        limits = self.recipe["target"].values()
        is_free = self.recipe["plan"] is not None or any(v is not None for v in limits)
        return None if is_free else str(self.recipe["preset"])
