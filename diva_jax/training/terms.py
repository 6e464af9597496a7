"""Terms that a config adds to the loss of any objective: `config.anchor`, `config.contrast` and `config.relation`.

Each compares the tuned encoder's pooled embedding of the input "image", resized to the backbone's resolution as its own
preprocessing does, with what a frozen model makes of the same record. All terms share one pass of the tuned encoder.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from diva_jax.common.errors import UserError
from diva_jax.common.fields import above, between, field, one_of, parse
from diva_jax.costs import flops
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.text import Text
from diva_jax.objectives import Objective
from diva_jax.objectives.shared import pairs
from diva_jax.weights import parts


@dataclasses.dataclass(frozen=True)
class AnchorOptions:
    """`config.anchor`."""

    weight: float = field(
        0.0,
        "The squared distance of the pooled embedding to the untuned encoder's is added to the loss with this weight; "
        "0: it is not.",
        between(0, 1e38),
    )
    of: str = field(
        "embedding",
        "The distance is that of the embeddings, summed over dimensions (embedding), or that of embeddings of length "
        "one, the mean over dimensions (unit).",
        one_of("embedding", "unit"),
    )


@dataclasses.dataclass(frozen=True)
class ContrastOptions:
    """`config.contrast`."""

    weight: float = field(
        0.0,
        "CLIP's contrastive loss of the batch's images with their captions, which the backbone's frozen text tower "
        "embeds, is added to the loss with this weight; 0: it is not.",
        between(0, 1e38),
    )
    temperature: float = field(0.01, "Cosines are divided by this constant, which is not trained.", above(0))
    tokenizer: str = field("", "The tokenizer's files are in this folder; if empty, they are those of backbone.source.")


@dataclasses.dataclass(frozen=True)
class RelationOptions:
    """`config.relation`."""

    weight: float = field(
        0.0,
        "The divergence of the similarities within the batch from those of config.teacher is added to the loss with "
        "this weight; 0: it is not.",
        between(0, 1e38),
    )
    temperature: float = field(0.1, "Cosines are divided by this before the softmax of each row.", above(0))
    with_self: bool = field(True, "Whether an image's similarity to itself takes part.")


# Term -> its section. The names are also those of the frozen models' parameters, which no stage trains.
TERMS = {"anchor": AnchorOptions, "contrast": ContrastOptions, "relation": RelationOptions}


def wanted(config) -> tuple[str, ...]:
    """The terms whose weight is not 0; the config of an earlier version's run may lack some."""
    return tuple(term for term in TERMS if config.get(term, {}).get("weight"))


@dataclasses.dataclass(frozen=True)
class _Terms:
    """The terms that a config asks for, their sections, the images of a micro-batch, the backbone, and the teacher,
    None where none is needed."""

    names: tuple[str, ...]
    anchor: AnchorOptions
    contrast: ContrastOptions
    relation: RelationOptions
    micro_batch: int
    spec: backbones.Spec
    teacher: backbones.Spec | None


@functools.cache
def with_terms(kind: type[Objective]) -> type[Objective]:
    """`kind`, with an input "image", uint8 [S, S, 3], and the terms of its config added to its loss, each a metric
    without its weight.

    They cost a pass of each frozen model, and a forward and a backward pass of the tuned encoder.
    """

    class WithTerms(kind):
        def __init__(self, config, *, rngs):
            super().__init__(config, rngs=rngs)
            names, spec = wanted(config), backbones.spec_of(config)
            if "image" not in super().inputs:
                raise UserError(
                    f"config.{names[0]}.weight={config[names[0]].weight} needs an objective with an input named image, "
                    f"and {config.objective} has {', '.join(super().inputs)}: set it to 0"
                )
            teacher = backbones.spec_of(config, "teacher") if "relation" in names else None
            sections = {n: parse(kind, config.get(n, {}), f"config.{n}") for n, kind in TERMS.items()}
            self.terms = _Terms(
                names, **sections, micro_batch=config.batch_size // config.accum, spec=spec, teacher=teacher
            )
            self.compares_images = self.compares_images or names != ("anchor",)
            kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.frozen_dtype))
            models = {
                "anchor": lambda: backbones.build(spec, **kw),
                "contrast": lambda: Text(spec, **kw),
                "relation": lambda: backbones.build(teacher, **kw),
            }
            for name in names:
                setattr(self, name, models[name]())

        @property
        def inputs(self):
            """The objective's own, and "caption" for the contrast where it has none: int32 [context_length]."""
            found, text = super().inputs, self.terms.spec.text
            if "contrast" not in self.terms.names or "caption" in found:
                return found
            tokenizer = parts.tokenizer(self.terms.spec.source, text, self.terms.contrast.tokenizer)
            return {**found, "caption": inputs.Tokens(text.context_length, tokenizer)}

        def pretrained(self):
            spec, teacher = self.terms.spec, self.terms.teacher
            sources = {"anchor": parts.vision(spec.source, spec), "contrast": parts.text(spec.source, spec)}
            if teacher is not None:
                sources["relation"] = parts.vision(teacher.source, teacher, "config.teacher")
            return {**super().pretrained(), **{name: sources[name] for name in self.terms.names}}

        def flops(self):
            counted, spec = super().flops(), self.terms.spec
            if counted is None:
                return None
            pairs_of, teacher = 2 * self.terms.micro_batch, self.terms.teacher
            models = {
                "anchor": lambda: flops.vision(spec),
                "contrast": lambda: flops.text(spec) + 2 * pairs_of * spec.embed_dim,
                "relation": lambda: flops.vision(teacher) + pairs_of * (3 * spec.embed_dim + teacher.embed_dim),
            }
            return counted + 3 * flops.vision(spec) + sum(models[name]() for name in self.terms.names)

        def loss(self, batch, keys):
            """As the objective's own, whose metrics it keeps; without a loss of its own, "loss" is the sum of terms."""
            value, metrics = super().loss(batch, keys)
            found = self._values(batch)
            total = value + sum(getattr(self.terms, name).weight * found[name] for name in found)
            return total, {**metrics, **found, **({"loss": total} if kind.terms_alone else {})}

        def _values(self, batch):
            """Term -> its value for a batch, []."""
            terms, image, found = self.terms, preprocess.to_float(batch["image"]), {}

            def pooled(tower, spec):
                view = preprocess.backbone_view(image, spec.image_size, spec.mean, spec.std)
                x = tower.encode(view).pooled
                return x.astype(jnp.promote_types(x.dtype, jnp.float32))

            x = pooled(self.towers()["vision"], terms.spec)
            if "anchor" in terms.names:
                with jax.named_scope("anchor"):
                    untuned = pooled(self.anchor, terms.spec)
                if terms.anchor.of == "unit":
                    found["anchor"] = jnp.mean(jnp.square(pairs.unit(x) - pairs.unit(untuned)))
                else:
                    found["anchor"] = jnp.mean(jnp.sum(jnp.square(x - untuned), axis=-1))
            if "contrast" in terms.names:
                with jax.named_scope("contrast"):
                    texts = self.contrast.encode(batch["caption"])
                found["contrast"] = pairs.contrast(pairs.cosines(x, texts) / terms.contrast.temperature)
            if "relation" in terms.names:
                with jax.named_scope("relation"):
                    taught = pooled(self.relation, terms.teacher)
                found["relation"] = pairs.relation(x, taught, terms.relation.temperature, terms.relation.with_self)
            return found

    return WithTerms
