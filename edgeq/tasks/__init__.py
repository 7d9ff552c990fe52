"""Questions with a right answer, asked to GGUF files through llama.cpp.

``read_tasks`` reads files of items and makes those of suites, ``ask`` puts them to files and their
reference, ``compare`` sets the answers of both against each other.
"""

from edgeq.tasks.answering import OpenScore, write_answers
from edgeq.tasks.comparison import (
    Comparison,
    Share,
    TextAgreement,
    compare,
    mcnemar,
    overlap,
    wilson,
)
from edgeq.tasks.items import (
    TASKS,
    Item,
    OpenItem,
    Record,
    Suite,
    SuitePart,
    Task,
    TaskFormat,
    choose,
    read_task,
)
from edgeq.tasks.matching import MATCHES
from edgeq.tasks.results import TaskResult, ask, tasks_table
from edgeq.tasks.scoring import ItemScore, score, score_tasks
from edgeq.tasks.suites import read_tasks

__all__ = [
    "MATCHES",
    "TASKS",
    "Comparison",
    "Item",
    "ItemScore",
    "OpenItem",
    "OpenScore",
    "Record",
    "Share",
    "Suite",
    "SuitePart",
    "Task",
    "TaskFormat",
    "TaskResult",
    "TextAgreement",
    "ask",
    "choose",
    "compare",
    "mcnemar",
    "overlap",
    "read_task",
    "read_tasks",
    "score",
    "score_tasks",
    "tasks_table",
    "wilson",
    "write_answers",
]
