"""What is installed, what of it works, and what is missing for which feature: ``edgeq doctor``.

Needs only click: everything that could be missing or broken is tried in a process of its own.
"""

import contextlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeq.variables import VARIABLES, set_variables, unknown_variables

FEATURES = {
    "": "everything",
    "torch": "exact float passes and gradients, pickle checkpoints, qat, models in memory",
    "hub": "MODEL as a hub id",
    "rl": "--allocator ramp",
    "eval": "lm-evaluation-harness's tasks: python -m edgeq.harness",
    "cluster": "--cluster",
    "docs": "building the documentation",
    "sign": "export --sign, verify --public-key",
}
"""Extra to what it is for; the extra "" is edgeq itself. An extra that is not here is edgeq's
developers' own."""

_MODULES = {"llama-cpp-python": "llama_cpp"}  # others: the distribution's name
_PROBE_S = 120.0
_NEEDED = re.compile(r"([\w.-]+)(?:\[[\w,\s-]+\])?\s*([^;]*?)\s*(?:;\s*(.*))?")
_LIMIT = re.compile(r"(>=|<=|==|!=|<|>)\s*([\w.+]+)")
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")


@dataclass(frozen=True)
class Dependency:
    """A distribution that edgeq, or an extra of it, asks for.

    Attributes
    ----------
    extra : "" for edgeq itself
    asked : limits of its version, as the metadata has them
    installed : version; None: it is not there
    problem : why it will not do; "": it does, as far as it was tried
    """

    name: str
    extra: str
    asked: str
    installed: str | None
    problem: str = ""


