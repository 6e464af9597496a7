"""Sources whose config is read without the library that wrote them."""

import pytest
from specs import DINOV2

from diva_jax.common.errors import UserError
from diva_jax.weights import hf, readers


@pytest.mark.parametrize("option", ["use_mask_token", "qkv_bias"])
def test_dinov2_options_that_are_not_implemented_are_named(option):
    config = hf.to_transformers(DINOV2, "float32") | {option: False}
    with pytest.raises(UserError, match=f"{option}=false"):
        hf.from_transformers(config, {}, "x")


def test_a_transformers_model_that_is_not_known_lists_those_that_are():
    with pytest.raises(UserError, match="is a 'bert' model: give the folder of a whole .*Dinov2Model.* or SiglipModel"):
        hf.from_transformers({"model_type": "bert"}, {}, "x")


@pytest.mark.parametrize(("vocab", "activation"), [(32000, ""), (256000, "gelu_tanh")], ids=["siglip", "siglip2"])
def test_published_siglip_folders_are_read_as_open_clip_runs_them(vocab, activation):
    """transformers' published configs leave `hidden_act` at its default, tanh, in both towers of both versions."""
    config = dict(model_type="siglip", text_config=dict(vocab_size=vocab), vision_config=dict(image_size=224))
    spec, silent = hf.from_transformers(config, {}, "x")
    assert (spec.activation, spec.text.activation, silent) == ("gelu", activation, {"activation"})
    giant = dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=16, intermediate_size=6144, image_size=256)
    spec, _ = hf.from_transformers(config | dict(vision_config=giant), {}, "x")
    assert spec.activation == "gelu_tanh" and spec.text.activation == ("gelu" if vocab == 32000 else "")


def test_fingerprint_is_of_contents_and_order(tmp_path):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (readers.fingerprint([tmp_path / n]) for n in "abc")
    assert a == c != b and len(a) == 64
    assert readers.fingerprint([tmp_path / "a", tmp_path / "b"]) != readers.fingerprint(
        [tmp_path / "b", tmp_path / "a"]
    )
