"""Work in other processes: the same bytes, whoever is killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from converters.gguf_file import open_gguf
from edgeq.calibration.moments import Moments
from edgeq.errors import CalibrationError
from edgeq.execution import ExecutionError, Here, Processes, in_order
from tests import worker_tasks
from tests.command_line import done, refused

ROOT = Path(__file__).parents[1]
RECIPE = ("--type", "Q4_0", "--quantizer", "gptq:sweeps=1", "--transform", "fold", "--fisher", 0)
SHORT = ("--ctx", 64, "--chunks", 8, "--eval-chunks", 16)


@pytest.fixture
def processes(tmp_path):
    with Processes(2, tmp_path / "shared", n_threads=2) as made:
        yield made


# ------------------------------------------------------------------------ processes of this machine


def test_results_come_in_the_order_of_the_tasks_from_several_processes(processes):
    found = in_order(processes, worker_tasks.squared, range(20))
    assert [square for square, _ in found] == [n * n for n in range(20)]
    makers = {maker for _, maker in found}
    assert len(makers) == 2
    assert os.getpid() not in makers


def test_threads_are_shared_out(tmp_path):
    with Processes(2, tmp_path / "shared", n_threads=4) as made:
        assert in_order(made, worker_tasks.limits, [None]) == [("2", 2)]


def test_what_a_task_refuses_is_raised_here(processes):
    with pytest.raises(CalibrationError, match="tensor 3: cannot be rounded"):
        in_order(processes, worker_tasks.refuse, [3])


def test_a_killed_worker_is_replaced_and_its_task_repeated(processes, tmp_path):
    markers = [tmp_path / f"{number}" for number in range(3)]
    assert in_order(processes, worker_tasks.die_once, markers) == ["done"] * 3


def test_a_task_that_kills_every_worker_ends_in_one_line(processes):
    with pytest.raises(ExecutionError, match="--jobs 2: worker processes died 3 times"):
        in_order(processes, worker_tasks.die, [None])


def test_workers_end_with_the_process_that_started_them(tmp_path):
    code = (
        "from edgeq.execution import Processes, in_order\n"
        "from tests import worker_tasks\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        f"    with Processes(2, Path({str(tmp_path / 'shared')!r})) as made:\n"
        f"        in_order(made, worker_tasks.wait_for, [Path({str(tmp_path / 'at')!r})] * 2)\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], env=environment) as parent:
        workers = _until(lambda: [int(p.suffix[1:]) for p in tmp_path.glob("at.*")], 2)
        parent.kill()
    _until(lambda: [pid for pid in workers if not _is_running(pid)], 2)


@pytest.mark.parametrize("executor", ["here", "processes"])
def test_shared_arrays_arrive_and_nothing_is_left(executor, processes, tmp_path):
    made = Here() if executor == "here" else processes
    first = Moments(np.arange(4.0, dtype=np.float32).reshape(1, 2, 2))
    second = Moments(first.hessian + 1, mean=np.ones((1, 2), np.float32))
    with made.sharing({"a": first, "b": first, "c": second}) as shared:
        assert len(list(tmp_path.glob("shared/*"))) == (0 if executor == "here" else 3)
        for name, wanted in (("a", first), ("b", first), ("c", second)):
            found = shared[name].get()
            np.testing.assert_array_equal(found.hessian, wanted.hessian)
            assert (found.mean is None) == (wanted.mean is None)
            assert found.cross is None
    assert not (tmp_path / "shared").exists()


def test_a_part_of_a_file_reads_the_same_where_it_lies_and_in_memory(tiny):
    file = open_gguf(tiny)
    names = ["blk.0.attn_q.weight", "output_norm.weight"]
    for part in (file.only(names), file.held(names)):
        assert list(part.tensors) == names
        for name in names:
            np.testing.assert_array_equal(part.read_float(name), file.read_float(name))


# --------------------------------------------------------------------------------------- an export


@pytest.fixture(scope="module")
def alone(tiny, texts, tmp_path_factory):
    """The file, report and plan's evaluation of one process."""
    out = tmp_path_factory.mktemp("alone") / "m.gguf"
    report = done("export", tiny, out, "--text", texts[0], *RECIPE, *SHORT, "--json").json()
    return out.read_bytes(), report


def _evaluated(report):
    evaluation = report["files"][0]["evaluation"]
    return {key: evaluation[key] for key in ("summary", "tokens", "tokens_sha256", "n_chunks")}


def test_an_export_with_jobs_is_the_same_file_and_the_same_figures(alone, tiny, texts, tmp_path):
    command = ("export", tiny, tmp_path / "m.gguf", "--text", texts[0], *RECIPE, *SHORT)
    report = done(*command, "--jobs", 2, "--json").json()
    assert (tmp_path / "m.gguf").read_bytes() == alone[0]
    assert _evaluated(report) == _evaluated(alone[1])
    assert not (tmp_path / "m.edgeq" / "shared").exists()


