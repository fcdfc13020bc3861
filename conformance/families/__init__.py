"""Families: what a model architecture's or a component's cases, probes and oracle are.  One file a family.

A family file imports nothing heavy when it is imported; `conformance list` reads it in milliseconds.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from conformance.families.properties import Properties, Relation
from conformance.probes import ProbeSpec

COMPONENTS = (
    "rnn",
    "lstm",
    "gru",
    "additive_attention",
    "luong_attention",
    "lstmn",
    "rms_norm",
    "layer_norm",
    "add_and_norm",
    "activations",
    "rotary",
    "sinusoidal_positions",
    "learned_positions",
    "feed_forward",
    "swiglu",
    "multi_head_attention",
    "sliding_window_attention",
    "relative_attention",
    "sparse_moe",
    "switch_ffn",
)
TOKENIZERS = ("sentencepiece_bpe", "byte_level_bpe")
MODELS = (
    "rnn_search",
    "gnmt",
    "transformer",
    "gpt",
    "transformer_xl",
    "gpt2",
    "gpt3",
    "switch_transformer",
    "llama",
    "mistral",
    "mixtral",
    "phi",
)
FAMILIES = (*COMPONENTS, *TOKENIZERS, *MODELS)

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one case is made.  Everything in a case follows from its recipe and the oracle.

    name: `<family>/<case>`.
    summary: one line for `conformance list cases`.
    config: the content of config.json.
    weights: label of the weight draws; recipes with one label share every tensor of equal name and shape.
    batch, seq: shape of the token ids; of an encoder–decoder model, of the encoder's.
    target: length of the decoder's token ids; of encoder–decoder models only.
    input_ids: the token ids themselves, where drawn ones would not do.
    segments: lengths of the pieces that the ids are fed in, of models whose memory makes that a difference.
    claims: check -> dtypes.
    store: what the golden keeps beside logits and block outputs: "probes",
        "gradients", "blocks", "positions", "loss", "auxiliary" (the losses that a router adds),
        "segment_gradients" (those of the last segment's loss).
    last_rows: compare (and store) only so many last rows of the sequence.
    scaled: ending of a weight's name -> power of two that it is multiplied by, for cases that stress a dtype's range.
    field: the config field that a field case moves, with counterfactuals: label -> the configuration a candidate
        effectively runs when it makes that mistake (the label completes "equals the oracle with …").
    """

    name: str
    summary: str
    config: Config
    weights: str
    batch: int = 4
    seq: int = 11
    target: int | None = None
    input_ids: tuple[tuple[int, ...], ...] | None = None
    segments: tuple[int, ...] = ()
    claims: Mapping[str, tuple[str, ...]]
    store: frozenset[str] = frozenset()
    last_rows: int | None = None
    scaled: Mapping[str, float] = dataclasses.field(default_factory=dict)
    field: str | None = None
    counterfactuals: Mapping[str, Config] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ConfigField:
    """One key of the family's config.json that changes the maths: default and meaning, for `conformance explain`."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model architecture under test.

    equations: the maths in a few lines of Markdown, in the paper's symbols.
    oracle: the class of transformers that decides.
    tensor_shapes: config -> hub name -> shape, what a checkpoint of that config holds.
    probes: config -> its probes in computational order.
    module_probes: config -> probe -> (hub module path, "input" or "output"), for probes that a module boundary shows.
    kernel_probes: config -> probe -> (path of the nn.Identity that shows it in reference_impl, its name in the
        oracle's attention kernel, "query", "key", "scores", "weights", "context", or in its kernel of experts,
        "routing_weights", "expert_outputs"), for probes inside these.
    block_checkpoint: config, weights, inputs of block N (batch, seq, hidden), N -> the configuration and weights of a
        one-layer checkpoint that feeds block N those inputs when it is given arange(batch · seq) as ids; None where
        one block cannot be had alone so.
    encoder_decoder: the model reads `input_ids` with an encoder, and its logits belong to `decoder_input_ids`.
    probe_sizes: config, batch, seq -> size of every axis that the probes name; of an encoder–decoder model config,
        batch, seq (the decoder's length), source (the encoder's).
    oracle_settings: what the oracle's configuration needs beside config.json (an expert kernel that has float64, …).
    double_settings: the same at true double precision only (a guard that insists on torch.float32 switched off, …).
    oracle_kernels: the attention kernels of the oracle, whose spread in a working dtype is its own error.
    oracle_class: "module:Class" of what runs the oracle, a `HuggingFace`.
    oracle_requires: the releases of transformers that have the oracle and that its class knows; None: it needs none.
    layers_key, positions_key: what config.json calls the number of blocks and the end of the context.
    module_kinds: name of a weight's module -> what kind of weight it is (`conformance.draws.KINDS`), for modules whose
        names do not say it.
    copies: name of a tensor -> of the one that it repeats, for what a checkpoint holds twice.
    whole_rows_only: config, length of the longest sequence -> whether logits may depend on padding, and on the pieces
        in which a text is fed (experts that have no room for all).
    properties: what its models promise for every input; None: nothing that is searched.
    """

    name: str
    title: str
    paper: str
    equations: str
    oracle: str
    fields: tuple[ConfigField, ...]
    recipes: tuple[Recipe, ...]
    tensor_shapes: Callable[[Config], dict[str, tuple[int, ...]]]
    probes: Callable[[Config], list[ProbeSpec]]
    module_probes: Callable[[Config], dict[str, tuple[str, str]]]
    block_checkpoint: Callable[..., tuple[Config, dict[str, Any]]] | None = None
    encoder_decoder: bool = False
    kernel_probes: Callable[[Config], dict[str, tuple[str, str]]]
    probe_sizes: Callable[..., dict[str, int]]
    oracle_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    double_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    oracle_kernels: tuple[str, ...] = ("eager", "sdpa")
    oracle_class: str = "conformance.oracles.hugging_face:HuggingFace"
    oracle_requires: str | None = "transformers>=5.18,<6"
    layers_key: str = "num_hidden_layers"
    positions_key: str = "max_position_embeddings"
    module_kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole_rows_only: Callable[[Config, int], bool] = lambda config, longest: False
    properties: Properties | None = None


