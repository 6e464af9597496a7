"""Folders of this project and settings of Python and the compiler, for tests."""

import gc
import importlib.metadata
from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent

# XLA flags: code is not optimised. On a busy machine the threads of eight simulated devices may meet late; by default
# the process would end after 40 s.
_FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
]
# Fusions emitted the older way halve the time of compilation. Later versions end a process for this flag.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
FAST_COMPILATION = " ".join(_FLAGS)

# Tracing makes many objects and little garbage: with the default, a third of its time is the search for it.
gc.set_threshold(200_000, 20, 20)
