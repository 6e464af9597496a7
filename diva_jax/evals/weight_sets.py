"""The sets of weights of an evaluation, each of which is a source, a checkpoint of a run, or a group of runs."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diva_jax.common import paths
from diva_jax.common.errors import UserError, listing
from diva_jax.common.fields import differences
from diva_jax.training import checkpoint, workdirs
from diva_jax.weights import origins

_GROUP = re.compile(r"([\w.-]+)=(.+)")


class WeightSet(NamedTuple):
    """A set of weights: what was `given` for it, its `label` in results, the name of its `group` or "", and its
    `members`, each by a label of its own."""

    given: str
    label: str
    group: str
    members: Mapping[str, origins.Place]

    def entry(self) -> dict[str, Any]:
        """The entry in `weights` of results.json."""
        members = []
        for place in self.members.values():
            saved = {} if place.step is None else {"checkpoint": checkpoint.identity(place.source, place.step)}
            members.append({"source": place.source, "step": place.step, **saved})
        return {"label": self.label} | ({"members": members} if self.group else members[0])


def parse(text: str) -> tuple[str, list[str]]:
    """`tuned=runs/s0,runs/s1` -> ("tuned", ["runs/s0", "runs/s1"]); a single source -> ("", [source]). A UserError
    where a group has fewer than two sources, or one of them twice, and for several without a name."""
    found, there = _GROUP.fullmatch(text), Path(origins.split_step(text)[0]).exists()
    if "," in text and not found and not there:
        raise UserError(f"--weights={text} does not exist: give the flag once for each, or write NAME=WORKDIR,WORKDIR")
    if not found or there:
        return "", [text]
    name, sources = found[1], [s for s in found[2].split(",") if s]
    if len(set(sources)) < max(2, len(sources)):
        raise UserError(f"--weights={text} must name two runs or more, each once: write NAME=WORKDIR,WORKDIR")
    return name, sources


def check_group(name: str, members: Sequence[origins.Place]) -> None:
    """Raises a UserError where the runs of a group do not differ in their seed alone."""
    runs = [(p, workdirs.read_config(p.source).to_dict()) for p in members if p.step is not None]
    if not runs:
        return
    (first, config), by_seed = runs[0], {}
    for place, other in runs:
        if place.step != first.step or len(runs) < len(members):
            places = listing([f"{p.source} (step {p.step})" for p in members])
            raise UserError(f"--weights={name}=...: {places} are not runs at one step: give WORKDIR:STEP of each")
        if changed := differences(config, other, workdirs.WHOLE, (*workdirs.RESUMABLE, "seed")):
            problem = f"--weights={name}=...: {place.source} and {first.source} differ in more than their seed"
            raise UserError(f"{problem}: {listing(changed, 5)}; a group is of runs of one config")
        if (twin := by_seed.setdefault(other["seed"], place.source)) != place.source:
            problem = f"--weights={name}=...: {twin} and {place.source} both have seed={other['seed']}"
            raise UserError(f"{problem}: train one of them with another, --config.seed=SEED")


def labels_of(places: Sequence[origins.Place]) -> list[str]:
    """A label for each source: the last part of its path and the step, or the whole path if two are equal."""
    ends = ["" if place.step is None else f":{place.step}" for place in places]
    short = [(Path(place.source).name or place.source) + end for place, end in zip(places, ends, strict=True)]
    return short if len(set(short)) == len(short) else [p.source + end for p, end in zip(places, ends, strict=True)]


def _location(place: origins.Place) -> str:
    """The absolute path of a file or folder, or the id of the hub."""
    return str(paths.absolute(paths.folder(place.at, "--weights")))


def find(weights: Sequence[str]) -> list[WeightSet]:
    """Finds sets of weights, each a source, WORKDIR[:STEP], or a group, see `parse`. A UserError where weights do not
    exist, are given twice, or have the label of others, and where `check_group` refuses a group."""
    named = [parse(text) for text in weights]
    groups = [[origins.find(source, "--weights") for source in sources] for _, sources in named]
    own = iter(labels_of([place for places in groups for place in places]))
    out, known = [], {}
    for text, (group, _), places in zip(weights, named, groups, strict=True):
        members = dict(zip([next(own) for _ in places], places, strict=True))
        found = WeightSet(text, group or next(iter(members)), group, members)
        same = frozenset((_location(place), place.step) for place in places)
        if same in known or len(same) < len(places):
            again = f"as {known[same]}" if same in known else "twice"
            raise UserError(f"--weights={text} names the same weights {again}: give each once")
        if group:
            check_group(group, places)
        if (name := found.label) in [other.label for other in out]:
            raise UserError(f"--weights has two sets that are called {name}: give each once, or name the group anew")
        known[same] = text
        out.append(found)
    return out


def checkpoints_by_run(sets: Sequence[WeightSet]) -> dict[str, list[str]]:
    """Workdir, as it was given first -> the labels of its checkpoints among these sets; groups are left out."""
    spelled, out = {}, {}
    for given in sets:
        place = next(iter(given.members.values()))
        if not given.group and place.step is not None:
            out.setdefault(spelled.setdefault(_location(place), place.source), []).append(given.label)
    return out
