"""Settings of all tests: eight simulated CPU devices, and fast compilation."""

import collections
import gc
import os
import resource

from places import FAST_COMPILATION, ROOT

# Set before jax starts, and inherited by the workers and by the commands that tests run. Most of the time is
# compilation, so code is not optimised, and a program that several tests or runs of the tests use is compiled once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import chex  # noqa: E402
import commands  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

chex.set_n_cpu_devices(8)
_MEMORY = 3_000_000  # [kB]


def pytest_collection_modifyitems(config, items):
    """Runs a fixed sample of the generated cases of damaged input, every third of a test; `make attack` runs all."""
    if "attack" in config.option.markexpr:
        return
    seen, kept, left_out = collections.Counter(), [], []
    for item in items:
        sampled = item.get_closest_marker("attack") and hasattr(item, "callspec")
        (left_out if sampled and seen[item.function] % 3 else kept).append(item)
        seen[item.function] += 1
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Files of e2e_config.py's runs: 24 photographs in shards of eight, weights of both models."""
    import small  # Imported here because it creates arrays.

    from diva_jax import demo
    from diva_jax.weights import names

    folder = tmp_path_factory.mktemp("files")
    demo.pack_photos(folder / "photos", count=24, per_shard=8)
    names.write_random_clip(folder / "clip", small.SPEC)
    demo.write_stable_diffusion(folder / "stable-diffusion", small.diffusion())
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """As `tmp_path`: one folder for all tests of a file."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def bucket():
    """A store of fsspec whose folder memory://bucket is empty."""
    import fsspec

    fs = fsspec.filesystem("memory")
    yield fs
    fs.rm("/bucket", recursive=True)


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    commands.kill_all()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped():
    """After a file, in a process that has used much memory; compiled programs take most of it. Later collections of
    garbage pass over what is left: it is most of the time of an export, which asks for one."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > _MEMORY:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield
