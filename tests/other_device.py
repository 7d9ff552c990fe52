"""A second device for torch on a machine without one: its tensors keep their values on the CPU.

torch knows the name ``lazy``, and no build of it computes there. An operation that meets tensors of
both devices is refused, as a GPU refuses it; copies, and numbers without an axis, may cross.
"""

from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "lazy"
_CROSSING = {"aten::_to_copy", "aten::copy_"}


class There(torch.Tensor):
    """A tensor of the other device."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=NAME,
        )

    def __init__(self, values):
        self.values_here = values

    def untyped_storage(self):
        return self.values_here.untyped_storage()

    def numpy(self):
        raise TypeError("can't convert a tensor of the other device to numpy")

    def tolist(self):
        return self.values_here.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


def _computed(func, args, kwargs):
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    is_there = any(isinstance(one, There) for one in tensors)
    name = func._schema.name
    if is_there and name not in _CROSSING:
        for one in tensors:
            if not isinstance(one, There) and one.ndim:
                raise RuntimeError(f"{name}: tensors on {NAME} and on cpu, {tuple(one.shape)}")
    here = {**kwargs}
    if kwargs.get("device") is not None:
        is_there = torch.device(kwargs["device"]).type == NAME
        here["device"] = "cpu" if is_there else kwargs["device"]
    unwrapped, here = tree_map_only(There, lambda one: one.values_here, (args, here))
    found = func(*unwrapped, **here)
    if func._schema.is_mutable and args and isinstance(found, torch.Tensor):
        return args[0]
    return tree_map_only(torch.Tensor, There, found) if is_there else found


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _computed(func, args, kwargs or {})


@contextmanager
def other_device():
    """While it is entered, torch computes on ``NAME`` too."""
    asked, made = torch.is_autocast_enabled, torch.tensor

    def is_autocast_enabled(name):  # torch refuses to tell of this one
        return name != NAME and asked(name)

    def tensor(data, *, dtype=None, device=None):  # made past all modes
        if device is None or torch.device(device).type != NAME:
            return made(data, dtype=dtype, device=device)
        return made(data, dtype=dtype, device="cpu").to(device)

    padding = "warn_if_padding_and_no_attention_mask"  # indexes by a list, past all modes
    with ExitStack() as stack:
        stack.enter_context(patch("torch.is_autocast_enabled", is_autocast_enabled))
        stack.enter_context(patch("torch.tensor", tensor))
        stack.enter_context(patch.object(transformers.PreTrainedModel, padding, lambda *_: None))
        stack.enter_context(_Mode())
        yield NAME
