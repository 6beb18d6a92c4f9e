"""One store, several processes and threads, some of which are killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import toys

from workbench.store import Store

TESTS = Path(__file__).parent

WRITER = """
import sys; sys.path.insert(0, {tests!r})
import numpy, toys
from workbench.store import Store
store = Store({folder!r})
readings = [toys.Trace(vectors=5000).report(numpy.full(n, 1.0), 5000) for n in (40000, 30000)]
print("ready", flush=True)
for turn in range({turns}):
    for reading in readings:
        store.save(reading, "%032x" % ({start} + turn % 5))
print("done", flush=True)
"""


def writer(folder: Path, turns: int, start: int = 0) -> subprocess.Popen[str]:
    code = WRITER.format(tests=str(TESTS), folder=str(folder), turns=turns, start=start)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_writer_killed_at_any_moment_leaves_no_half_file_in_sight(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "readings"
    process = writer(folder, 10**6)
    while not list(folder.glob("*.nc")):
        time.sleep(0.01)
    time.sleep(float(rng.uniform(0, 0.2)))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    store = Store(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is damaged
        entries = store.find()
        assert entries
        assert all(e.load().done == 1 for e in entries)
        assert all(store[key].data.sizes["vector"] in (40000, 30000) for key in store)
    assert {e.key for e in entries} == set(store)
    store.save(toys.Trace().run(toys.ToySubject()))
    assert len(store.find()) == len(entries) + 1, "no lock outlives its process"


def test_two_processes_and_two_threads_write_one_store(tmp_path: Path) -> None:
    folder = tmp_path / "readings"
    processes = [writer(folder, 10, start=0), writer(folder, 10, start=3)]
    store, problems = Store(folder), []

    def here(start: int) -> None:
        try:
            for k in range(8):
                store.save(toys.Trace(vectors=10).run(toys.ToySubject(), seed=k), f"{start + k:032x}")
                assert all(e.load().done == 1 for e in store.find())
        except Exception as problem:
            problems.append(problem)

    threads = [threading.Thread(target=here, args=(start,)) for start in (0, 100)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for process in processes:
        assert process.communicate()[0] == "done\n"
        assert process.returncode == 0
    assert problems == []
    wanted = {f"{k:032x}" for k in (*range(8), *range(100, 108))}
    assert set(store) == {e.key for e in store.find()} == wanted
    assert not list(folder.glob(".*.tmp"))
