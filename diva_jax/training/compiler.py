"""Options of the TPU compiler: those of the chip's table, or those of the config."""

import re

import jax

from diva_jax.common.errors import UserError
from diva_jax.costs import chips

AUTO = "auto"
_REFUSED = re.compile(r"No such compile option: '([^']*)'|Failed to parse '[^']*' into flag (\w+)")


def parse(text: str) -> dict[str, str]:
    """Parses options: `"a=1,b=false"` -> {"a": "1", "b": "false"}; "" has none.

    Raises:
      ValueError: a part is not NAME=VALUE, or a name is given twice.
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
    """Returns the compiler's options for a device, for `jax.jit`; None for a device that is not a TPU.

    Args:
      setting: `config.compiler_options`.
      device: a device of the mesh, which can be one of a topology without hardware.
    """
    if device.platform != "tpu":
        return None
    if setting == AUTO:
        chip = chips.of(device)
        return dict(chip.compiler_options) if chip else {}
    return parse(setting)


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles a lowered step.

    Raises:
      UserError: the compiler does not know an option of `config.compiler_options`, or its value.
    """
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
