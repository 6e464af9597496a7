"""What a wrong name may mean: a field, a section, another program's word, a command."""

import importlib.util

import numpy as np
import pytest

from diva_jax import __main__ as listing
from diva_jax import config, objectives
from diva_jax.common import errors, fields
from diva_jax.common.errors import UserError


def test_a_typing_error_in_any_field_finds_it():
    """In every second one."""
    rng, seen = np.random.default_rng(0), set()
    for objective in objectives.names():
        known = list(fields.flatten(config.default(objective=objective)))
        for path in [path for path in known if path not in seen][::2]:
            section, _, name = path.rpartition(".")
            i = int(rng.integers(len(name)))
            for wrong in (name[:i] + "x" + name[i:], name.upper(), name.replace("_", "-")):
                if len(name) > 3:
                    assert path in errors.nearest(f"{section}.{wrong}".lstrip("."), known), (path, wrong)
            # The section is forgotten, or written otherwise.
            if len([p for p in known if p.rpartition(".")[2] == name]) <= 3:
                assert path in errors.nearest(name, known) or name in known
                assert path in errors.nearest(f"other.{name}", known)
        seen |= set(known)


@pytest.mark.parametrize("wrong, meant", {
    "lr": "optim.lr", "optim.learning_rate": "optim.lr", "epochs": "steps", "bs": "batch_size",
    "gradient_accumulation_steps": "accum", "num_workers": "data.threads", "resolution": "data.image_size",
    "save_every": "checkpoint.every", "max_grad_norm": "optim.clip", "pretrained": "backbone.source",
    "optimizer": "optim.name", "loss": "objective",
       "gradient_checkpointing": "remat", "wandb.project": "log.wandb", "optim.lr.value": "optim.lr",
}.items())  # fmt: skip
def test_words_of_other_programs(wrong, meant):
    with pytest.raises(UserError, match=f"^the config has no field {wrong}; did you mean .*{meant}.*[?]$"):
        fields.require(config.default(), [wrong])


def test_sections_are_fields_and_nonsense_has_no_neighbour():
    fields.require(config.default(), ["optim", "diffusion.unet", "steps"])
    with pytest.raises(UserError, match="no field q.zzz: --config=FILE --help lists all that exist"):
        fields.require(config.default(), ["q.zzz"])
    with pytest.raises(UserError, match="no field stepps, lr; did you mean steps or optim.lr?"):
        fields.require(config.default(), ["stepps", "lr"])


DOCUMENTED = ("main", "evaluate", "export_torch", "report", "aot", "selfcheck", "cache_latents", "demo", "world.demo")


def test_every_command_is_listed_with_a_sentence(capsys):
    assert listing.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    found = dict(line.removeprefix("python -m ").split(maxsplit=1) for line in lines)
    assert {f"diva_jax.{name}" for name in DOCUMENTED} <= found.keys()
    for name, sentence in found.items():
        assert importlib.util.find_spec(name) and len(sentence) > 5, name


@pytest.mark.parametrize("wrong, meant", [("evalute", "evaluate"), ("export", "export_torch"), ("man", "main")])
def test_a_wrong_command_finds_the_right_one(capsys, wrong, meant):
    assert listing.main([wrong]) == 2
    assert f"diva_jax.{meant}" in capsys.readouterr().err
