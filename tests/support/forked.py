"""Runs a command several times, each in a fork of one process that has imported it: `forked.py MODULE < LINES`.

LINES is JSON, a list of lists of arguments. Prints as JSON a list of [exit code, stdout, stderr].
"""

import importlib
import json
import os
import sys
import tempfile


def run(module, arguments: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (pid := os.fork()):
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv = ["diva-command", *arguments]
                module.entry()
                code = 0
            except SystemExit as e:
                code = e.code or 0
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitpid(pid, 0)[1]
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return os.waitstatus_to_exitcode(status), *texts


if __name__ == "__main__":
    command = importlib.import_module(f"diva_jax.{sys.argv[1]}")
    importlib.import_module("diva_jax.training.loop")  # Slow to import.
    print(json.dumps([run(command, line) for line in json.load(sys.stdin)]))
