"""Terms that a config adds to the loss of any objective: `config.anchor`, `config.contrast` and `config.relation`.

Each compares the tuned encoder's pooled embedding of the input "image", resized to the backbone's resolution as its own
preprocessing does, with what a frozen model makes of the same record. All terms share one pass of the tuned encoder.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from diva_jax.common.errors import UserError
from diva_jax.common.fields import above, between, choice, field, parse
from diva_jax.data import inputs, preprocess
from diva_jax.models import backbones
from diva_jax.models.backbones.shared.transformer import Text
from diva_jax.models.layers import widened
from diva_jax.objectives.contract import Cacheable, Objective
from diva_jax.objectives.shared import pairs
from diva_jax.weights import parts


def _weight(of: str):
    return field(0.0, f"{of} is added to the loss with this weight; 0: it is not.", between(0, 1e38))


@dataclasses.dataclass(frozen=True)
class AnchorOptions:
    """`config.anchor`."""

    weight: float = _weight("The squared distance of the pooled embedding to the untuned encoder's")
    of: str = choice(
        ("embedding", "unit"),
        "The distance is that of the embeddings, summed over dimensions (embedding), or that of embeddings of length "
        "one, the mean over dimensions (unit).",
    )


@dataclasses.dataclass(frozen=True)
class ContrastOptions:
    """`config.contrast`."""

    weight: float = _weight("CLIP's contrastive loss of images and their captions, which the frozen text tower embeds,")
    temperature: float = field(0.01, "Cosines are divided by this constant, which is not trained.", above(0))
    tokenizer: str = field("", "The tokenizer's files are in this folder; if empty, they are those of backbone.source.")


@dataclasses.dataclass(frozen=True)
class RelationOptions:
    """`config.relation`."""

    weight: float = _weight("The divergence of the similarities within the batch from those of config.teacher")
    temperature: float = field(0.1, "Cosines are divided by this before the softmax of each row.", above(0))
    with_self: bool = field(True, "Whether an image's similarity to itself takes part.")


# Term -> its section. The names are also those of the frozen models' parameters, which no stage trains.
TERMS = {"anchor": AnchorOptions, "contrast": ContrastOptions, "relation": RelationOptions}


def wanted(config) -> tuple[str, ...]:
    """The terms whose weight is not 0; the config of an earlier version's run may lack some."""
    return tuple(term for term in TERMS if config.get(term, {}).get("weight"))


@dataclasses.dataclass(frozen=True)
class _Terms:
    """What the terms of a config need; `dtypes` are what the frozen models compute in and are held in."""

    names: tuple[str, ...]
    anchor: AnchorOptions
    contrast: ContrastOptions
    relation: RelationOptions
    dtypes: tuple[str, str]
    cached: bool
    image: inputs.Input
    spec: backbones.Spec
    teacher: backbones.Spec | None


