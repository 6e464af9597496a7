"""Runs of several processes: how they meet, agree, learn of a preemption, and end when one of them is lost."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

from diva_jax.common.errors import RunError, UserError

_GRACE = 5.0  # Seconds for the others to end by themselves before a process that failed leaves them.
_FACTS = 4096  # Bytes of `check_same`'s facts.
_LOST = re.compile("gloo|connection|socket|heartbeat|barrier|coordination|unavailable|deadline", re.IGNORECASE)


class Lost(RunError):
    """Another process of the run is gone."""


def _explicit() -> dict | None:
    """What JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say; None where none is set."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = {n: os.environ[n] for n in names if os.environ.get(n)}
    if not given:
        return None
    if missing := [n for n in names if n not in given]:
        raise UserError(f"{' and '.join(given)} is set without {' and '.join(missing)}: set all three, or none")
    address, count, index = given.values()
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: use HOST:PORT of process 0")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(f"JAX_PROCESS_ID={index} of JAX_NUM_PROCESSES={count}: use 0 to one less than their number")
    return {"coordinator_address": address, "num_processes": int(count), "process_id": int(index)}


def _in_cluster() -> bool:
    """Whether this is one task of several under Slurm, or a machine with TPUs, of which there may be more."""
    if {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= set(os.environ):
        return int(os.environ.get("SLURM_NTASKS", "1")) > 1
    if (jax.config.jax_platforms or "tpu").split(",")[0] != "tpu" or not importlib.util.find_spec("libtpu"):
        return False
    # GKE lists the slice's machines; elsewhere jax looks for chips when imported, and sets the last one without.
    gke = {"TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"} & set(os.environ)
    return bool(gke) or "TPU_SKIP_MDS_QUERY" not in os.environ


def _reachable(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _not_met(seconds: float) -> str:
    """Why the processes did not meet, for the one that waited."""
    from jax._src.distributed import global_state as met  # The only place that knows what was detected.

    everywhere = "start the same command on every machine (gcloud's --worker=all, tpu/launch.sh)"
    if met.process_id == 0 or _reachable(met.coordinator_address):
        return (
            f"not all {met.num_processes} processes of this run came to the coordinator at "
            f"{met.coordinator_address} within {seconds:g} s, only process {met.process_id} is known to be here: "
            f"{everywhere}, not on one alone"
        )
    return (
        f"process {met.process_id} of {met.num_processes} cannot reach the coordinator, process 0, at "
        f"{met.coordinator_address} ({seconds:g} s): {everywhere}, and let them connect to that port"
    )


def initialise(join_timeout: float, lost_timeout: float) -> bool:
    """Joins the other processes of the run where the environment says that there are others.

    Explicitly by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; detected on TPU slices and under
    Slurm. To be called before anything asks for devices. Where they do not all meet in time this process ends with
    one sentence: exit code 2 where the variables were set by hand; 1 in a cluster, where a machine that is late
    is no mistake, and a service may start the command again.

    Args:
      join_timeout: seconds for all processes to come.
      lost_timeout: seconds without a sign of life after which a process counts as lost and all others end.

    Returns:
      Whether there is a run to share, be it of one process.

    Raises:
      UserError: the variables do not fit together.
      RunError: what was detected cannot be read.
    """
    explicit = _explicit()
    if explicit is None and not _in_cluster():
        return False

    def give_up():
        # From a thread: jax itself would abort with a stack trace.
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
    except ValueError as e:
        if explicit is None and "coordinator_address" in str(e):
            return False  # TPUs, but of no slice that can be asked for.
        raise RunError(f"jax.distributed.initialize: {e}") from e
    except (RuntimeError, OSError) as e:
        raise RunError(f"the processes of this run cannot be found: {e}") from e
    finally:
        timer.cancel()
    return True


@contextlib.contextmanager
def session(join_timeout: float = 300, lost_timeout: float = 100):
    """`initialise`, and an end that keeps no other process waiting.

    After an exception the others are given a moment to fail of the same cause and leave together; then this
    process ends, even where another thread of it, or the farewell between the processes, still waits.
    """
    shared = initialise(join_timeout, lost_timeout)
    try:
        yield
    except BaseException as e:
        if shared:
            code = 2 if isinstance(e, UserError) else 1
            timer = threading.Timer(_GRACE, os._exit, (code,))
            timer.daemon = True
            timer.start()
        raise
    if shared:
        jax.distributed.shutdown()


def is_lost(e: Exception) -> bool:
    """Whether jax raised this because another process of the run is gone."""
    return isinstance(e, jax.errors.JaxRuntimeError) and jax.process_count() > 1 and bool(_LOST.search(str(e)))


@contextlib.contextmanager
def explained(step):
    """Turns what jax raises when another process is gone into one sentence.

    Args:
      step: () -> steps done.

    Raises:
      Lost: in a run of several processes, communication failed.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as e:
        if not is_lost(e):
            raise
        raise Lost(
            f"process {jax.process_index()} lost another of the {jax.process_count()} processes at step {step()} "
            f"({str(e).splitlines()[0][:300]}): look at the other processes' logs for the cause; the same command on "
            "all of them resumes from the last checkpoint"
        ) from e


def _gather(data: bytes) -> list[bytes]:
    """Up to `_FACTS` bytes of each process, in order."""
    padded = np.frombuffer(data.ljust(_FACTS), np.uint8)
    return [bytes(row).rstrip() for row in multihost_utils.process_allgather(padded)]


def check_same(facts: dict[str, str | int | None]) -> None:
    """Raises a UserError, on every process, where the processes differ in one of `facts` (what it is -> value)."""
    if jax.process_count() == 1:
        return
    first, *others = [json.loads(row) for row in _gather(json.dumps(facts).encode())]
    for process, theirs in enumerate(others, 1):
        for what, value in first.items():
            if theirs.get(what) != value:
                raise UserError(
                    f"{what} is {value} for process 0 and {theirs.get(what)} for process {process}: start the same "
                    "command with the same files on every machine"
                )


def any_failed(failed: bool) -> bool:
    """Whether it failed on any process."""
    if jax.process_count() == 1:
        return failed
    return bool(multihost_utils.process_allgather(np.uint8(failed)).any())


class Interrupted(BaseException):
    """SIGTERM came where work was allowed to be broken off, see `Preemption.at_once`."""


class Preemption:
    """Whether the run has been asked, by SIGTERM to any of its processes, to save and leave.

    With several processes jax passes the notice on, and they agree on the step after which all of them leave;
    its own handler, which `initialise` installed, must then stay.
    """

    def __init__(self):
        self._asked = threading.Event()
        self._at_once = False
        self._shared = jax.distributed.is_initialized()
        if not self._shared:
            self._before = signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_) -> None:
        self._asked.set()
        if self._at_once:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self):
        """While it lasts, SIGTERM raises `Interrupted`, for work that changes nothing and may take long.

        With several processes it does not, since all of them must leave after the same step.
        """
        self._at_once = True
        try:
            if self._asked.is_set() and not self._shared:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def after(self, step: int) -> None:
        """Called after each step, by every process, with the number of steps done."""
        if self._shared and multihost_utils.reached_preemption_sync_point(step):
            self._asked.set()

    def __bool__(self) -> bool:
        return self._asked.is_set()

    def close(self) -> None:
        if not self._shared:
            signal.signal(signal.SIGTERM, self._before)
