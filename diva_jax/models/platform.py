"""The kind of device that a function is traced for: that of the abstract mesh of `jax.sharding`, not of the tracing
machine.

So a step compiled for a TPU on a CPU is the same program as one compiled on the TPU.
"""

import jax


def traced_for(mesh=None) -> str:
    """Returns "cpu", "gpu" or "tpu" for an abstract mesh, by default the one that is set; "" where none was set."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    device = None if mesh.empty else mesh.abstract_device
    return "" if device is None else device.platform