def test_measured_costs_with_jobs_are_the_same(tiny, texts, tmp_path):
    plans = []
    for jobs in (1, 2):
        out = tmp_path / f"{jobs}.json"
        flags = ("--size", "90K", "--costs", "measured", "--types", "Q4_0,Q8_0", "--jobs", jobs)
        done("plan", tiny, "-o", out, "--text", texts[0], "--ctx", 64, "--chunks", 8, *flags)
        (costs,) = tmp_path.glob(f"{jobs}.edgeq/costs-measured.json")
        plans.append((out.read_text("utf-8"), costs.read_text("utf-8")))
    assert plans[0] == plans[1]


def test_jobs_and_cluster_contradict_each_other(tiny, tmp_path):
    message = refused("export", tiny, tmp_path / "m.gguf", "--jobs", 2, "--cluster", "tcp://x:1")
    assert "--jobs, --cluster: a cluster's workers are its own" in message
    assert "expected 1 or more" in refused("export", tiny, tmp_path / "m.gguf", "--jobs", 0)


# ---------------------------------------------------------------------------------------- a cluster


def _until(found, count, seconds=60):
    """Return ``found()`` as soon as it has so many entries."""
    end = time.monotonic() + seconds
    while len(there := list(found())) < count:
        assert time.monotonic() < end, there
        time.sleep(0.05)
    return there


def _is_running(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return False
    return "Z (zombie)" not in status


class _Dask:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, stack, directory):
        self.stack = stack
        self.directory = directory
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"tcp://127.0.0.1:{self.port}"
        self.scheduler = None
        self.workers = []

    def start_scheduler(self):
        self.scheduler = self._start(
            "dask_scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard"
        )

    def start_worker(self, *flags):
        flags = flags or ("--nthreads", "1")
        worker = self._start("dask_worker", self.url, "--no-nanny", "--no-dashboard", *flags)
        self.workers.append(worker)
        return worker

    def _start(self, program, *flags):
        command = [sys.executable, "-m", f"distributed.cli.{program}", *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        log = (self.directory / f"{program}.log").open("a")
        process = subprocess.Popen(
            command, env=environment, cwd=self.directory, stdout=log, stderr=log
        )
        self.stack.callback(log.close)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process


@pytest.fixture
def dask(tmp_path):
    pytest.importorskip("distributed")
    with ExitStack() as stack:
        (tmp_path / "dask").mkdir()
        yield _Dask(stack, tmp_path / "dask")


@contextmanager
def _cluster(dask, tmp_path, *, n_workers, data="files"):
    from edgeq.cluster import Cluster

    end = time.monotonic() + 60
    while True:
        try:
            made = Cluster(dask.url, tmp_path / "shared", data)
            if made.n_workers >= n_workers:
                break
            made.__exit__()
        except ExecutionError:
            assert time.monotonic() < end
        time.sleep(0.2)
    with made:
        yield made


@pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")
@pytest.mark.parametrize("data", ["files", "arrays"])
def test_an_export_on_a_cluster_is_the_same_file(data, alone, dask, tiny, texts, tmp_path):
    dask.start_scheduler()
    dask.start_worker()
    with _cluster(dask, tmp_path, n_workers=1):
        pass
    command = ("export", tiny, tmp_path / "m.gguf", "--text", texts[0], *RECIPE, *SHORT)
    report = done(*command, "--cluster", dask.url, "--cluster-data", data, "--json").json()
    assert (tmp_path / "m.gguf").read_bytes() == alone[0]
    assert _evaluated(report) == _evaluated(alone[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")
def test_a_killed_worker_a_late_one_and_a_restarted_scheduler_lose_nothing(dask, tmp_path):
    dask.start_scheduler()
    first = dask.start_worker()
    marker = tmp_path / "at"
    with _cluster(dask, tmp_path, n_workers=1) as cluster:
        found = []
        thread = threading.Thread(
            target=lambda: found.extend(in_order(cluster, worker_tasks.wait_for, [marker] * 2))
        )
        thread.start()
        _until(lambda: tmp_path.glob("at.*"), 1)
        late = dask.start_worker()
        first.send_signal(signal.SIGKILL)
        _until(lambda: tmp_path.glob("at.*"), 2)
        dask.scheduler.send_signal(signal.SIGKILL)
        dask.scheduler.wait()
        dask.start_scheduler()
        third = dask.start_worker()
        marker.with_suffix(".go").touch()
        thread.join(60)
    assert len(found) == 2
    assert set(found) <= {late.pid, third.pid}


def test_what_is_wrong_with_a_cluster_is_one_line(dask, tiny, texts, tmp_path):
    command = ("export", tiny, tmp_path / "m.gguf", "--text", texts[0], *RECIPE, *SHORT)
    message = refused(*command, "--cluster", dask.url)
    assert re.search(r"--cluster tcp://127.0.0.1:\d+: no scheduler answers", message)
    dask.start_scheduler()
    _until(lambda: [1] if "no workers" in refused(*command, "--cluster", dask.url) else [], 1)
    dask.start_worker("--nthreads", "2")
    _until(
        lambda: [1] if "2 threads, expected 1" in refused(*command, "--cluster", dask.url) else [],
        1,
    )
    assert not (tmp_path / "m.gguf").exists()
