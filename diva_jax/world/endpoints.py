"""What the experiment measures, declared before its runs; the first is what is asked, the others are what it costs.

An endpoint is the mean of 0 or 1 per item over strata of equal weight; the tests are those of `blindness.measure`.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from diva_jax.world.scenes import ABSENT, FACTS


class Endpoint(NamedTuple):
    """A title for readers, and the tests of `blindness.measure` whose mean it is."""

    title: str
    tests: tuple[str, ...]

    def items(self, found: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(0 or 1 per item, the stratum of each), [N] both, of what `blindness.measure` returned."""
        parts = [np.asarray(found[test], np.float64) for test in self.tests]
        return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(p) for p in parts])

    def score(self, found: Mapping[str, np.ndarray]) -> float:
        """The endpoint in percent, the mean over its tests."""
        return 100 * float(np.mean([np.mean(found[test]) for test in self.tests]))


def _of(kind: str, facts) -> tuple[str, ...]:
    return tuple(f"{kind}/{fact}" for fact in facts)


_KNOWN = tuple(fact for fact in FACTS if fact not in ABSENT)
SEEN, CALIBRATED, NAMES = "matches", "pairs", "names"  # The verdict follows from these.
ENDPOINTS = {
    SEEN: Endpoint("matches, absent facts", _of("matches", ABSENT)),
    CALIBRATED: Endpoint("pairs, absent facts", _of("pairs", ABSENT)),
    "texts": Endpoint("text choice, absent facts", _of("texts", ABSENT)),
    NAMES: Endpoint("names", ("names",)),
    "probe": Endpoint("probe, near colour", ("linear/near colour",)),
    "probes": Endpoint("probes, all", ("linear/relation", "linear/near colour", "linear/near shape")),
    "known_matches": Endpoint("matches, other facts", _of("matches", _KNOWN)),
    "known_pairs": Endpoint("pairs, other facts", _of("pairs", _KNOWN)),
    "all_matches": Endpoint("matches, all facts", _of("matches", FACTS)),
}
# Not a share of items: 1 minus the mean cosine of a test image's embedding to that of the untuned encoder.
DRIFT = "drift"
