"""The tests of tests/gpu: all losses against float64 on the CPU, NCCL, and no host wait in a step.

Without CUDA they are collected and skipped.
"""

from collections import Counter
from pathlib import Path

import pytest

from gpu_check.part import Job

ROOT = Path(__file__).parents[2]


class Recorder:
    """A pytest plugin that records each failure at once, and the counts of each file."""

    def __init__(self, job: Job) -> None:
        self._job, self._file = job, ""
        self._counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        if file != self._file:
            self.finish_file()
            self._file = file
        if report.when == "call" or report.outcome != "passed":
            self._counts[report.outcome] += 1
        if report.failed:
            last = report.longreprtext.strip().splitlines()[-1:]
            self._job.record(test=report.nodeid, failed=" ".join(last))

    def finish_file(self) -> None:
        """Records the counts of the file whose tests have just ended."""
        if self._counts:
            self._job.record(file=self._file, **self._counts)
        self._counts = Counter()


def run(job: Job) -> None:
    recorder = Recorder(job)
    words = ["-q", "-p", "no:cacheprovider", "--basetemp", str(job.folder / "files")]
    # Without the suite's checks of array types, which slow it down, and with warnings: another
    # release of torch has others.
    words += ["-o", "addopts=--strict-markers", "-W", "default"]
    code = pytest.main(
        [*words, "--rootdir", str(ROOT), str(ROOT / "tests/gpu")], plugins=[recorder]
    )
    recorder.finish_file()
    if code:
        raise SystemExit(f"pytest ended with {code!r}")
