"""Folders of this project and settings of the compiler, for tests."""

from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent

# XLA flags: code is not optimised, and fusions are emitted the older way, which halves the time of compilation. On a
# busy machine the threads of eight simulated devices may meet late; by default the process would end after 40 s.
FAST_COMPILATION = " ".join(
    (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=4",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
)
