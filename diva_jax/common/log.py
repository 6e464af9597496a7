"""Messages for the user."""

import jax


def say(*parts) -> None:
    """Prints on process 0."""
    if jax.process_index() == 0:
        print(*parts, flush=True)
