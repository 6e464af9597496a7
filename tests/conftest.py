"""Settings of all tests: eight simulated CPU devices, and fast compilation."""

import os
import resource
import tempfile

from places import FAST_COMPILATION

# Set before jax starts, and inherited by the commands that tests run. Most of the time is compilation, so code is not
# optimised, and a program that several tests use is compiled once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="diva_jax_compiled_"))

import chex  # noqa: E402
import commands  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

chex.set_n_cpu_devices(8)
_MEMORY = 3_000_000  # [kB]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files of e2e_config.py's runs: 24 photographs in shards of eight, weights of both models."""
    import small  # Imported here because it creates arrays.

    from diva_jax import demo
    from diva_jax.data.photos import pack_photos

    folder = tmp_path_factory.mktemp("files")
    pack_photos(folder / "photos", count=24, per_shard=8)
    demo.write_clip(folder / "clip", small.SPEC)
    demo.write_stable_diffusion(folder / "stable-diffusion", small.diffusion())
    return folder


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    commands.kill_all()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """After a file, in a process that has used much memory; compiled programs take most of it."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _MEMORY:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