@dataclass(frozen=True, kw_only=True)
class Value:
    """An argument or a return of a component: its name in the contract, its axes ("batch seq hidden"; none: a plain
    number or word from the settings), and what it is.

    optional: a return that is compared only if the candidate returns it by name.
    """

    name: str
    axes: str | None
    meaning: str
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class ComponentRecipe:
    """How one case of a component is made.

    settings: numbers and words, the content of config.json.
    weights, inputs: name -> shape of a drawn float tensor; or name -> a tensor's nested list (ids, lengths, positions,
        biases of zero).
    deviation: standard deviation of the drawn inputs, by name; 1 where nothing is said.
    compared: a return -> nested list over its first axes, 1 where it is compared; without one, everywhere.  Padding
        whose value no contract states is left out so.
    claims, field, counterfactuals: as in Recipe (label -> settings).
    """

    name: str
    summary: str
    settings: Config
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inputs: Mapping[str, Any]
    deviation: Mapping[str, float] = dataclasses.field(default_factory=dict)
    compared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    claims: Mapping[str, tuple[str, ...]]
    field: str | None = None
    counterfactuals: Mapping[str, Config] = dataclasses.field(default_factory=dict)
    last_rows: None = None

    @property
    def config(self) -> Config:
        return self.settings


@dataclass(frozen=True, kw_only=True)
class Component:
    """One function under test: a norm, a rotation, a recurrent layer.

    arguments: everything that a candidate may declare, by name: inputs, then weights, then settings.
    returns: in the order in which a tuple has them.
    oracle: what decides, for people.
    truth: all tensors by name, settings -> returns by name, in the dtype that the tensors have; called in float64
        (under TrueDouble), and in the working dtypes to measure the oracle's own error unless `exact`.
    exact: the oracle is plain float64 loops; it has no working dtype, and the component claims float64 only.  A single
        case may do without working dtypes as well: its claims say so.
    reference: "module:function" of reference_impl with the same argument names.
    carried: a return -> the argument that takes it when the next piece of a sequence is fed; such a component can be
        fed in pieces, cut and joined along the axis called "seq".
    relations: a property check -> the two calls that it compares.
    """

    name: str
    title: str
    paper: str
    equations: str
    oracle: str
    arguments: tuple[Value, ...]
    returns: tuple[Value, ...]
    recipes: tuple[ComponentRecipe, ...]
    truth: Callable[[dict[str, Any], Config], dict[str, Any]]
    exact: bool = False
    reference: str
    fields: tuple[ConfigField, ...] = ()
    carried: Mapping[str, str] = dataclasses.field(default_factory=dict)
    relations: Mapping[str, Relation] = dataclasses.field(default_factory=dict)

    def relations_of(self, recipe: ComponentRecipe) -> list[str]:
        """The relations that a case has."""
        pieces = ["cache.any_plan"] if "component.chunks" in recipe.claims else []
        searched = recipe.name.split("/")[1] in ("plain", "distinct")
        return pieces + [
            check
            for check, relation in self.relations.items()
            if relation.applies(recipe) and (searched or not relation.everywhere)
        ]

    @property
    def weights(self) -> frozenset[str]:
        """The names of all weights that any of its cases has."""
        return frozenset(name for recipe in self.recipes for name in recipe.weights)


