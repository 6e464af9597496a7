"""Cards, configs and tokenizers of exports, and the push to the hub, without the libraries that load them."""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import report_samples as samples
from helpers import failed, refused
from huggingface_hub import ModelCard
from specs import CLIP_FOLDER, CLIP_FOLDER as CLIP, EVAL_CLIP
from transformers import AutoTokenizer

from diva_jax import demo
from diva_jax.models.backbones import NO_TEXT, TABLE
from diva_jax.weights import formats, names, origins
from diva_jax.weights.export import layouts, publish

BACKBONE = {"source": "hf-hub:timm/vit_large_patch14_clip_224.openai"}
CONFIG = dict(objective="diva", data={"path": "photos"}, batch_size=8, seed=3, ema={"decay": 0.9}, backbone=BACKBONE)
SOURCES = {"vision": {"source": ["a.safetensors"], "sha256": "12ab"}}
PROVENANCE = dict(workdir="runs/a", step=40, config=CONFIG, sources=SOURCES, base="/weights/a", tuned=["vision"])


@pytest.fixture(scope="module")
def clip(home):
    names.write_random_clip(home, EVAL_CLIP)
    demo.write_byte_tokenizer(home)
    return origins.open_source(str(home))


def write_results(folder, source="runs/a"):
    """results.json of a run whose first metric has a mark of tables in its title."""
    task = samples.mmvp_task([])
    task["metrics"]["pooled"]["title"] = "pooled | embedding"
    task["metrics"]["rank"] = {"title": "rank", "unit": ""}
    task["weights"][samples.BEFORE]["scores"]["rank"] = {"score": 231.4, "interval": None}
    samples.write_evaluation(folder, [], source, mmvp=task)
    return folder / "results.json"


def test_what_the_hub_and_its_reader_get(clip):
    tuned = dataclasses.replace(clip, run=PROVENANCE)
    options = publish.ExportOptions(license="mit", base_model="timm/base")
    text = publish.card(tuned, EVAL_CLIP, "open_clip", "float32", options, path="runs/tuned", note="it lacks x")
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.pipeline_tag) == ("mit", "timm/base", "zero-shot-image-classification")
    assert data.tags == ["clip", "diva"] and data.to_dict()["base_model_relation"] == "finetune"
    assert 'create_model_and_transforms("local-dir:runs/tuned")' in text and "{{" not in text and "{%" not in text
    assert "**Note:** it lacks x." in text
    config = text.split("<details>")[1].split("</details>")[0]
    assert json.loads(config.split("```json")[1].split("```")[0]) == PROVENANCE["config"]
    options = publish.ExportOptions(push_to_hub="me/tuned")
    text = publish.card(tuned, EVAL_CLIP, "open_clip", "float32", options, path="runs/tuned")
    assert '"hf-hub:me/tuned"' in text and "runs/tuned" not in text
    text = publish.card(clip, EVAL_CLIP, "pt", "float32", options, path="runs/tuned")
    assert 'tower = hf_hub_download("me/tuned", "vision_tower.pth")' in text
    text = publish.card(clip, EVAL_CLIP, "pt", "float32", path='é "\\n"')  # A backslash and an n.
    assert '\ntower = "é \\"\\\\n\\"/vision_tower.pth"\n' in text
    data = ModelCard(text).data
    assert (data.license, data.base_model, data.pipeline_tag) == ("other", None, "image-feature-extraction")
    assert "<details>" not in text
    run = PROVENANCE | {"config": CONFIG | {"data": {"path": "https://me:pw1@host/{0..9}.tar?token=pw2"}}}
    text = publish.card(dataclasses.replace(clip, run=run), EVAL_CLIP, "hf", "float32")
    assert "https://host/{0..9}.tar?..." in text and "pw1" not in text and "pw2" not in text


