"""What all commands have in common: `tracking.cli.run_command`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import experiments.__main__
from tracking.cli import SIGNALS, OutputError, Parser, run_command
from tracking.errors import TransientError, without_passwords

REPOSITORY = Path(__file__).parents[1]
COMMANDS = sorted(experiments.__main__.COMMANDS)
AGAIN = "the same command continues the study"

# A command of its own, which does what its first argument says.
SCRIPT = """
import os, signal, sys, time
from tracking.cli import Parser, run_command

def run(options):
    exec(options.do)

parser = Parser(prog="tool")
parser.add_argument("do")
parser.add_argument("--resume", default="")
options = parser.parse_args()
sys.exit(run_command(parser, run, None, resume=options.resume))
"""


def tool(
    do: str, *arguments: str, shell: str = "{}", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command of SCRIPT in a shell, which may send its output elsewhere."""
    words = [sys.executable, "-c", SCRIPT, do, *arguments]
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    return subprocess.run(
        ["bash", "-c", shell.format(quoted)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | variables,
        timeout=60,
    )


def raises(error: BaseException) -> Callable[[argparse.Namespace], None]:
    def run(_: argparse.Namespace) -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "resume", "code", "line"),
    [
        (ValueError("--n must be ≥ 1, not 0"), "", 2, "tool: error: --n must be ≥ 1, not 0"),
        (TransientError("the disk is full"), "", 1, "tool: error: the disk is full"),
        (TransientError("the disk is full"), AGAIN, 1, f"stopped: the disk is full; {AGAIN}"),
        (ValueError("two\nlines"), "", 2, "tool: error: two lines"),
        (ValueError("\x1b[2Ja name"), "", 2, "tool: error: \\x1b[2Ja name"),
        (ValueError("\u202ea name"), "", 2, "tool: error: \\u202ea name"),
        (KeyboardInterrupt(), "", 130, "interrupted"),
        (KeyboardInterrupt(), AGAIN, 130, f"interrupted: {AGAIN}"),
        (MemoryError(), "", 1, "stopped: this machine has not enough memory for it"),
        (OutputError("File too large"), "", 1, "stopped: can't write the output: File too large"),
    ],
)
def test_an_error_is_a_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, resume: str, code: int, line: str
) -> None:
    assert run_command(Parser(prog="tool"), raises(error), [], resume=resume) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"{line}\n")


def test_a_long_line_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(Parser(prog="tool"), raises(ValueError("x" * 2000)), [])
    assert "x" * 2000 in capsys.readouterr().err


def test_what_is_raised_by_a_fault_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(Parser(prog="tool"), raises(ZeroDivisionError()), [])


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert experiments.__main__.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[2] for line in lines if line.startswith("python -m")} == set(COMMANDS)
    assert experiments.__main__.main(["sweep"]) == 2
    assert capsys.readouterr().err.endswith("say python -m experiments.sweep\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_shown_whatever_the_terminal_can_show(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", command, "--help"],
        capture_output=True,
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
    assert b"exit codes" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_in_a_line_where_its_output_can_not_be_written(command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m {command} --help >/dev/full"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line == "stopped: can't write the output: No space left on device"


def test_text_that_the_terminal_can_not_show_is_escaped() -> None:
    done = tool(r'print("é \udcff →")', PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\\xe9 \\udcff \\u2192\n"


def test_a_reader_that_has_enough_is_no_error_but_of_work_that_was_stopped() -> None:
    many = "print('x' * 10**6); print('y' * 10**6)"
    silent = tool(many, shell="set -o pipefail; {} | true")
    assert (silent.returncode, silent.stderr) == (1, "")
    told = tool(many, "--resume", AGAIN, shell="set -o pipefail; {} | true")
    assert told.returncode == 1
    assert told.stderr == f"stopped: can't write the output: Broken pipe; {AGAIN}\n"


def test_an_output_error_is_none_of_the_servers_or_the_disks() -> None:
    # What talks to MLflow takes an OSError for one of its own, and told so of a broken pipe.
    do = "try:\n print('x', flush=True)\nexcept OSError:\n os._exit(7)"
    assert tool(do, shell="set -o pipefail; {} >/dev/full").returncode == 1


def test_a_closed_output_is_no_file_that_is_opened_next(tmp_path: Path) -> None:
    file = tmp_path / "database"
    do = f"f = open({str(file)!r}, 'w'); print('lost'); os.write(1, b'lost'); f.write('kept')"
    for closed in (">&-", "2>&-", "<&-", ">&- 2>&- <&-"):
        done = tool(do, shell="{} " + closed)
        assert done.returncode == 0, closed
        assert file.read_text() == "kept", closed


def test_an_error_of_a_closed_standard_error_is_not_printed_elsewhere() -> None:
    done = tool("raise ValueError('bad')", shell="{} 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.usefixtures("hangup_ends")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_command_in_a_line(number: int) -> None:
    done = tool(f"os.kill(os.getpid(), {int(number)}); time.sleep(30)")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_second_signal_ends_a_command_that_goes_on() -> None:
    do = (
        "try:\n os.kill(os.getpid(), 15); time.sleep(30)\n"
        "except KeyboardInterrupt:\n os.kill(os.getpid(), 15); time.sleep(30)"
    )
    assert tool(do).returncode == 130


def test_a_hangup_that_nohup_has_ignored_stays_ignored() -> None:
    do = f"os.kill(os.getpid(), {int(signal.SIGHUP)}); print('goes on')"
    done = tool(do, shell="trap '' HUP; {}")
    assert (done.returncode, done.stdout) == (0, "goes on\n")


def test_a_command_leaves_no_semaphore_to_be_complained_of() -> None:
    script = (
        "import multiprocessing; from tracking.cli import leave\n"
        "lock = multiprocessing.get_context('spawn').RLock()\nleave(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_works_in_a_thread(capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(run_command(Parser(prog="tool"), raises(ValueError("bad")), []))
    )
    thread.start()
    thread.join()
    assert codes == [2]
    assert capsys.readouterr().err == "tool: error: bad\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--lr", "0.1"], "--learning-rate-min or --learning-rate-max"),
        (["--batch-size", "32"], "--batch-sizes"),
        (["--epoch=3"], "--epochs"),
        (["--bs", "32"], "--batch-sizes"),
    ],
)
def test_a_flag_that_is_not_known_is_told_with_those_like_it(
    capsys: pytest.CaptureFixture[str], typed: list[str], meant: str
) -> None:
    from experiments.sweep import main

    assert main(typed) == 2
    assert f"(did you mean {meant}?)" in capsys.readouterr().err


def test_a_flag_like_none_has_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    from tracking.best import main

    assert main(["--zzzz"]) == 2
    assert capsys.readouterr().err.endswith("unrecognized arguments: --zzzz\n")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://u:secret@host/x",
        "postgresql+psycopg://u:my secret@host/x",
        "postgresql+psycopg://u:my/se:cret @@host/x",
        "http://u:12secret@host:5000",
        "postgresql+psycopg://u@host/x?password=my secret&a=b",
        "http://u:s e c r e t@host:5000 and http://v:secret@other",
    ],
)
def test_passwords_are_hidden(url: str) -> None:
    shown = without_passwords(f"can't open {url}: no 127.0.0.1:5000")
    assert "ecret" not in shown
    assert "e c r e t" not in shown
    assert "host" in shown
    assert shown.startswith("can't open ")


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:5000 has no models:/cnn@champion", "http://host:5000/#/x and a@b"],
)
def test_what_is_no_password_is_shown(text: str) -> None:
    assert without_passwords(text) == text
