"""Speed on this CPU: products by type, and whole files, our kernels beside llama.cpp.

Whatever is compared is timed in turn, again and again, so that a drift of the machine hits all
alike; ratios are those of medians. Weights are larger than the caches, as a model's are.
"""

from edgeq.benchmarks.files import FileBench, FileSpeed, bench_file
from edgeq.benchmarks.types import TypesBench, TypeSpeed, bench_types, write_speeds
from edgeq.results import BENCH_SCHEMA as SCHEMA

__all__ = [
    "SCHEMA",
    "FileBench",
    "FileSpeed",
    "TypeSpeed",
    "TypesBench",
    "bench_file",
    "bench_types",
    "write_speeds",
]