@dataclass(frozen=True)
class Doctor:
    """The result of ``edgeq doctor``.

    Attributes
    ----------
    kernels, runtime, devices : what the probes found; ``{"problem": LINE}`` where one failed
    machine : CPUs, memory and disks; bytes
    variables : of edgeq's that are set, name to value
    problems : what keeps edgeq itself from working
    missing : extra that lacks something to what it lacks
    warnings : what works, but not as somebody may think
    """

    dependencies: tuple[Dependency, ...]
    kernels: dict[str, Any]
    runtime: dict[str, Any]
    devices: dict[str, Any]
    machine: dict[str, Any]
    variables: dict[str, str]
    problems: tuple[str, ...] = ()
    missing: dict[str, tuple[str, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "works": not self.problems,
            "problems": list(self.problems),
            "missing": {extra: list(names) for extra, names in self.missing.items()},
            "warnings": list(self.warnings),
            "dependencies": [vars(one) for one in self.dependencies],
            "kernels": self.kernels,
            "runtime": self.runtime,
            "torch": self.devices,
            "machine": self.machine,
            "variables": self.variables,
        }

    def as_text(self) -> str:
        """Return what a terminal shows."""
        lines = []
        for extra, what in FEATURES.items():
            own = [one for one in self.dependencies if one.extra == extra]
            if own:
                lines += [f"{'edgeq' if not extra else f'edgeq[{extra}]'}: {what}"]
                lines += [
                    f"  {'ok' if not one.problem else '--':<3}{one.name:<20}"
                    f"{one.installed or 'not installed':<16}{one.asked or 'any'}"
                    + (f"  ({one.problem})" if one.installed and one.problem else "")
                    for one in own
                ]
        lines += ["", *self._machine_lines(), ""]
        lines += [f"not available, {FEATURES[e]}: {_install(e)}" for e in self.missing if e]
        lines += [f"note: {line}" for line in self.warnings]
        lines += [f"problem: {line}" for line in self.problems]
        return "\n".join([*lines, "" if self.problems else "The core works."]).strip()

    def _machine_lines(self) -> list[str]:
        machine = self.machine
        gib = 1 << 30
        kernels = self.kernels.get("problem") or (
            f"{self.kernels['in_use']} in use, of {', '.join(self.kernels['available'])}"
        )
        cache = "" if "cache" not in self.kernels else self.kernels["cache"]
        runtime = self.runtime.get("problem") or ", ".join(self.runtime["features"])
        gpus = self.devices.get("problem") or ", ".join(self.devices["gpus"]) or "none"
        rows = [
            ("Python", machine["python"]),
            ("CPUs", f"{machine['cpus']:g} of {machine['cpus_of_machine']} for this process"),
            ("free memory", f"{machine['free_memory_bytes'] / gib:.1f} GiB"),
            *(
                (f"free, {what}", f"{one['free_bytes'] / gib:.1f} GiB at {one['path']}")
                for what, one in machine["disks"].items()
            ),
            ("instructions", kernels),
            ("numba's cache", cache or "not known"),
            ("llama.cpp", runtime),
            ("GPUs of torch", gpus),
            *((name, value) for name, value in self.variables.items()),
        ]
        return [f"{name:<17}{value}" for name, value in rows]


def examine(work: Path) -> Doctor:
    """Look at everything.

    Parameters
    ----------
    work : where intermediate results would go; need not exist
    """
    problems: list[str] = []
    try:
        found = list(_dependencies())
    except metadata.PackageNotFoundError:
        found = []
        problems.append("edgeq: is not installed, only its files are there. pip install .")
    modules = [
        _module(one.name)
        for one in found
        if one.installed and (not one.extra or one.name == "torch")
    ]
    has_torch = "torch" in modules
    with ThreadPoolExecutor(4) as pool:  # each waits for a process
        imports = pool.submit(_try_modules, modules)
        torch = pool.submit(_probe, "devices") if has_torch else None
        asked = [pool.submit(_probe, name) for name in ("instructions", "runtime")]
        tried, (kernels, runtime) = imports.result(), (one.result() for one in asked)
        devices = {"problem": "torch is not installed"} if torch is None else torch.result()
    dependencies = tuple(_judged(one, tried) for one in found)
    problems += [_complaint(one) for one in dependencies if not one.extra and one.problem]
    unfit = {one.name for one in dependencies if one.problem}
    for what, told in (("kernels", kernels), ("llama-cpp-python", runtime)):
        library = {"kernels": "numba"}.get(what, what)
        if "problem" in told and library not in unfit:  # told once
            problems.append(f"{what}: {told['problem']}")
    warnings = list(unknown_variables().values())
    if kernels.get("cache_is_writable") is False:
        warnings.append(
            f"numba's cache {kernels['cache']} cannot be written: every process compiles its "
            "kernels anew. Set NUMBA_CACHE_DIR."
        )
    missing: dict[str, tuple[str, ...]] = {}
    for one in dependencies:
        if one.problem:
            missing[one.extra] = (*missing.get(one.extra, ()), one.name)
    return Doctor(
        dependencies,
        kernels,
        runtime,
        devices,
        _machine(work, kernels.get("cache")),
        {n: v + ("" if n in VARIABLES else " (unknown)") for n, v in set_variables().items()},
        tuple(problems),
        missing,
        tuple(warnings),
    )


def _complaint(one: Dependency) -> str:
    if one.installed is None:
        return f"{one.name}: is not installed. pip install '{one.name}{one.asked}'"
    return f"{one.name} {one.installed}: {one.problem}. pip install '{one.name}{one.asked}'"


def _install(extra: str) -> str:
    return f"pip install 'edgeq[{extra}]'"


# ------------------------------------------------------------------------------------ distributions


def _dependencies() -> list[Dependency]:
    out = []
    for line in metadata.requires("edgeq") or ():
        match = _NEEDED.fullmatch(line)
        if match is None:  # a form that edgeq's own metadata does not have
            continue
        name, asked, marker = match[1], match[2].strip("() "), match[3] or ""
        extra = _EXTRA.search(marker)
        if (extra[1] if extra else "") in FEATURES and name != "edgeq":
            out.append(Dependency(name, extra[1] if extra else "", asked, _version(name)))
    return sorted(out, key=lambda one: (list(FEATURES).index(one.extra), one.name))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(version: str, asked: str) -> bool:
    """Return whether a version is within limits such as ``>=5,<6``; releases alone count."""
    compared = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    return all(compared[sign](*_aligned(version, limit)) for sign, limit in _LIMIT.findall(asked))


def _aligned(*versions: str) -> list[list[int]]:
    """Return the numbers of releases, filled up with zeros to one length."""
    numbers = [[int(n) for n in re.findall(r"\d+", re.split(r"[+a-z]", v)[0])] for v in versions]
    length = max(map(len, numbers))
    return [one + [0] * (length - len(one)) for one in numbers]


def _module(name: str) -> str:
    return _MODULES.get(name, name.replace("-", "_"))


def _judged(one: Dependency, tried: Mapping[str, str]) -> Dependency:
    problem = tried.get(_module(one.name), "")
    if one.installed is None:
        problem = "not installed"
    elif problem:
        problem = f"cannot be imported ({problem})"
    elif not fits(one.installed, one.asked):
        problem = f"expected {one.asked}"
    return Dependency(one.name, one.extra, one.asked, one.installed, problem)


# ------------------------------------------------------------------------------------------- probes


def _try_modules(names: Sequence[str]) -> dict[str, str]:
    """Import modules in one process; where that ends, one by one, to find the one that ends it."""
    told = _probe("modules", *names)
    if "problem" not in told:
        return told
    out = {}
    for name in names:
        one = _probe("modules", name)
        out[name] = str(one["problem"] if "problem" in one else one[name])
    return out


def _probe(*arguments: str) -> dict[str, Any]:
    """Run a probe; ``{"problem": LINE}`` if it fails."""
    command = [sys.executable, "-m", "edgeq.doctor_probes", *arguments]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S)
    except subprocess.TimeoutExpired:
        return {"problem": f"took more than {_PROBE_S:.0f} s"}
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return {"problem": f"ends the process with {name}; it was built for another CPU?"}
    if ended.returncode:
        return {"problem": (ended.stderr.strip().splitlines() or ["no word"])[-1]}
    told: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return told


