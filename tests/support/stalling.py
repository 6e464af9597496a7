"""`python stalling.py READS ARGS`: diva_jax.main, whose reads of data never end after so many of them."""

import itertools
import sys
import threading

from diva_jax.data import files

left = itertools.count(int(sys.argv.pop(1)), -1)
read = files.read_range


def stalling(*args):
    if next(left) <= 0:
        print("stalled", flush=True)
        threading.Event().wait()
    return read(*args)


files.read_range = stalling

if __name__ == "__main__":
    from diva_jax import main
    from diva_jax.common import cli

    cli.run(main.main)
