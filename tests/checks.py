"""The table of the 32 checks of reliability: which tests carry each, how they ended, how long they took.

A test says `@pytest.mark.check(7)`; whatever ran is summed up at the end of `make test` and `make soak`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

CHECKS = (
    "a run stopped and continued equals one that was not",
    "kill -9 at random moments",
    "kill -9 inside the writer of checkpoints",
    "Ctrl-C, SIGTERM, SIGUSR1 from any phase",
    "a full disk",
    "truncated, missing and empty files",
    "flipped bits",
    "rotation of checkpoints",
    "changed settings on a continued run",
    "values that are not finite",
    "out of memory",
    "two runs in one folder",
    "outputs that cannot be",
    "no GPU, or a device that is not there",
    "no network",
    "a hub that fails half-way",
    "stdout and stderr gone",
    "memory and open files of long runs",
    "the same seed draws the same image",
    "exports draw what sid draws, and are never half there",
    "malicious pickles under every name",
    "nothing in the source can load code",
    "hostile model folders",
    "hostile safetensors",
    "bombs, devices and pipes",
    "broken prompt lists",
    "prompts that look like paths",
    "outputs that exist, and links",
    "numbers that make no sense",
    "terminal injection",
    "tokens and locals are never shown",
    "libraries with known holes are too old",
)


@dataclass
class Tally:
    """What became of one check."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def add(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.failed:
            self.failed += 1
        elif report.skipped:
            self.skipped += 1
        elif report.when == "call":
            self.passed += 1

    @property
    def result(self) -> str:
        """A skipped test says so: nothing was shown by it."""
        return "FAILED" if self.failed else "skipped in part" if self.skipped else "passed"


def table(reports: list[pytest.TestReport]) -> list[str]:
    """Lines to print, one for each check that ran; reports carry the numbers of their checks, also from another process."""
    tallies: dict[int, Tally] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):  # a module that cannot be imported has none
            if name == "check":
                tallies.setdefault(int(str(value)), Tally()).add(report)
    return [
        f"{number:2}  {CHECKS[number - 1]:55} {tally.passed + tally.failed + tally.skipped:3} tests  {tally.seconds:7.1f} s  {tally.result}"
        for number, tally in sorted(tallies.items())
    ]