@dataclass(frozen=True, kw_only=True)
class TokenizerRecipe:
    """How one case of a tokenizer is made.

    settings: what config.json and the tokenizer's files say.
    vocabulary: label of the vocabulary, as the family knows it.
    texts: group -> texts that are encoded; the check of a group has its name.
    tokens: group -> rows of tokens by name, beside those of the texts, that are decoded.
    disputed: groups in which the family's second oracle is known to differ.
    claims, field, counterfactuals: as in Recipe (label -> settings); the one dtype of claims is "exact".
    """

    name: str
    summary: str
    settings: Config
    vocabulary: str
    texts: Mapping[str, tuple[str, ...]]
    tokens: Mapping[str, tuple[tuple[str, ...], ...]] = dataclasses.field(default_factory=dict)
    disputed: frozenset[str] = frozenset()
    claims: Mapping[str, tuple[str, ...]]
    field: str | None = None
    counterfactuals: Mapping[str, Config] = dataclasses.field(default_factory=dict)
    last_rows: None = None

    @property
    def config(self) -> Config:
        return self.settings


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A way to turn text into ids and back.

    rules: what it does, in a few lines.
    oracle: what decides, for people.
    files: vocabulary, settings -> the files that a candidate is given, by name, all saying the same.
    truth, second: the files -> the oracle, and one that must agree where nothing is disputed (None: there is none).
    comes_back_as: character -> what `decode` gives for it, where that is not the character itself.
    """

    name: str
    title: str
    paper: str
    rules: str
    oracle: str
    recipes: tuple[TokenizerRecipe, ...]
    files: Callable[[str, Config], dict[str, bytes]]
    truth: Callable[[dict[str, bytes]], Any]
    second: Callable[[dict[str, bytes]], Any] | None = None
    fields: tuple[ConfigField, ...] = ()
    comes_back_as: Mapping[str, str] = dataclasses.field(default_factory=dict)


def claims(recipe: "Recipe | ComponentRecipe | TokenizerRecipe") -> dict[str, tuple[str, ...]]:
    """All claims of a case, check -> dtypes: the goldens' that its recipe states, and its family's properties."""
    if isinstance(recipe, TokenizerRecipe):
        return dict(recipe.claims)
    family = get(recipe.name.split("/")[0])
    if isinstance(recipe, ComponentRecipe):
        return {**recipe.claims, **dict.fromkeys(family.relations_of(recipe), ("float64",))}
    found = {} if family.properties is None else family.properties.of(recipe.name, recipe.config)
    return {**recipe.claims, **found}


def get(name: str) -> Any:
    """The Family, Component or Tokenizer called `name`.  Raises: ValueError naming those there are."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; there is {', '.join(FAMILIES)}")
    return import_module(f"conformance.families.{name}").FAMILY
