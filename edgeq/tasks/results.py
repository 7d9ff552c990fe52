"""What tasks give for files: asked one file after the other, as JSON and as a table."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from edgeq.console import Steps, markdown_table
from edgeq.errors import EvaluationError
from edgeq.runtime.model import Model
from edgeq.runtime.vocabulary import vocabulary_digest
from edgeq.tasks.answering import OpenScore, prompts_of, write_answers
from edgeq.tasks.comparison import Comparison, Score, Share, accuracy, compare
from edgeq.tasks.items import Item, OpenItem, Task
from edgeq.tasks.scoring import score_tasks


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
    scores: Sequence[Score]
    reference_path: Path | None = None
    reference: Sequence[Score] | None = None

    @property
    def accuracy(self) -> Share:
        """Share of right answers."""
        return accuracy(self.scores)

    @property
    def comparison(self) -> Comparison | None:
        """Against the reference, if there is one."""
        return None if self.reference is None else compare(self.scores, self.reference)

    def as_json(self) -> dict[str, Any]:
        """Return JSON values.

        Answers are words in the items' order, written texts a list; `right` has 1 where right.
        """
        found = self.comparison
        comparison = None if found is None else dataclasses.asdict(found)
        return {
            "task": self.task.source,
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
            "groups": self.groups(),
        }

    def groups(self) -> dict[str, dict[str, int]]:
        """Return how many items of each group are right, and how the reference's are."""
        found: dict[str, dict[str, int]] = {}
        for i, (item, own) in enumerate(zip(self.task.items, self.scores, strict=True)):
            if isinstance(item, OpenItem) and item.group:
                counts = found.setdefault(item.group, {"n_items": 0, "right": 0})
                counts["n_items"] += 1
                counts["right"] += own.is_right
                if self.reference is not None:
                    other = self.reference[i]
                    names = {"reference_right": other.is_right, "same": own.answer == other.answer}
                    for name, is_so in names.items():
                        counts[name] = counts.get(name, 0) + is_so
        return found


def _answers(scores: Sequence[Score]) -> dict[str, Any]:
    right = "".join(str(int(score.is_right)) for score in scores)
    texts = [score.text for score in scores if isinstance(score, OpenScore)]
    chosen = [
        ",".join(map(str, score.answer)) for score in scores if not isinstance(score, OpenScore)
    ]
    answers = {"answers": " ".join(chosen)} if chosen else {}
    return {**answers, **({"texts": texts} if texts else {}), "right": right}


def ask(
    files: Mapping[str, Path],
    tasks: Sequence[Task],
    reference: Path | None,
    adapter: Path | None = None,
    *,
    n_threads: int | None,
    steps: Steps,
) -> tuple[TaskResult, ...]:
    """Ask files, by label and with a LoRA adapter if given, and their reference the same items.

    Raises
    ------
    EvaluationError
        A file has another vocabulary or chat template than the reference, or an item does not fit
        it.
    """
    for path in files.values():
        if reference is not None and _vocabulary(path) != _vocabulary(reference):
            raise EvaluationError(
                f"{reference}: has another vocabulary than {path}, expected the same tokens. "
                "Compare files of one model, or leave --reference out."
            )
    prompts = {path: prompts_of(path, tasks) for path in (*files.values(), reference) if path}
    for path in files.values():  # before anything takes time
        pairs = zip(prompts[path], prompts[reference or path], strict=True)
        if any(own.tolist() != other.tolist() for own, other in pairs):
            raise EvaluationError(
                f"{path}: its chat template makes other prompts than that of {reference}, expected "
                "the same. Ask without chat, or give both files one template."
            )

    def scores_of(path: Path, adapter: Path | None) -> list[list[Score]]:
        shared: dict[str, Any] = {"n_threads": n_threads, "adapter": adapter}
        with steps.step(f"tasks {path.name}") as progress:
            scores = score_tasks(path, tasks, progress=progress, **shared)
        with steps.step(f"tasks {path.name}") as progress:
            texts = write_answers(path, tasks, progress=progress, **shared)
        endings, written = chain.from_iterable(scores), chain.from_iterable(texts)
        return [
            [next(endings) if isinstance(item, Item) else next(written) for item in task.items]
            for task in tasks
        ]

    expected = [None] * len(tasks) if reference is None else scores_of(reference, None)
    found = {label: scores_of(path, adapter) for label, path in files.items()}
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
    found = [result.comparison for result in results]
    if any(each is not None for each in found):
        header += ["reference (95 %)", "same answer", "to wrong", "to right", "McNemar's p"]
    if any(each is not None and each.texts is not None for each in found):
        header += ["same text", "overlap"]
    rows = [_row(result, own) for result, own in zip(results, found, strict=True)]
    return markdown_table(header, [row + ["–"] * (len(header) - len(row)) for row in rows])


def _row(result: TaskResult, found: Comparison | None) -> list[str]:
    name = Path(result.task.source).name
    row = [name, result.label, f"{len(result.scores)}", _share(result.accuracy)]
    if found is not None:
        same = f"{100 * found.agreement.value:.2f} %"
        flips = [f"{found.to_wrong}", f"{found.to_right}"]
        row += [_share(found.reference), same, *flips, f"{found.p_value:.3g}"]
        if found.texts is not None:
            row += [f"{100 * found.texts.same.value:.2f} %", f"{found.texts.overlap:.3f}"]
    return row


def _share(share: Share) -> str:
    return f"{100 * share.value:.2f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
