"""Families: what a model architecture's cases, probes and oracle are.  One file a family.

A family file imports nothing heavy when it is imported; `conformance list` reads it in milliseconds.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from conformance.probes import ProbeSpec

FAMILIES = ("llama", "mistral", "mixtral")

Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one case is made.  Everything in a case follows from its recipe and the oracle.

    name: `<family>/<case>`.
    summary: one line for `conformance list cases`.
    config: the content of config.json.
    weights: label of the weight draws; recipes with one label share every tensor of equal name and shape.
    batch, seq: shape of the token ids.
    input_ids: the token ids themselves, where drawn ones would not do.
    claims: check -> dtypes.
    store: what the golden keeps beside logits and block outputs: "probes",
        "gradients", "blocks", "positions", "loss".
    last_rows: compare (and store) only so many last rows of the sequence.
    field: the config field that a field case moves, with counterfactuals: label -> the configuration a candidate
        effectively runs when it makes that mistake (the label completes "equals the oracle with …").
    """

    name: str
    summary: str
    config: Config
    weights: str
    batch: int = 4
    seq: int = 11
    input_ids: tuple[tuple[int, ...], ...] | None = None
    claims: Mapping[str, tuple[str, ...]]
    store: frozenset[str] = frozenset()
    last_rows: int | None = None
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
        one-layer checkpoint that feeds block N those inputs when it is given arange(batch · seq) as ids.
    probe_sizes: config, batch, seq -> size of every axis that the probes name.
    library_paths: part of a module path on the hub -> what the oracle's library calls it in memory, where that differs.
    oracle_settings: what the oracle's configuration needs beside config.json (an expert kernel that has float64, …).
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
    block_checkpoint: Callable[..., tuple[Config, dict[str, Any]]]
    kernel_probes: Callable[[Config], dict[str, tuple[str, str]]]
    probe_sizes: Callable[[Config, int, int], dict[str, int]]
    library_paths: Mapping[str, str] = dataclasses.field(default_factory=dict)
    oracle_settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def get(name: str) -> Family:
    """The family called `name`.  Raises: ValueError naming the families there are."""
    if name not in FAMILIES:
        raise ValueError(f"unknown family {name!r}; there is {', '.join(FAMILIES)}")
    return import_module(f"conformance.families.{name}").FAMILY  # type: ignore[no-any-return]
