"""Questions with a right answer, asked to GGUF files through llama.cpp.

``read_task`` reads a file of items, ``ask`` puts them to files and their reference, ``compare``
sets the answers of both against each other.
"""

from edgeq.tasks.comparison import Comparison, Share, compare, mcnemar, wilson
from edgeq.tasks.items import TASKS, Item, Record, Task, TaskFormat, choose, read_task
from edgeq.tasks.results import TaskResult, ask, tasks_table
from edgeq.tasks.scoring import ItemScore, score, score_tasks

__all__ = [
    "TASKS",
    "Comparison",
    "Item",
    "ItemScore",
    "Record",
    "Share",
    "Task",
    "TaskFormat",
    "TaskResult",
    "ask",
    "choose",
    "compare",
    "mcnemar",
    "read_task",
    "score",
    "score_tasks",
    "tasks_table",
    "wilson",
]
