"""Options of the TPU compiler, those of the chip's table or of the config; and where compiled programs are kept."""

import os
import re

import jax
from etils import epath

from diva_jax.common import paths
from diva_jax.common.errors import UserError
from diva_jax.costs import chips

AUTO = "auto"
_MAX_CACHE_BYTES = 10 * 2**30  # The compiled programs of all runs of a user have at most this size.
_REFUSED = re.compile(r"No such compile option: '([^']*)'|Failed to parse '[^']*' into flag (\w+)")


def parse(text: str) -> dict[str, str]:
    """`"a=1,b=false"` -> {"a": "1", "b": "false"}; a ValueError where a part is not NAME=VALUE or a name is there
    twice.
    """
    pairs = [part.strip().split("=") for part in text.split(",")] if text else []
    options = {pair[0]: pair[-1] for pair in pairs}
    if any(len(pair) != 2 or not all(pair) for pair in pairs) or len(options) < len(pairs):
        raise ValueError(text)
    return options


def is_options(text: str) -> bool:
    """Whether `config.compiler_options` can have this value; whether the compiler knows the options, it says itself."""
    return text == AUTO or parse(text) is not None


def options(setting: str, device: jax.Device) -> dict[str, str] | None:
    """The options of `config.compiler_options` for a device, also of a topology; None for one that is not a TPU."""
    if device.platform != "tpu":
        return None
    if setting == AUTO:
        chip = chips.of(device)
        return dict(chip.compiler_options) if chip else {}
    return parse(setting)


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a lowered step; a UserError where the compiler refuses an option of `config.compiler_options`."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if not (found := _REFUSED.search(str(e))):
            raise
        name = found.group(1) or found.group(2)
        raise UserError(
            f"config.compiler_options: this version of the TPU compiler does not accept {name} "
            f"({str(e).splitlines()[0][:200]}): remove or correct it, or use config.compiler_options={AUTO}"
        ) from e


def kept(workdir: epath.Path | None = None) -> epath.Path:
    """The folder of what is found out about programs and devices: `~/.cache/diva_jax`, for all runs of a user, or
    `WORKDIR/cache` for a workdir in a bucket, since its machines come and go."""
    if workdir is not None and paths.is_remote(workdir):
        return epath.Path(workdir) / "cache"
    return epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diva_jax"


def use_cache(setting: str, workdir: epath.Path) -> None:
    """Keeps compiled programs in the folder `setting` (`config.compile_cache`), so that a restart need not compile; ""
    for none.

    For a workdir in a bucket, auto is `WORKDIR/cache/compiled`, since its machines come and go. Otherwise it is
    JAX_COMPILATION_CACHE_DIR, or `~/.cache/diva_jax/compiled`, of limited size.
    """
    if not setting:
        return
    if setting != AUTO:
        folder = epath.Path(setting).expanduser()
    elif paths.is_remote(workdir):
        folder = kept(workdir) / "compiled"
    elif os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    else:
        folder = kept() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_max_size", _MAX_CACHE_BYTES)
        except OSError:  # A home that cannot be written.
            folder = workdir / "cache" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(paths.absolute(folder)))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
