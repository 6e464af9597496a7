"""The class subsets of ImageNet-A and -R, as timm lists them, follow from the names of the folders."""

from pathlib import Path

import pytest
import timm.data

from diva_jax.evals.tasks import robustness, zeroshot

INFO = Path(timm.data.__file__).with_name("_info")


@pytest.mark.parametrize("name", ["a", "r"])
def test_folders_give_timms_indices(tmp_path, name):
    wnids = (INFO / f"imagenet_{name}_synsets.txt").read_text().split()
    for wnid in reversed(wnids):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "0.png").touch()
    found = robustness.read_set(name, tmp_path, False)
    by_label = {label: name.split("/")[0] for name, label in zip(found.names, found.targets, strict=True)}
    indices = [zeroshot.imagenet("wnids").index(by_label[i]) for i in range(200)]
    assert indices == [int(i) for i in (INFO / f"imagenet_{name}_indices.txt").read_text().split()]