@functools.cache
def with_terms(kind: type[Objective]) -> type[Objective]:
    """`kind`, with an input "image", uint8 [S, S, 3], and the terms of its config added to its loss, each a metric
    without its weight. They cost a pass of each frozen model, and a forward and a backward one of the tuned encoder."""

    class WithTerms(kind):
        # None while the constructor of `kind` runs: it then has no terms.
        terms: _Terms | None = None

        def __init__(self, config, *, rngs):
            super().__init__(config, rngs=rngs)
            names, spec, own = wanted(config), backbones.spec_of(config), super().inputs
            if "image" not in own:
                given, has = f"config.{names[0]}.weight={config[names[0]].weight}", ", ".join(own)
                problem = f"{given} needs an objective with an input named image, and {config.objective} has {has}"
                raise UserError(f"{problem}: set it to 0")
            teacher = backbones.spec_of(config, "teacher") if "relation" in names else None
            sections = [parse(section, config.get(n, {}), f"config.{n}") for n, section in TERMS.items()]
            dtypes, cached = (config.dtype, config.frozen_dtype), bool(config.data.latents)
            self.terms = _Terms(names, *sections, dtypes, cached, own["image"], spec, teacher)
            self.compares_images = self.compares_images or names != ("anchor",)
            # Frozen models have no backward pass that would recompute; on TPUs remat divides a large batch into parts.
            kw = dict(rngs=rngs, dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(config.frozen_dtype), remat=True)
            for name in names * (not cached):
                of = teacher if name == "relation" else spec
                setattr(self, name, Text(of, **kw) if name == "contrast" else backbones.build(of, **kw))

        @property
        def inputs(self):
            """The objective's own, and "caption" for the contrast where it has none, int32 [context_length]; from a
            cache, instead, an embedding for each term, under its name."""
            found, text = super().inputs, self.terms.spec.text
            if self.terms.cached:
                mine = {n: self.cacheable[n] for n in self.terms.names}
                return found | {n: inputs.Cached(c.shape, n, "caption" in c.reads) for n, c in mine.items()}
            if "contrast" not in self.terms.names or "caption" in found:
                return found
            folder = self.terms.contrast.tokenizer
            tokenizer = parts.tokenizer(self.terms.spec.source, text, folder, "config.contrast.tokenizer")
            return {**found, "caption": inputs.Tokens(text.context_length, tokenizer)}

        @property
        def cacheable(self):
            """The objective's own, and the embedding that each term compares with."""
            found, terms = dict(super().cacheable), self.terms
            for name in terms.names if terms else ():
                relation = name == "relation"
                of, section = (terms.teacher, "config.teacher") if relation else (terms.spec, "config.backbone")
                open_part, reads = (parts.text, ("caption",)) if name == "contrast" else (parts.vision, ("image",))
                described = dataclasses.asdict(dataclasses.replace(of, source=""))
                facts = {"spec": described, "image": str(terms.image), "dtypes": terms.dtypes}
                source = {name: open_part(of.source, of, section)}
                make, folder = functools.partial(self._frozen, name), None
                if name == "contrast":
                    folder = lambda: terms.contrast.tokenizer or parts.tokenizer_folder(terms.spec.source)  # noqa: E731
                found[name] = Cacheable((of.embed_dim,), facts, source, make, reads, folder)
            return found

        def pretrained(self):
            models = {n: self.cacheable[n].parts[n] for n in self.terms.names * (not self.terms.cached)}
            return {**super().pretrained(), **models}

        def loss(self, batch, keys, *progress):
            """As the objective's own, whose metrics it keeps; without a loss of its own, "loss" is the sum of terms."""
            value, metrics = super().loss(batch, keys, *progress)
            terms, found = self.terms, {}
            x = self._pooled(self.towers()["vision"], terms.spec, batch)
            if "anchor" in terms.names:
                untuned = self._frozen("anchor", batch)
                unit = terms.anchor.of == "unit"
                away = jnp.square(pairs.unit(x) - pairs.unit(untuned) if unit else x - untuned)
                found["anchor"] = jnp.mean(away if unit else jnp.sum(away, axis=-1))
            if "contrast" in terms.names:
                logits = pairs.cosines(x, self._frozen("contrast", batch)) / terms.contrast.temperature
                found["contrast"] = pairs.contrast(logits)
            if "relation" in terms.names:
                o, taught = terms.relation, self._frozen("relation", batch)
                found["relation"] = pairs.relation(x, taught, o.temperature, o.with_self)
            total = value + sum(getattr(self.terms, name).weight * found[name] for name in found)
            return total, {**metrics, **found, **({"loss": total} if kind.terms_alone else {})}

        def _pooled(self, tower, spec, batch):
            """A tower's embedding of the images of a batch, [B, D], in float32 or wider."""
            image = preprocess.to_float(batch["image"])
            return widened(tower.encode(preprocess.backbone_view(image, spec.image_size, spec.mean, spec.std)).pooled)

        def _frozen(self, name, batch):
            """The embedding that a term compares with, [B, D]: of a cache, or computed."""
            if self.terms.cached:
                return batch[name].astype(jnp.float32)
            with jax.named_scope(name):
                if name == "contrast":
                    return self.contrast.encode(batch["caption"])
                spec = self.terms.teacher if name == "relation" else self.terms.spec
                return self._pooled(getattr(self, name), spec, batch)

    return WithTerms
