"""Comparison of results.json with the example in docs/EVALUATION.md."""

import json
import re

from places import ROOT

EXAMPLE = json.loads(re.search(r"```json\n(.*?)```", (ROOT / "docs" / "EVALUATION.md").read_text(), re.S)[1])
# Objects whose keys are names, not fields.
_BY_NAME = ("tasks", "weights", "metrics", "scores", "versions", "config", "options")


def check_documented(found, example, where: str = "results.json") -> None:
    """Asserts that `found` has exactly the fields of `example`, of the same types; null is allowed for any value.

    For names that are not in the example, its first entry is the example.
    """
    if found is None or example is None:
        return
    if isinstance(example, dict):
        if where.rpartition(".")[2] not in _BY_NAME:
            assert set(found) == set(example), where
        first = next(iter(example.values()), None)
        for key, value in found.items():
            check_documented(value, example.get(key, first), f"{where}.{key}")
    elif isinstance(example, list):
        for value in found:
            check_documented(value, example[0], f"{where}[]")
    elif isinstance(example, float):
        assert isinstance(found, int | float), where
    else:
        assert type(found) is type(example), where
