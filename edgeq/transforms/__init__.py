"""What keeps a model's function and makes it round better: scales that move, bases that turn.

``fold_sites`` says where one GGUF file allows it, ``search_scales`` whether and how strongly it
pays with the quantizer that is exported, ``tensor_scales`` what becomes of each tensor, and
``check_preserved`` proves through llama.cpp that the float model's function is the same.
``write_rotated`` turns the basis of the residual stream and of the heads' values,
``write_key_folded`` scales keys against queries for a quantized cache.
"""

from edgeq.transforms.keys import write_key_folded
from edgeq.transforms.loss import QuantizerLoss
from edgeq.transforms.proof import check_preserved, write_folded
from edgeq.transforms.rotation import KINDS as ROTATIONS
from edgeq.transforms.rotation import write_rotated
from edgeq.transforms.scales import (
    FoldedHessian,
    TensorScales,
    apply,
    fold_hessian,
    fold_importances,
    fold_outputs,
    nearest_powers_of_two,
    tensor_scales,
    unfold,
)
from edgeq.transforms.search import METHODS, SiteChoice, search_scales
from edgeq.transforms.sites import FoldSite, fold_sites

__all__ = [
    "METHODS",
    "ROTATIONS",
    "FoldSite",
    "FoldedHessian",
    "QuantizerLoss",
    "SiteChoice",
    "TensorScales",
    "apply",
    "check_preserved",
    "fold_hessian",
    "fold_importances",
    "fold_outputs",
    "fold_sites",
    "nearest_powers_of_two",
    "search_scales",
    "tensor_scales",
    "unfold",
    "write_folded",
    "write_key_folded",
    "write_rotated",
]
