from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from experiments.interrupts import InterruptionError, Interrupts
from tracking.cli import SIGNALS

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("hangup_ends")
each_signal = pytest.mark.parametrize("number", SIGNALS)


def receive(number: int) -> None:
    os.kill(os.getpid(), number)


@each_signal
def test_a_first_signal_is_noted(number: int) -> None:
    with Interrupts() as interrupts:
        assert not interrupts()
        receive(number)
        assert interrupts()


def test_a_second_signal_raises_unless_it_comes_with_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("experiments.interrupts.time.monotonic", lambda: now)
    with Interrupts() as interrupts:
        receive(signal.SIGINT)
        receive(signal.SIGTERM)
        assert interrupts()
        now += 5
        with pytest.raises(KeyboardInterrupt):
            receive(signal.SIGINT)


@each_signal
def test_a_signal_ends_a_block_that_says_so_and_that_only(number: int) -> None:
    with Interrupts() as interrupts:
        reached = []
        with suppress(InterruptionError), interrupts.at_once():
            receive(number)
            reached.append("the block's end")
        assert not reached
        assert interrupts()


def test_a_block_that_ends_at_once_does_not_begin_after_a_signal() -> None:
    with Interrupts() as interrupts:
        receive(signal.SIGINT)
        with pytest.raises(InterruptionError), interrupts.at_once():
            raise AssertionError("the block begins")


def test_a_block_that_is_over_is_not_ended() -> None:
    with Interrupts() as interrupts:
        with interrupts.at_once():
            pass
        receive(signal.SIGINT)
        assert interrupts()


def test_an_error_that_an_interruption_left_behind_is_an_interruption() -> None:
    def is_cut_short() -> None:
        with suppress(BaseException):
            receive(signal.SIGINT)
        raise AttributeError("partially initialized module")

    with Interrupts() as interrupts, pytest.raises(InterruptionError), interrupts.at_once():
        is_cut_short()


def test_another_error_is_raised_as_it_is() -> None:
    with Interrupts() as interrupts, pytest.raises(AttributeError), interrupts.at_once():
        raise AttributeError


@each_signal
def test_a_start_is_left_at_once_wherever_it_is(number: int) -> None:
    script = (
        "import os, sys, time; from tracking.cli import exit_on_signal\n"
        "with exit_on_signal('a line'):\n"
        "    try:\n        os.kill(os.getpid(), int(sys.argv[1])); time.sleep(30)\n"
        "    except BaseException: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(number)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "a line\n")


def test_afterwards_signals_do_what_they_did_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_block_that_goes_on_nevertheless_is_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.interrupts.RERAISE_SECONDS", 0.01)
    with Interrupts() as interrupts:
        reached = []
        with suppress(InterruptionError), interrupts.at_once():
            with suppress(BaseException):
                receive(signal.SIGINT)
            reached.append("what follows")
            time.sleep(30)
            reached.append("its end")
        assert reached == ["what follows"]
