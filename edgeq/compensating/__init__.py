"""A low-rank correction of a quantized file's remaining error, as a LoRA adapter beside it.

``low_rank`` has the optimum and the choice of ranks, ``adapter`` the file that llama.cpp reads,
``making`` the command: it makes the adapter and measures what it is worth.
"""

from edgeq.compensating.adapter import Pair, write_adapter
from edgeq.compensating.making import compensate
from edgeq.compensating.results import Compensated, Spending

__all__ = ["Compensated", "Pair", "Spending", "compensate", "write_adapter"]