def test_caveats_and_scores(clip, tmp_path):
    plain = publish.card(dataclasses.replace(clip, run=PROVENANCE), EVAL_CLIP, "hf", "float32")
    for line in ("No scores were given", "must be made again", "The text tower was not tuned", "No license was given"):
        assert line in plain, line
    both = dataclasses.replace(clip, run=PROVENANCE | {"tuned": ["text", "vision"]})
    scores = publish.scores_of(str(write_results(tmp_path)), "runs/a", 4600)
    text = publish.card(both, EVAL_CLIP, "hf", "float32", scores=scores)
    assert "No scores" not in text and "The text tower was not tuned" not in text
    table = text.split("## Scores")[1].split("##")[0].strip().splitlines()[2:]
    assert table[:2] == [f"| task | score | {samples.BEFORE} | this model | difference |", "|---|---|---|---|---|"]
    numbers = "19.26 (12.76 to 25.76) | 25.93 (19.43 to 32.43) | +6.67 (1.48 to 11.85)"
    assert table[2] == rf"| MMVP-VLM | pooled \| embedding [%] | {numbers} |"
    assert len(table) == 4 and "published" in table[3]  # The rank has no score of these weights.


def test_scores_are_those_of_the_exported_weights(tmp_path):
    run = str(tmp_path / "runs" / "a")
    file = write_results(tmp_path, run)
    assert publish.scores_of(str(tmp_path), str(tmp_path / "runs" / "." / "a"), 4600)["reference"] == samples.BEFORE
    assert publish.scores_of(str(file), "weights/vitl14", None)["reference"] == ""
    for source, step in (("runs/b", 4600), (run, 39)):
        says = "has no scores of .*, only of weights/vitl14, .*a:4600: evaluate these weights"
        refused(says, publish.scores_of, str(file), source, step)
    for content in ("{", '{"weights": []}', '{"weights": [{"label": "a"}]}', "[]"):
        file.write_text(content)
        refused("results.json (is not a results.json|has no scores)", publish.scores_of, str(file), "w", None)
    refused("none.json is not a results.json", publish.scores_of, str(tmp_path / "none.json"), "w", None)


def push(clip, out, repo="me/tuned"):
    publish.export(clip.where, out, "hf", "float32", publish.ExportOptions("mit", push_to_hub=repo), run=False)


