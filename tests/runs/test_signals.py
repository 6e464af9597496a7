"""SIGTERM and SIGINT while data does not come: the run acts within seconds, and nothing is lost."""

import signal
import time

import commands
import pytest
from places import SUPPORT

from diva_jax.training import checkpoint

pytestmark = pytest.mark.attack


def start(files, workdir, reads: int, *more) -> commands.Command:
    options = (str(reads), f"--config={SUPPORT}/e2e_config.py:outside.rotations:{files}", f"--workdir={workdir}", *more)
    return commands.start(SUPPORT / "stalling.py", *options)


def until(process: commands.Command, *texts: str) -> None:
    """Reads the output until each of the texts was seen."""
    wanted = set(texts)
    for line in process.stdout:
        wanted -= {t for t in wanted if line.startswith(t)}
        if not wanted:
            return
    raise AssertionError(f"ended before {wanted}: {process.stderr.read()}")


def end(process: commands.Command, seconds: float = 60) -> tuple[int, str, str, float]:
    began = time.monotonic()
    return *commands.finish(process, seconds), time.monotonic() - began


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_data_stalls(files, tmp_path, sig):
    process = start(files, tmp_path / "run", 30)
    until(process, "stalled", "step 1/")
    process.send_signal(sig)
    code, out, err, took = end(process)
    assert f"{sig.name}: saved step" in out and checkpoint.latest_step(tmp_path / "run"), (out, err)
    if sig == signal.SIGTERM:
        assert code == 0, (out, err)
    else:
        assert code == 130 and err.strip().splitlines()[-1] == "interrupted" and "Traceback" not in err, err
    assert took < 30, took


def test_a_read_that_stalls_is_named(files, tmp_path):
    process = start(files, tmp_path / "run", 30, "--config.data.stall_timeout=3")
    code, _, err, _ = end(process, 200)
    assert code == 1 and "config.data.stall_timeout=3" in err and ".tar/" in err and "Traceback" not in err, err


def test_sigterm_before_training_starts(files, tmp_path):
    process = start(files, tmp_path / "run", 10**6)
    assert next(process.stdout).startswith("outside.rotations: ")  # The weights are loaded next.
    process.send_signal(signal.SIGTERM)
    code, out, err, took = end(process)
    assert code == 0 and "SIGTERM: " in out and "Traceback" not in err and took < 30, (out, err)