# ------------------------------------------------------------------------------------------ machine


def _machine(work: Path, cache: str | None) -> dict[str, Any]:
    disks = {"work": work, "temporary": Path(tempfile.gettempdir())}
    if cache is not None:
        disks["cache"] = Path(cache)
    return {
        "python": f"{platform.python_version()}, {platform.platform()}",
        "cpus": _cpus(),
        "cpus_of_machine": os.cpu_count() or 1,
        "free_memory_bytes": _free_memory(),
        "disks": {what: _disk(path) for what, path in disks.items()},
    }


def _disk(path: Path) -> dict[str, Any]:
    there = path.absolute()
    while not there.exists() and there.parent != there:
        there = there.parent
    return {"path": str(path.absolute()), "free_bytes": shutil.disk_usage(there).free}


def _cpus() -> float:
    """Return the CPUs that this process may use: its affinity, and the quota of its cgroup."""
    n_cpus = float(os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        n_cpus = float(len(os.sched_getaffinity(0)))
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return min(n_cpus, int(quota) / int(period)) if quota.isdigit() else n_cpus


def _free_memory() -> int:
    """Return what the machine has free, and the limit of the cgroup leaves; bytes."""
    free = 0
    with contextlib.suppress(OSError):
        told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        free = 1024 * int(told[1]) if told else 0
    if not free and hasattr(os, "sysconf"):
        with contextlib.suppress(ValueError):  # no such figure here
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _cgroup(name: str) -> str:
    """Return a file of this process's cgroup (version 2); "" if there is none."""
    with contextlib.suppress(OSError):
        own = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        for place in (f"/sys/fs/cgroup{own[1] if own else ''}", "/sys/fs/cgroup"):
            if (path := Path(place, name)).is_file():
                return path.read_text().strip()
    return ""
