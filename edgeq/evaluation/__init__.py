"""How far a file is from its reference, measured through llama.cpp: the one judge of edgeq.

``evaluate`` runs the pass and gives an ``Evaluation`` with per-token values; ``compare`` sets two
of them against each other; ``store_reference`` writes a reference once for many files;
``measure_speed`` counts tokens a second.
"""

from edgeq.evaluation.compare import Comparison, compare
from edgeq.evaluation.evaluate import Evaluation, evaluate
from edgeq.evaluation.speed import Speed, measure_speed, measure_speeds
from edgeq.evaluation.statistics import Estimate, Summary
from edgeq.evaluation.store import StoredReference, store_reference

__all__ = [
    "Comparison",
    "Estimate",
    "Evaluation",
    "Speed",
    "StoredReference",
    "Summary",
    "compare",
    "evaluate",
    "measure_speed",
    "measure_speeds",
    "store_reference",
]
