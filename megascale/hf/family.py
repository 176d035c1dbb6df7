"""A model family of transformers as a table: its config's fields and its tensors' names."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from megascale.config.schema import ModelConfig
from megascale.errors import UserError
from megascale.hf.fields import Field, Unsupported, Values, resolved
from megascale.hf.layouts import PLAIN, Layout, Shape

# Fields of config.json that say nothing about how logits are computed from weights.
_WITHOUT_EFFECT = (
    *("model_type", "architectures", "transformers_version", "_name_or_path", "name_or_path"),
    *("torch_dtype", "dtype", "use_cache", "return_dict", "output_*", "use_return_dict"),
    *("*_token_id", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
    *("_attn_implementation*", "attn_implementation", "cache_implementation", "use_bfloat16"),
    *("chunk_size_feed_forward", "gradient_checkpointing", "unsloth_*", "_commit_hash"),
)
EMBEDDING = "model.embedding.tokens.weight"
# What decides nothing about the function that a model computes, when two models are compared.
_NOT_COMPARED = ("dropout", "attention_dropout", "init_std")


@dataclass(frozen=True)
class Row:
    """Tensors of theirs and the parameters of ours that they hold.

    In both names `{layer}` stands for a layer's number and `{kind}` for weight or bias.

    Attributes:
        theirs: name in their files.
        ours: our parameters' names, several where theirs is fused.
        layout: how ours lie in theirs.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: Layout = PLAIN


@dataclass(frozen=True)
class Entry:
    """A row for one layer and one kind: a tensor of theirs that exists."""

    theirs: str
    ours: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Variant:
    """The class of transformers for models of a family that have a certain parameter.

    Attributes:
        parameter: name of ours.
        architecture, auto_class: as in `Family`.
    """

    parameter: str
    architecture: str
    auto_class: str


