"""Runs of several processes: connecting, comparing inputs, preemption, and the end when a process is lost."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diva_jax.common.errors import RunError, UserError

_GRACE_S = 5.0  # A failed process waits this long before it exits, so that the others can fail by themselves.
_MAX_FACTS_BYTES = 4096
_STATUS = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): ")
_LOST = re.compile("gloo|connection|socket|heartbeat|barrier|coordination|unavailable|deadline", re.IGNORECASE)


class Lost(RunError):
    """Another process of the run has died or cannot be reached."""


def _explicit() -> dict | None:
    """What JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say, or None if none of them is set."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {n: os.environ[n] for n in names if os.environ.get(n)}
    if not given:
        return None
    address, count, index = (given.get(n, "") for n in names)
    numbers = count.isdecimal() and index.isdecimal() and int(index) < int(count)
    if not re.fullmatch(r".+:\d+", address) or not numbers:
        there = ", ".join(f"{n}={given.get(n, '')}" for n in names)
        raise UserError(f"{there}: set HOST:PORT of process 0, their number, and 0 to one less than it, or none")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def _in_cluster() -> bool:
    """Whether this is one of several Slurm tasks, or a machine with TPUs, which may be part of a slice."""
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= set(os.environ):
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if (jax.config.jax_platforms or "tpu").split(",")[0] != "tpu" or not importlib.util.find_spec("libtpu"):
        return False
    # GKE lists the machines of the slice. Elsewhere jax looks for chips when it is imported, and sets
    # TPU_SKIP_MDS_QUERY if there are none.
    gke = {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & set(os.environ)
    return bool(gke) or "TPU_SKIP_MDS_QUERY" not in os.environ


def _not_met(seconds: float) -> str:
    """The error message for processes that did not connect within `seconds`."""
    from jax._src.distributed import global_state as met  # There is no public access to the detected values.

    everywhere = "start the same command on every machine (gcloud's --worker=all, tpu/launch.sh)"
    if met.coordinator_address is None:  # The metadata of the cluster were still asked for.
        return f"the processes of this run were not found within {seconds:g} s: {everywhere}"
    host, port = met.coordinator_address.rsplit(":", 1)
    reachable = met.process_id == 0
    with contextlib.suppress(OSError):
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        reachable = True
    if reachable:
        return (
            f"not all {met.num_processes} processes of this run connected to the coordinator at "
            f"{met.coordinator_address} within {seconds:g} s; only process {met.process_id} is known to have started: "
            f"{everywhere}, not only on one"
        )
    return (
        f"process {met.process_id} of {met.num_processes} cannot reach the coordinator, process 0, at "
        f"{met.coordinator_address} ({seconds:g} s): {everywhere}, and allow connections to that port"
    )


def initialise(join_timeout: float, lost_timeout: float) -> bool:
    """Connects to the other processes of the run, see `session`; whether there are others."""
    explicit = _explicit()
    if explicit is None and not _in_cluster():
        return False

    def give_up():
        # Called from a thread, because jax itself would abort with a stack trace.
        print(f"error: {_not_met(join_timeout)}", file=sys.stderr, flush=True)
        os._exit(2 if explicit else 1)

    timer = threading.Timer(join_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **(explicit or {}),
            initialization_timeout=int(join_timeout) + 60,
            heartbeat_timeout_seconds=int(lost_timeout),
        )
    except (ValueError, RuntimeError, OSError) as e:
        if explicit or not isinstance(e, ValueError) or "coordinator_address" not in str(e):
            raise RunError(f"the processes of this run cannot be found: {e}") from e
        # TPUs, but the metadata describes no slice to jax; libtpu may have found one.
        if (count := jax.process_count()) > 1:
            advice = f"set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID on each"
            raise UserError(f"jax does not find the addresses of the {count} machines of this slice: {advice}") from e
        return False
    finally:
        timer.cancel()
    return True


@contextlib.contextmanager
def session(join_timeout: float = 300, lost_timeout: float = 100):
    """Context manager that connects to the other processes of the run, if there are others, before any other use of
    devices: those that JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID give, or that are detected on TPU
    slices and under Slurm. If not all connect within `join_timeout` seconds, this process exits with one sentence: with
    2 if the variables were set, with 1 in a cluster, where a machine may be late and a service may start the command
    again. A process without a heartbeat for `lost_timeout` seconds is lost, and all others end. After an exception the
    other processes have `_GRACE_S` seconds to fail for the same reason; then this one exits, even if another thread of
    it, or the shutdown barrier, is still waiting. A UserError where the variables do not fit together, a RunError where
    the cluster's description cannot be read."""
    shared = initialise(join_timeout, lost_timeout)
    try:
        yield
    except BaseException as e:
        if shared:
            timer = threading.Timer(_GRACE_S, os._exit, (2 if isinstance(e, UserError) else 1,))
            timer.daemon = True
            timer.start()
        raise
    if shared:
        jax.distributed.shutdown()


def is_lost(e: Exception) -> bool:
    """Whether jax raised this because another process of the run is gone."""
    # Failures of collectives outside of compiled programs are ValueErrors that begin with a status of XLA.
    of_xla = isinstance(e, jax.errors.JaxRuntimeError) or (isinstance(e, ValueError) and _STATUS.match(str(e)))
    return bool(of_xla) and jax.process_count() > 1 and bool(_LOST.search(str(e)))


@contextlib.contextmanager
def watched(step):
    """Context manager that raises `Lost` for what jax raises where a process is lost; `step()` is that of the run."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as e:
        if not is_lost(e):
            raise
        raise Lost(
            f"process {jax.process_index()} lost another of the {jax.process_count()} processes at step {step()} "
            f"({str(e).splitlines()[0][:300]}): look at the other processes' logs for the cause; the same command on "
            "all of them resumes from the last checkpoint"
        ) from e


def gathered(facts: Any) -> list:
    """The value of each process, in their order: of JSON, of at most `_MAX_FACTS_BYTES`."""
    if jax.process_count() == 1:
        return [facts]
    padded = np.frombuffer(json.dumps(facts).encode().ljust(_MAX_FACTS_BYTES), np.uint8)
    return [json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)]


def check_same(facts: dict[str, str | int | None]) -> None:
    """A UserError, on every process, where `facts` (description -> value) are not the same on all of them."""
    first, *others = gathered(facts)
    for process, theirs in enumerate(others, 1):
        for what, value in first.items():
            if (there := theirs.get(what)) != value:
                advice = "start the same command with the same files on every machine"
                raise UserError(f"{what} is {value} for process 0 and {there} for process {process}: {advice}")


def any_failed(failed: bool) -> bool:
    """Returns whether `failed` is true on any process."""
    return any(gathered(bool(failed)))


class Interrupted(BaseException):
    """SIGTERM came where work was allowed to be broken off, see `Preemption.at_once`."""


class Preemption:
    """Whether the run has been asked to save and end: by SIGTERM to any of its processes, or by the first SIGINT. A
    second SIGINT ends the process at once. With several processes jax forwards the notice, and they agree on the step
    after which all of them end. This needs jax's own signal handler, which `initialise` installed."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._asked = threading.Event()
        self._at_once = False
        self._shared = jax.distributed.is_initialized()
        # One process of several cannot end alone: there, SIGTERM is jax's, and SIGINT becomes one.
        wanted = (signal.SIGINT,) if self._shared else (signal.SIGTERM, signal.SIGINT)
        self._before = {s: signal.signal(s, self._ask) for s in wanted}

    def _ask(self, number: int, _) -> None:
        self.signal = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])
        if self._shared:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._asked.set()
        if self._at_once:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self):
        """While it lasts, a signal raises `Interrupted`, for work that changes nothing and may take long; not with
        several processes, since all of them must leave after the same step."""
        self._at_once = True
        try:
            if self._asked.is_set() and not self._shared:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def after(self, step: int) -> None:
        """Must be called by every process after each step, with the number of completed steps."""
        if self._shared and multihost_utils.reached_preemption_sync_point(step):
            self._asked.set()

    def __bool__(self) -> bool:
        return self._asked.is_set()

    def close(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
