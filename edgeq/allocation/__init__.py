"""Which type every tensor gets: the plan, its file, and the allocators that make one."""

from edgeq.allocation.plan import Plan, PlanEntry, overrides, read_plan, write_tensor_type_file
from edgeq.allocation.preset import allocate

__all__ = ["Plan", "PlanEntry", "allocate", "overrides", "read_plan", "write_tensor_type_file"]
