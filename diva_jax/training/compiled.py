"""Where compiled programs are kept between runs."""

import os

import jax
from etils import epath

from diva_jax.common import paths

_MOST_BYTES = 10 * 2**30  # Of the compiled programs of all runs of a user.


def use_cache(setting: str, workdir: epath.Path) -> None:
    """Keeps compiled programs in a folder, so that they are not compiled again for a restart or a similar run.

    Args:
      setting: `config.compile_cache`: a folder; "" for none; or auto. For a workdir in a bucket, auto is
        `WORKDIR/cache/compiled`, since its machines come and go. Otherwise it is JAX_COMPILATION_CACHE_DIR, or
        `~/.cache/diva_jax/compiled`, from which the programs that were not used for longest are removed.
      workdir: of the run.
    """
    if not setting:
        return
    if setting != "auto":
        folder = epath.Path(setting).expanduser()
    elif paths.is_remote(workdir):
        folder = workdir / "cache" / "compiled"
    elif os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    else:
        folder = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diva_jax" / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
        except OSError:  # A home that cannot be written.
            folder = workdir / "cache" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(paths.absolute(folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