def test_the_export_is_pushed_to_a_hub_that_is_checked_before_anything_is_written(clip, tmp_path, monkeypatch, capsys):
    hub = mock.MagicMock()
    hub.upload_folder.return_value = "https://hub/me/tuned"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)

    def export(source, spec, out, fmt, *, card, **_):
        out.mkdir()
        (out / "README.md").write_text(card)

    monkeypatch.setattr(layouts, "export", export)
    push(clip, tmp_path / "out")
    assert [name for name, _, _ in hub.method_calls] == ["whoami", "create_repo", "upload_folder"]
    kw = hub.upload_folder.call_args.kwargs
    assert kw["repo_id"] == "me/tuned" and kw["folder_path"] == tmp_path / "out"
    assert 'from_pretrained("me/tuned")' in (tmp_path / "out" / "README.md").read_text()
    assert "pushed to https://hub/me/tuned" in capsys.readouterr().out
    for repo in ("tuned", "me/tu ned", "a/b/c"):
        refused("is no name of a hub repository .*give USER/NAME", push, clip, tmp_path / "no", repo)
    hub.whoami.side_effect = OSError("no network")
    refused("does not know this account .*run hf auth login, or set HF_TOKEN", push, clip, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    hub.whoami.side_effect, hub.upload_folder.side_effect = None, OSError("no network")
    failed("is written, but was not pushed to me/tuned .*hf upload me/tuned", push, clip, tmp_path / "no")
    assert (tmp_path / "no" / "README.md").exists()


def test_hub_ids_and_towers_that_transformers_cannot_hold(clip):
    assert origins.hub_id("hf-hub:timm/base") == origins.hub_id("timm/base") == "timm/base"
    assert not any(map(origins.hub_id, [clip.where, "", "no/there.pt", "no/there.pth", "no/there.safetensors"]))
    text = dataclasses.replace(CLIP.text, causal=False)
    refused("use --format=open_clip", lambda: names.transformers_configs(dataclasses.replace(CLIP, text=text))[0])


@pytest.mark.parametrize("tag", list(TABLE))
def test_every_backbone_has_configs_of_transformers(tag):
    """They describe what was exported; those of open_clip are compared with its own in tests/parity."""
    free = dict.fromkeys(("source", "open_clip_name", "select", "add_text", "readout"), "")
    found, silent = names.from_transformers(*names.transformers_configs(TABLE[tag]), tag)
    assert dataclasses.replace(found, **free) == dataclasses.replace(TABLE[tag], **free) and not silent


@pytest.mark.attack
@pytest.mark.parametrize("seed", range(3))
def test_weights_that_are_not_finite_are_named(clip, tmp_path, seed):
    """And not said to be read back differently, since NaN is not equal to itself."""
    rng = np.random.default_rng(seed)
    name = sorted(clip.tensors)[rng.integers(len(clip.tensors))]
    array = np.array(clip.tensors[name])
    array.flat[(at := rng.integers(array.size))] = rng.choice([np.nan, np.inf, -np.inf])
    changed = formats.Tensor(array.shape, array.dtype, lambda: array)
    broken = dataclasses.replace(clip, tensors=formats.Tensors({**clip.tensors, name: changed}, clip.tensors.files))
    for fmt in ("open_clip", "hf"):
        says = rf": the tensor {name} has values that are NaN or infinite"
        refused(says, layouts.export, broken, clip.spec, tmp_path / fmt, fmt)
    array.flat[at] = 1e6
    refused("does not fit float16", layouts.export, broken, clip.spec, tmp_path / "a", "open_clip", dtype="float16")
    assert not list(tmp_path.iterdir())


SPEC = dataclasses.replace(CLIP_FOLDER, text=dataclasses.replace(CLIP_FOLDER.text, vocab_size=600))


def source_of(folder, *names) -> origins.ClipSource:
    files = tuple(file for n in (names or origins.TOKENIZER_FILES) if (file := Path(folder, n)).exists())
    return origins.ClipSource("runs/a", "checkpoint", formats.Tensors({}, []), SPEC, tokenizer=files)


def exported(tmp_path, source):
    formats.write_json(tmp_path / "config.json", names.transformers_configs(SPEC)[0])
    layouts.write_tokenizer(tmp_path, source, SPEC, "hf")
    return tmp_path


def test_whole_tokenizers_are_copied_and_who_needs_none(tmp_path, clip):
    source = source_of(clip.where)
    assert layouts.without_tokenizer(source, SPEC, "hf") == ""
    ids = AutoTokenizer.from_pretrained(exported(tmp_path, source))(["a dog"])["input_ids"][0]
    assert len(ids) == 6 and len(set(ids)) == 6
    source = source_of(clip.where, "none")
    assert layouts.without_tokenizer(source, SPEC, "pt") == ""
    assert layouts.without_tokenizer(source, dataclasses.replace(SPEC, text=NO_TEXT), "hf") == ""
    assert "--tokenizer=FOLDER" in layouts.without_tokenizer(source, SPEC, "open_clip")
    openai = dataclasses.replace(SPEC, text=dataclasses.replace(SPEC.text, vocab_size=49408))
    own, other = (layouts.without_tokenizer(source, openai, fmt) for fmt in ("open_clip", "hf"))
    assert own == "" != other


def test_what_is_not_whole_is_refused_and_named(tmp_path, clip):
    """Not written in part, from which transformers makes a tokenizer that knows no word."""
    for name in ("vocab.json", "merges.txt", "none"):
        source, folder = source_of(clip.where, name), tmp_path / name
        folder.mkdir()
        assert not (exported(folder, source) / "vocab.json").exists()
        with pytest.raises(ValueError):
            AutoTokenizer.from_pretrained(folder)
        note = layouts.without_tokenizer(source, SPEC, "hf")
        assert "vocab.json with merges.txt" in note and "--tokenizer=FOLDER" in note
        added = layouts.with_tokenizer(source, SPEC, "hf", clip.where)
        assert layouts.without_tokenizer(added, SPEC, "hf") == "" and "vocab.json" in {f.name for f in added.tokenizer}
    (partial := tmp_path / "partial").mkdir()
    shutil.copy(Path(clip.where, "vocab.json"), partial)
    for folder, spec, named in (
        (partial, SPEC, "it needs tokenizer.json or vocab.json with merges.txt"),
        (tmp_path / "nowhere", SPEC, "--tokenizer="),
        (clip.where, dataclasses.replace(SPEC, text=NO_TEXT), "leave it out"),
        (clip.where, CLIP_FOLDER, "514 tokens"),
    ):
        refused(named, layouts.with_tokenizer, source, spec, "hf", str(folder))
