"""Progress output: nothing for short work, a line every few seconds, a bar on a terminal."""

import time

import pytest
from rich.console import Console

from moonlight import progress


@pytest.fixture
def slow_clock(monkeypatch):
    """Make each reading of the clock 4 s later than the one before."""
    monkeypatch.setattr(time, "monotonic", iter(range(0, 1000, 4)).__next__)


def test_lines_without_a_terminal(slow_clock, capfd):
    assert list(progress.track_progress("abcdefgh", "letters")) == list("abcdefgh")
    # The clock is read at the start and before each item: two items are done after 12 s, five after 24 s.
    assert capfd.readouterr().err == "letters: 2 of 8, 36 s left\nletters: 5 of 8, 14 s left\n"


def test_bytes_without_a_terminal(slow_clock, capfd):
    with progress.byte_progress("reading", 8_000_000) as report:
        for done in range(1, 9):
            report(done * 1_000_000)
    lines = ["reading: 3.0 of 8.0 MB, 0.2 MB/s, 20 s left", "reading: 6.0 of 8.0 MB, 0.2 MB/s, 8 s left"]
    assert capfd.readouterr().err.splitlines() == lines


def test_short_work_is_silent(capfd):
    assert list(progress.track_progress([1, 2], "numbers")) == [1, 2]
    assert capfd.readouterr().err == ""


def test_a_bar_on_a_terminal(monkeypatch, capfd):
    monkeypatch.setattr(progress, "Console", lambda **options: Console(force_terminal=True, **options))
    assert list(progress.track_progress(range(3), "numbers")) == [0, 1, 2]
    assert "numbers" in capfd.readouterr().err
