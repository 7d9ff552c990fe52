"""Where two files part: what they write after the same prompts, and weights nobody rounded.

``diff`` puts prompts to two sides, each a file with a type of KV cache; ``screen`` looks for
tensors of a file that its float source does not explain.
"""

from edgeq.differing.decoding import Side
from edgeq.differing.diffing import Outcome, diff
from edgeq.differing.prompts import REFUSALS, Prompt, read_prompts
from edgeq.differing.results import Difference, Found
from edgeq.differing.screen import Screen, TensorScreen, screen

__all__ = [
    "REFUSALS",
    "Difference",
    "Found",
    "Outcome",
    "Prompt",
    "Screen",
    "Side",
    "TensorScreen",
    "diff",
    "read_prompts",
    "screen",
]