@dataclass(frozen=True)
class Family:
    """One `model_type`.

    Attributes:
        model_type: its name in config.json.
        architecture: transformers' class with the head, for config.json.
        fields: config.json <-> ModelConfig.
        rows: tensors <-> parameters.
        prefix: what a file of the model without its head leaves out of the names.
        without_effect: more config.json fields that decide nothing, as patterns.
        skipped: tensors of theirs that are no parameters (buffers of old versions), as patterns.
        aliases: other names of tensors in newer or older files -> the name in `rows`.
        old_ends: ends of names in old files -> those in `rows`.
        copies: tensors that a file may hold beside or instead of a tied one -> the parameter of
            ours that both are.
        heads: parameters of ours, as patterns: what matches one of them may be absent from a file
            as a whole, and is drawn then; tensors of a head that a model lacks are left out.
        sentence_head: the tensor that says that a file has a sentence objective; "" for families
            without one.
        auto_class: transformers' class that loads it by its folder, for the model card.
        variants: classes of models with more heads; the first whose parameter is there.
        pipeline_tag: what it does in the hub's words, for the model card.
    """

    model_type: str
    architecture: str
    fields: tuple[Field, ...]
    rows: tuple[Row, ...]
    prefix: str = ""
    without_effect: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    old_ends: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=lambda: {"lm_head.weight": EMBEDDING})
    heads: tuple[str, ...] = ()
    sentence_head: str = ""
    auto_class: str = "AutoModelForCausalLM"
    variants: tuple[Variant, ...] = ()
    pipeline_tag: str = "text-generation"

    @property
    def continues_texts(self) -> bool:
        """Whether its models generate, and so have settings of generation."""
        return self.pipeline_tag == "text-generation"

    def read_config(self, theirs: Values) -> dict[str, Any]:
        """Settings of `model` for a config.json.

        Raises:
            UserError: fields that change the computation and are not supported; all are named.
        """
        settings: dict[str, Any] = {}
        problems = [f"{name} = {theirs[name]!r}" for name in self._unknown(theirs)]
        for row in self.fields:
            try:
                settings.update(row.read(theirs))
            except Unsupported as error:
                problems.append(str(error))
            except (TypeError, KeyError, AttributeError, ValueError) as error:
                problems.append(f"{', '.join(row.names)}: cannot be read ({error!r})")
        if problems:
            raise UserError(
                f"a {self.model_type} with settings that megascale does not compute:\n    "
                + "\n    ".join(problems),
                rule="every field of config.json that changes the logits must be supported",
                remedy="if a field named here has no effect on the logits, remove it from "
                "config.json",
            )
        return settings

    def _unknown(self, theirs: Values) -> list[str]:
        known = {name for row in self.fields for name in row.names}
        patterns = (*_WITHOUT_EFFECT, *self.without_effect)
        return [
            name
            for name, value in theirs.items()
            if name not in known
            and value not in (None, False, "", [], {}, 0)
            and not any(fnmatchcase(name, pattern) for pattern in patterns)
        ]

    def write_config(self, model: ModelConfig) -> dict[str, Any]:
        """Fields of config.json for a model; see `differences` for whether they describe it."""
        ours = resolved(model)
        values: dict[str, Any] = {}
        for row in self.fields:
            values.update(row.write(ours))
        return values

    def differences(self, model: ModelConfig) -> list[str]:
        """What a model of this family would compute differently; empty when it can be written."""
        try:
            back = ModelConfig(**self.read_config(self.write_config(model)))
        except (UserError, ValueError) as error:
            return [str(error)]
        ours, theirs = resolved(model), resolved(back)
        return [
            f"model.{name} = {ours[name]!r}, a {self.model_type} has {theirs[name]!r}"
            for name in ours
            if name not in _NOT_COMPARED and ours[name] != theirs[name]
        ]

    def entries(self, shapes: Mapping[str, Shape], num_layers: int) -> list[Entry]:
        """Their tensors that make up the parameters `shapes` of ours.

        A row whose parameters this model lacks (biases, a head's own weight) is left out.

        Raises:
            UserError: a parameter of ours that no row holds.
        """
        found = [
            entry
            for row in self.rows
            for entry in _expanded(row, num_layers)
            if all(name in shapes for name in entry.ours)
        ]
        rest = set(shapes) - {name for entry in found for name in entry.ours}
        if rest:
            raise UserError(
                f"a {self.model_type} has no place for {', '.join(sorted(rest))}",
                rule="every parameter must have a tensor in the other format",
                remedy="choose another --family",
            )
        return found

    def head_tensors(self) -> set[str]:
        """Names of theirs that belong to a head which a file or a model may lack."""
        return {
            entry.theirs
            for row in self.rows
            for entry in _expanded(row, 0)
            if any(fnmatchcase(entry.ours[0], pattern) for pattern in self.heads)
        }

    def loaded_by(self, parameters: Container[str]) -> tuple[str, str]:
        """(architecture, auto_class) of transformers for a model with these parameters."""
        for variant in self.variants:
            if variant.parameter in parameters:
                return variant.architecture, variant.auto_class
        return self.architecture, self.auto_class

    def canonical_name(self, name: str, expected: Container[str]) -> str:
        """The name in `rows` of a tensor in a file, which may be spelt in an older way."""
        for old, new in self.old_ends.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        name = self.aliases.get(name, name)
        return (
            name if name in expected or self.prefix + name not in expected else self.prefix + name
        )

    def is_skipped(self, name: str) -> bool:
        """Whether a tensor in a file is a buffer that no longer exists."""
        return any(fnmatchcase(name, pattern) for pattern in self.skipped)


def _expanded(row: Row, num_layers: int) -> Iterator[Entry]:
    ours = (row.ours,) if isinstance(row.ours, str) else row.ours
    layers = range(num_layers) if "{layer}" in row.theirs else (0,)
    kinds = ("weight", "bias") if "{kind}" in row.theirs else ("",)
    for layer in layers:
        for kind in kinds:
            names = tuple(name.format(layer=layer, kind=kind) for name in ours)
            yield Entry(row.theirs.format(layer=layer, kind=kind), names, row.layout)
