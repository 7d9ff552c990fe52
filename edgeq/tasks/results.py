"""What tasks give for files: asked one file after the other, as JSON and as a table."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeq.console import Steps, markdown_table
from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model
from edgeq.runtime.vocabulary import vocabulary_digest
from edgeq.tasks.comparison import Comparison, Share, accuracy, compare
from edgeq.tasks.items import Task
from edgeq.tasks.scoring import ItemScore, score_tasks


@dataclass(frozen=True)
class TaskResult:
    """One task, asked to one file.

    Attributes
    ----------
    label, path : the file
    scores : one for each item
    reference_path, reference : what it is compared with, and its scores on the same items
    """

    label: str
    path: Path
    task: Task
    scores: Sequence[ItemScore]
    reference_path: Path | None = None
    reference: Sequence[ItemScore] | None = None

    @property
    def accuracy(self) -> Share:
        """Share of right answers."""
        return accuracy(self.scores)

    @property
    def comparison(self) -> Comparison | None:
        """Against the reference, if there is one."""
        return None if self.reference is None else compare(self.scores, self.reference)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; the items' answers as words, in order, with 1 where right."""
        found = self.comparison
        comparison = None if found is None else dataclasses.asdict(found)
        return {
            "task": str(self.task.path),
            "kind": self.task.kind,
            "n_items": len(self.scores),
            "items_sha256": self.task.items_sha256,
            "file": self.label,
            "path": str(self.path),
            "accuracy": dataclasses.asdict(self.accuracy),
            **_answers(self.scores),
            "reference": None
            if self.reference is None or comparison is None
            else {
                "path": str(self.reference_path),
                "accuracy": comparison.pop("reference"),
                **_answers(self.reference),
            },
            "comparison": comparison,
        }


def _answers(scores: Sequence[ItemScore]) -> dict[str, str]:
    return {
        "answers": " ".join(",".join(map(str, score.answer)) for score in scores),
        "right": "".join(str(int(score.is_right)) for score in scores),
    }


def ask(
    files: Mapping[str, Path],
    tasks: Sequence[Task],
    reference: Path | None,
    *,
    n_threads: int | None,
    steps: Steps,
) -> tuple[TaskResult, ...]:
    """Ask files, by label, and their reference the same items.

    Raises
    ------
    EvaluationError
        A file has another vocabulary than the reference, or an item does not fit it.
    """
    for path in files.values():
        if reference is not None and _vocabulary(path) != _vocabulary(reference):
            raise EvaluationError(
                f"{reference}: has another vocabulary than {path}, expected the same tokens. "
                "Compare files of one model, or leave --reference out."
            )

    def scores_of(path: Path) -> list[list[ItemScore]]:
        with steps.step(f"tasks {path.name}") as progress:
            return score_tasks(path, tasks, n_threads=n_threads, progress=progress)

    expected = [None] * len(tasks) if reference is None else scores_of(reference)
    found = {label: scores_of(path) for label, path in files.items()}
    return tuple(
        TaskResult(label, path, task, found[label][i], reference, expected[i])
        for i, task in enumerate(tasks)
        for label, path in files.items()
    )


def _vocabulary(path: Path) -> str:
    with Model(path, vocab_only=True) as model:
        return vocabulary_digest(model)


def tasks_table(results: Sequence[TaskResult]) -> str:
    """Return the table of tasks: accuracy, and what changed against the reference."""
    header = ["task", "file", "items", "accuracy (95 %)"]
    compared = any(result.reference is not None for result in results)
    if compared:
        header += ["reference (95 %)", "same answer", "to wrong", "to right", "McNemar's p"]
    return markdown_table(header, [_row(result, compared) for result in results])


def _row(result: TaskResult, compared: bool) -> list[str]:
    row = [result.task.path.name, result.label, f"{len(result.scores)}", _share(result.accuracy)]
    found = result.comparison
    if found is not None:
        same = f"{100 * found.agreement.value:.2f} %"
        flips = [f"{found.to_wrong}", f"{found.to_right}"]
        row += [_share(found.reference), same, *flips, f"{found.p_value:.3g}"]
    return row + ["–"] * (5 if compared and found is None else 0)


def _share(share: Share) -> str:
    return f"{100 * share.value:.2f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
