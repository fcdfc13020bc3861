"""Rotary positions: which pairs turn, by what angle, and what the angles are computed from."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from conformance.mistakes import Mistake, Swap
from conformance.mistakes.groups import LLAMAS, TURNING
from conformance.mistakes.making import after, each, instead, on_load
from reference_impl.nn import rotary, rotary_layouts
from reference_impl.nn.rotary import LinearScaling, Llama3Scaling

ROTATE = "reference_impl.nn.rotary:rotate"
PARTLY = "reference_impl.nn.rotary:rotate_partly"
TABLES = "reference_impl.nn.rotary:tables"
FREQUENCIES = "reference_impl.nn.rotary:inverse_frequencies"
LLAMA3 = "reference_impl.nn.rotary:llama3_frequency"
READ = "reference_impl.nn.rotary:read_scaling"
APPLY = "reference_impl.nn.rotary_layouts:apply_rotary"
# What turns queries and keys of the decoders.
TURNS = ("reference_impl.nn.attention:GroupedQueryAttention.turn", "reference_impl.models.phi:PhiAttention.turn")

FAMILIES = ("rotary", *TURNING)
FORWARD = ("component.outputs", "golden.logits")
TURNED = ("layers.N.attention.query_rotated", "layers.N.attention.key_rotated")


# --- pairs and sense --------------------------------------------------------------------------------------------------


def no_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos + first * sin), dim=-1)


def backwards(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, cos, sin: original(x, cos, -sin)


def doubled_tables(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = (table.repeat_interleave(2, dim=-1)[:, None] for table in (cos, sin))  # θ0 θ0 θ1 θ1 …
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate


def keys_left_alone(self: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return self.query_rotated(rotary.rotate_partly(query, cos, sin)), self.key_rotated(key)


def turned_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    def turn(self: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        twice = cos**2 - sin**2, 2 * sin * cos  # cos 2φ, sin 2φ
        turned: tuple[Tensor, Tensor] = original(self, query, key, *twice)
        return turned

    return turn


def values_too(original: Callable[..., Any]) -> Callable[..., Any]:
    """`turn` sees no values; cos and sin are those of the layer, which `attend` gets with its values."""

    def forward(self: Any, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any = None) -> Tensor:
        query, key, value = self.project(x)
        value = rotary.rotate_partly(value, cos, sin)
        query, key = self.turn(query, key, cos, sin)
        if cache is not None:
            key, value = cache.append(key, value)
        project_out = self.o_proj if hasattr(self, "o_proj") else self.dense
        output: Tensor = project_out(self.attend(query, key, value, mask).transpose(1, 2).flatten(2))
        return output

    return forward


def first_row_for_all(original: Callable[..., Any]) -> Callable[..., Any]:
    def tables(position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(position_ids[:1].expand_as(position_ids), *args, **kwargs)

    return tables


_PAIRS = (
    Mistake(
        id="rope-layout",
        families=FAMILIES,
        what="Rotates neighbouring pairs (0,1), (2,3), … where the checkpoint pairs element j with j + Dh/2.",
        why="Hugging Face checkpoints store the rows of q_proj and k_proj for half-split pairs; Meta's originals and "
        "GPT-J store neighbours.",
        shows="Position 0 is right, everything after it is wrong; nothing at rotary_dim 2, 1e-3 in a "
        "default-initialised tiny model.",
        fix="Rotate halves, or permute the rows of q_proj and k_proj (and their biases) when converting.",
        seen="InternLM/lmdeploy#2639, transformers#39687, rasbt/LLMs-from-scratch#750",
        swaps=(Swap(ROTATE, instead(rotary_layouts.rotate_interleaved)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-sign",
        families=FAMILIES,
        what="Rotates by −θ: the sines have the wrong sign.",
        why="The score of two tokens then depends on j − i instead of i − j, which trained weights do not know.",
        shows="Position 0 is right; scores are mirrored in time.",
        fix="y1 = x1·cos − x2·sin, y2 = x2·cos + x1·sin: rotate_half is (−x2, x1).",
        seen="common knowledge",
        swaps=(Swap(ROTATE, backwards),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-rotate-half-without-minus",
        families=FAMILIES,
        what="rotate_half returns (x2, x1), without the minus sign.",
        why="What is applied is no rotation any more: lengths change with the position.",
        shows="Position 0 is right, errors of the size of the values after it.",
        fix="rotate_half(x) = (−x2, x1).",
        seen="common knowledge",
        swaps=(Swap(ROTATE, instead(no_sign)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-tables-interleaved",
        families=FAMILIES,
        what="Cosines and sines are laid out θ0 θ0 θ1 θ1 … and used with halves, whose elements need θ0 θ1 … θ0 θ1 ….",
        why="The two elements of a pair turn by different angles; tables of one layout fit one rotation only.",
        shows="Position 0 is right; nothing at rotary_dim 2.",
        fix="cat((freqs, freqs)) for half-split pairs, repeat_interleave(2) for neighbours.",
        seen="rasbt/LLMs-from-scratch#750, common knowledge",
        swaps=(Swap(ROTATE, doubled_tables),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-missing",
        families=FAMILIES,
        what="Queries and keys are not rotated at all.",
        why="A model with rotary positions has no other source of order.",
        shows="Position 0 is right; later rows are wrong, as if the text were a bag of words under a causal mask.",
        fix="Rotate q and k after their projection, before the scores.",
        seen="common knowledge",
        swaps=(Swap(ROTATE, instead(lambda x, cos, sin: x)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-keys-not-rotated",
        families=TURNING,
        what="Rotates the queries only.",
        why="The score must depend on the difference of positions; with one side turned it depends on the query's "
        "alone.",
        shows="Position 0 is right; the error grows with the position of the query.",
        fix="Rotate both, with the same tables.",
        seen="common knowledge",
        swaps=each(TURNS, instead(keys_left_alone)),
        killed_by=FORWARD,
        touches=("layers.N.attention.key_rotated",),
    ),
    Mistake(
        id="rope-applied-twice",
        families=TURNING,
        what="Rotates queries and keys twice, for example in the model and again in the attention kernel.",
        why="All angles double: position 2 looks like position 4.",
        shows="Position 0 is right; it equals a model whose positions count in twos.",
        fix="Rotate once.",
        seen="NeuraLegion/shainet#110 (the same in a cache), common knowledge",
        swaps=each(TURNS, turned_twice),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-on-values",
        families=TURNING,
        what="Rotates the values as well as queries and keys.",
        why="Values carry content into the residual stream; nothing turns them back.",
        shows="The scores are right, the context is wrong from position 1 on.",
        fix="Rotate q and k only.",
        seen="tenstorrent/tt-mlir#8958",
        swaps=each(
            (
                "reference_impl.nn.attention:GroupedQueryAttention.forward",
                "reference_impl.models.phi:PhiAttention.forward",
            ),
            values_too,
        ),
        killed_by=FORWARD,
        touches=("layers.N.attention.context", "layers.N.attention.value"),
    ),
    Mistake(
        id="rope-first-row-for-all",
        families=FAMILIES,
        what="One row of positions, the first of the batch, turns all rows.",
        why="Rows of a batch have positions of their own: padding, packing, ragged decoding.",
        shows="Only where rows have different positions; a constant shift of a whole row stays invisible, so that "
        "padding alone does not show it.",
        fix="Index cosines and sines by row: cos[position_ids], (B, T, Dh/2).",
        seen="maclocal-api#92 (one position for a ragged batch), common knowledge",
        swaps=(Swap(TABLES, first_row_for_all),),
        killed_by=("component.outputs", "golden.positions", "cache.ragged"),
        touches=TURNED,
    ),
)


# --- frequencies ------------------------------------------------------------------------------------------------------


def spaced(angle: Callable[[int, int], float]) -> Callable[..., Any]:
    """Frequencies θ^(−angle(j, Dh)), stretched as the original stretches its own."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def inverse_frequencies(head_dim: int, rope_theta: float, rope_scaling: Any = None) -> tuple[float, ...]:
            frequencies = tuple(rope_theta ** -angle(j, head_dim) for j in range(head_dim // 2))
            if isinstance(rope_scaling, LinearScaling):
                return tuple(frequency / rope_scaling.factor for frequency in frequencies)
            if isinstance(rope_scaling, Llama3Scaling):
                return tuple(rotary.llama3_frequency(frequency, rope_scaling) for frequency in frequencies)
            return frequencies

        return inverse_frequencies

    return make


def default_theta(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda config, *, default_theta, **kwargs: (
        default_theta, original(config, default_theta=default_theta, **kwargs)[1],
    )  # fmt: skip


def scaling_to(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Frequencies under a changed scaling."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda head_dim, theta, scaling=None: original(head_dim, theta, change(scaling))

    return make


def linear_factor(change: Callable[[float], float]) -> Callable[..., Any]:
    return scaling_to(lambda s: replace(s, factor=change(s.factor)) if isinstance(s, LinearScaling) else s)


def factor_on_theta(original: Callable[..., Any]) -> Callable[..., Any]:
    def inverse_frequencies(head_dim: int, rope_theta: float, rope_scaling: Any = None) -> Any:
        if isinstance(rope_scaling, LinearScaling):
            return original(head_dim, rope_theta * rope_scaling.factor)
        return original(head_dim, rope_theta, rope_scaling)

    return inverse_frequencies


def low_precision(original: Callable[..., Any]) -> Callable[..., Any]:
    def tables(position_ids: Tensor, *args: Any, dtype: torch.dtype) -> Any:
        frequencies = torch.tensor(rotary.inverse_frequencies(*args), dtype=dtype, device=position_ids.device)
        angles = position_ids[..., None].to(dtype) * frequencies
        return angles.cos(), angles.sin()

    return tables


_FREQUENCIES = (
    Mistake(
        id="rope-theta-default",
        families=TURNING,
        what="Uses the default base (10000) and ignores rope_theta of the config.",
        why="The frequencies are those of another model.",
        shows="2e-5 to 2e-4 in short default-initialised tests, incoherent text past about a thousand tokens; nothing "
        "at rotary_dim 2.",
        fix="Read rope_theta, at the top level of config.json and inside rope_parameters.",
        seen="vllm#9503, airllm#369, google/gemma.cpp#986, Megatron-DeepSpeed#351",
        swaps=(Swap("reference_impl.nn.rotary:read_rope", default_theta),),
        killed_by=("golden.logits",),
        touches=TURNED,
    ),
    Mistake(
        id="rope-parameters-unread",
        families=TURNING,
        what="Reads rope_theta and rope_scaling at the top level and not rope_parameters, where transformers 5 "
        "puts them.",
        why="A config.json written by transformers 5 may have no other place.",
        shows="Only for files of transformers 5 alone: the base and scaling fall back to defaults.",
        fix="Read both spellings, and refuse a file in which they disagree.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.rotary:ROPE_OBJECTS", instead(("rope_scaling",))),),
        killed_by=("golden.logits",),
        touches=TURNED,
    ),
    Mistake(
        id="rope-scaling-unread",
        families=TURNING,
        what="Reads rope_parameters only, and not rope_scaling, where transformers 4 wrote it.",
        why="Most files on the hub were written by transformers 4.",
        shows="Only for scaled models in old files: the frequencies are not stretched.",
        fix="Read both spellings, and refuse a file in which they disagree.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.rotary:ROPE_OBJECTS", instead(("rope_parameters",))),),
        killed_by=("golden.logits",),
        touches=TURNED,
    ),
    Mistake(
        id="rope-scaling-ignored",
        families=FAMILIES,
        what="Ignores rope_scaling: frequencies are not stretched.",
        why="The model was trained, or extended, with slower rotations.",
        shows="Only in models with scaling, from position 1 on; small at short range, where slow pairs hardly turn.",
        fix="Stretch the frequencies as rope_type says; refuse a type that is not implemented.",
        seen="common knowledge",
        swaps=(Swap(READ, after(lambda scaling: None)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-exponent-halved",
        families=FAMILIES,
        what="The exponent is −j/Dh instead of −2j/Dh: arange(Dh/2) where arange(0, Dh, 2) is meant.",
        why="The frequencies fall half as fast; the slowest pair turns √θ times too fast.",
        shows="Position 0 and the first pair are right.",
        fix="θ_j = base^(−2j/Dh) for j = 0 … Dh/2 − 1.",
        seen="shenweichen/DeepCTR#379 (in sinusoids), common knowledge",
        swaps=(Swap(FREQUENCIES, spaced(lambda j, width: j / width)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-exponent-one-based",
        families=FAMILIES,
        what="Counts pairs from 1 in the exponent: θ_j = base^(−2(j+1)/Dh).",
        why="The paper counts from 1 and writes −2(i−1)/d; the first pair must turn by one radian a token.",
        shows="Position 0 is right; every pair turns too slowly by one constant factor, as if positions were scaled.",
        fix="The first frequency is 1.",
        seen="common knowledge (RoFormer, section 3.2.2, counts from 1)",
        swaps=(Swap(FREQUENCIES, spaced(lambda j, width: 2 * (j + 1) / width)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-exponent-to-the-end",
        families=FAMILIES,
        what="Spaces the exponents from 0 to 1 inclusive (linspace), j/(Dh/2 − 1), as tensor2tensor spaces sinusoids.",
        why="The last pair must turn by base^(−1 + 2/Dh), not base^(−1).",
        shows="Small at the first pairs; nothing at position 0.",
        fix="Divide by Dh/2, not by Dh/2 − 1.",
        seen="tensorflow/tensor2tensor#1423 (in sinusoids)",
        swaps=(Swap(FREQUENCIES, spaced(lambda j, width: j / max(width // 2 - 1, 1))),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-frequencies-reversed",
        families=FAMILIES,
        what="Gives the slowest frequency to the first pair.",
        why="Trained weights expect the fast rotation in the first elements.",
        shows="Position 0 is right, everything after it is wrong.",
        fix="θ_0 = 1, falling.",
        seen="common knowledge",
        swaps=(Swap(FREQUENCIES, after(lambda frequencies: frequencies[::-1])),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-linear-multiplied",
        families=FAMILIES,
        what="Linear scaling multiplies the frequencies by the factor instead of dividing them.",
        why="Position interpolation squeezes positions into the range that was trained.",
        shows="Only with linear scaling: the error is that of factor² in the frequencies.",
        fix="position / factor.",
        seen="common knowledge",
        swaps=(Swap(FREQUENCIES, linear_factor(lambda factor: 1 / factor)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-linear-twice",
        families=FAMILIES,
        what="Linear scaling is applied to the frequencies and to the positions as well.",
        why="Angles are divided by factor².",
        shows="Only with linear scaling.",
        fix="Divide one of the two.",
        seen="common knowledge",
        swaps=(Swap(FREQUENCIES, linear_factor(lambda factor: factor**2)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-linear-on-theta",
        families=FAMILIES,
        what="Linear scaling multiplies the base instead of dividing the positions (an NTK-style stretch).",
        why="The fast pairs stay as they are, though the config says that all positions are interpolated.",
        shows="Only with linear scaling; the first pair is far off, the last one nearly right.",
        fix="rope_type linear divides every frequency.",
        seen="common knowledge",
        swaps=(Swap(FREQUENCIES, factor_on_theta),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-llama3-as-linear",
        families=("rotary", "llama", "phi"),
        what="llama3 scaling divides all frequencies, not only the slow ones.",
        why="Fast pairs, which turn many times inside the trained context, must keep their speed.",
        shows="Only with llama3 scaling: the first pairs are wrong, the last ones right.",
        fix="Keep frequencies above high_freq_factor turns, divide those below low_freq_factor, interpolate between.",
        seen="common knowledge",
        swaps=(Swap(LLAMA3, instead(lambda frequency, scaling: frequency / scaling.factor)),),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-llama3-without-2pi",
        families=("rotary", "llama", "phi"),
        what="llama3 scaling takes the frequency in radians for turns: the 2π is missing from the wavelength.",
        why="low_freq_factor and high_freq_factor count full turns in the original context.",
        shows="Only with llama3 scaling, in the pairs between the thresholds.",
        fix="turns = original_max_position_embeddings · θ / 2π.",
        seen="common knowledge",
        swaps=(
            Swap(
                LLAMA3,
                lambda original: (
                    lambda frequency, s: original(
                        frequency,
                        replace(s, original_max_position_embeddings=s.original_max_position_embeddings * 2 * math.pi),
                    )
                ),
            ),
        ),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-llama3-blend-flipped",
        families=("rotary", "llama", "phi"),
        what="llama3 scaling interpolates the wrong way round: s · θ/factor + (1 − s) · θ.",
        why="The blend must meet θ/factor at the slow threshold and θ at the fast one.",
        shows="Only with llama3 scaling, only in the pairs between the thresholds.",
        fix="(1 − s) · θ/factor + s · θ with s rising from the slow threshold to the fast one.",
        seen="common knowledge",
        swaps=(
            Swap(
                LLAMA3,
                lambda original: (
                    lambda frequency, s: (
                        frequency + frequency / s.factor - original(frequency, s)
                        if frequency / s.factor < original(frequency, s) < frequency
                        else original(frequency, s)
                    )
                ),
            ),
        ),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-llama3-no-blend",
        families=("rotary", "llama", "phi"),
        what="llama3 scaling has one threshold: pairs between low_freq_factor and high_freq_factor are kept unscaled.",
        why="They are to be interpolated.",
        shows="Only with llama3 scaling, only in the pairs between the thresholds; often one pair of many.",
        fix="Interpolate between the thresholds.",
        seen="common knowledge",
        swaps=(
            Swap(
                LLAMA3,
                lambda original: (
                    lambda frequency, s: (
                        original(frequency, s) if original(frequency, s) == frequency / s.factor else frequency
                    )
                ),
            ),
        ),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-low-precision",
        families=("rotary", "llama", "mistral", "phi"),  # short texts do not show it, and Mixtral has no long case
        what="Computes positions, frequencies and angles in the model's low precision.",
        why="bfloat16 has 8 bits: beyond 256 positions collide (300 positions have 279 values).",
        shows="Nothing in float32; in bfloat16 a cosine error of 0.96 by position 300.",
        fix="Angles in float32; only cosine and sine are rounded.",
        seen="EleutherAI/gpt-neox#1003, transformers#25681, transformers#29285, TransformerEngine#1245",
        swaps=(Swap(TABLES, low_precision),),
        killed_by=FORWARD,
        touches=TURNED,
        precision="in float32 and float64 the angles are in the working dtype anyway",
    ),
)


# --- part of a head ---------------------------------------------------------------------------------------------------


def padded_to_the_head(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    missing = x.shape[-1] // 2 - cos.shape[-1]
    cos = torch.nn.functional.pad(cos, (0, missing), value=1.0)
    return rotary.rotate(x, cos, torch.nn.functional.pad(sin, (0, missing)))


def last_elements(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rotate_partly(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        width = 2 * cos.shape[-1]
        return original(x.roll(width, dims=-1), cos, sin).roll(-width, dims=-1)

    return rotate_partly


def last_elements_applied(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def apply_rotary(
        x: Tensor, position_ids: Tensor, rope_theta: float, rotary_dim: int, layout: str, rope_scaling: Any = None
    ) -> Tensor:
        rolled = x.roll(rotary_dim, dims=-1)
        return original(rolled, position_ids, rope_theta, rotary_dim, layout, rope_scaling).roll(-rotary_dim, dims=-1)

    return apply_rotary


def spaced_over_the_head() -> tuple[Swap, ...]:
    """The frequencies do not know the head's width: what does leaves it here."""
    known = {"head_dim": 0}

    def rotary_dim(original: Callable[..., int]) -> Callable[..., int]:
        def noted(head_dim: int, factor: float) -> int:
            known["head_dim"] = head_dim
            return original(head_dim, factor)

        return noted

    def apply_rotary(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noted(
            x: Tensor, position_ids: Tensor, rope_theta: float, rotary_dim: int, layout: str, rope_scaling: Any = None
        ) -> Tensor:
            known["head_dim"] = x.shape[-1]
            return original(x, position_ids, rope_theta, rotary_dim, layout, rope_scaling)

        return noted

    def inverse_frequencies(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda width, *args: original(known["head_dim"], *args)[: width // 2]

    return (
        Swap("reference_impl.nn.rotary:rotary_dim", rotary_dim),
        Swap(APPLY, apply_rotary),
        Swap(FREQUENCIES, inverse_frequencies),
    )


_PARTIAL = (
    Mistake(
        id="rope-partial-ignored",
        families=("phi",),
        what="Turns the whole head and ignores partial_rotary_factor.",
        why="Phi turns the first part of a head only; the rest carries no position.",
        shows="Position 0 is right, everything after it is wrong.",
        fix="rotary_dim = int(head_dim · partial_rotary_factor); the other elements pass.",
        seen="huggingface/candle#1582, ml-explore/mlx-examples#97, vllm#43770",
        swaps=(Swap("reference_impl.nn.rotary:rotary_dim", instead(lambda head_dim, factor: head_dim // 2 * 2)),),
        killed_by=("golden.logits",),
        touches=TURNED,
    ),
    Mistake(
        id="rope-partial-default",
        families=("phi",),
        what="Turns half of the head (the default of the config class) whatever partial_rotary_factor says.",
        why="Phi-2 has 0.4, Phi-1 and 1.5 have 0.5.",
        shows="Nothing where the factor is the default.",
        fix="Read partial_rotary_factor, at the top level of config.json and inside rope_parameters.",
        seen="common knowledge",
        swaps=(Swap("reference_impl.nn.rotary:rotary_dim", instead(lambda head_dim, factor: int(head_dim * 0.5))),),
        killed_by=("golden.logits",),
        touches=TURNED,
    ),
    Mistake(
        id="rope-partial-pairing",
        families=("phi",),
        what="Pads cosines and sines to the whole head and splits the head, not its turned part, into halves.",
        why="The pairs are then (j, j + Dh/2) instead of (j, j + rotary_dim/2).",
        shows="The tables compare equal, what they turn does not: wrong from position 1 on.",
        fix="Cut the turned part off first, and rotate it as a small head of its own.",
        seen="labscommunity/cascadia#69",
        swaps=(Swap(PARTLY, instead(padded_to_the_head)),),
        killed_by=("golden.logits",),
        touches=TURNED,
    ),
    Mistake(
        id="rope-partial-frequencies",
        families=("rotary", "phi"),
        what="Spaces the frequencies by 2j/head_dim although only rotary_dim elements turn.",
        why="The turned part is a small head of its own: 2j/rotary_dim.",
        shows="The first pair is right; 2e-4 in a default-initialised tiny model.",
        fix="Frequencies of rotary_dim.",
        seen="common knowledge",
        swaps=spaced_over_the_head(),
        killed_by=FORWARD,
        touches=TURNED,
    ),
    Mistake(
        id="rope-partial-last",
        families=("rotary", "phi"),
        what="Turns the last rotary_dim elements of a head and passes the first ones.",
        why="The first ones turn.",
        shows="Position 0 is right, everything after it is wrong.",
        fix="x[..., :rotary_dim] turns.",
        seen="common knowledge",
        swaps=(Swap(PARTLY, last_elements), Swap(APPLY, last_elements_applied)),
        killed_by=FORWARD,
        touches=TURNED,
    ),
)


# --- conversion -------------------------------------------------------------------------------------------------------


def to_neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of every head from halves to neighbours: what a second permutation, or a missing one, leaves behind."""
    rows: Tensor = tensor.unflatten(0, (heads, 2, -1))  # (heads, half, Dh/2, …)
    return rows.transpose(1, 2).reshape(tensor.shape)


def permuted(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    if ".q_proj." in name:
        return to_neighbours(tensor, config.num_attention_heads)
    return to_neighbours(tensor, config.num_key_value_heads) if ".k_proj." in name else None


def bias_permuted(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    return permuted(name, tensor, config) if name.endswith(".bias") else None


def keys_permuted(name: str, tensor: Tensor, config: Any) -> Tensor | None:
    """Taken apart with n_heads / n_kv heads where the rows allow it, as llama.cpp once did, else left alone."""
    if ".k_proj.weight" not in name:
        return None
    neighbours = to_neighbours(tensor, config.num_key_value_heads)
    wrong = config.num_attention_heads // config.num_key_value_heads
    if len(tensor) % (2 * wrong) or wrong == config.num_key_value_heads:
        return neighbours
    rows: Tensor = neighbours.unflatten(0, (wrong, -1, 2))
    return rows.transpose(1, 2).reshape(tensor.shape)


PROJECTED = (*TURNED, "layers.N.attention.query", "layers.N.attention.key")


def numbers_cut(original: Callable[..., Any]) -> Callable[..., Any]:
    def inverse_frequencies(head_dim: int, rope_theta: float, rope_scaling: Any = None) -> Any:
        if rope_scaling is not None:
            rope_scaling = replace(rope_scaling, factor=float(int(rope_scaling.factor)))
        return original(head_dim, int(rope_theta), rope_scaling)

    return inverse_frequencies


def old_name_unread(original: Callable[..., Any]) -> Callable[..., Any]:
    def read_scaling(parameters: Any, *more: Any) -> Any:
        return original(parameters, *more) if "rope_type" in parameters else None

    return read_scaling


_CONVERSION = (
    Mistake(
        id="rope-permute-missing-or-twice",
        families=LLAMAS,
        what="Converts between the layouts once too often or not at all: rows of q_proj and k_proj lie in the "
        "other order.",
        why="The rotation and the order of rows must belong together.",
        shows="As rope-layout: position 0 is right. The projections hold the right values in another order.",
        fix="Permute exactly once, and test against a model of the other layout, not against your own reader.",
        seen="huggingface/nanotron#427, naklecha/llama3-from-scratch#20",
        swaps=(on_load(permuted),),
        killed_by=("golden.logits",),
        touches=PROJECTED,
    ),
    Mistake(
        id="rope-permute-bias-forgotten",
        families=("llama",),
        what="Converts the weights of q_proj and k_proj between the layouts, and forgets their biases.",
        why="A bias belongs to its row.",
        shows="Only with attention_bias; nothing while biases are 0, wrong at position 0 already otherwise.",
        fix="Permute the biases with the same permutation.",
        seen="huggingface/nanotron#427",
        swaps=(on_load(bias_permuted),),
        killed_by=("golden.logits",),
        touches=PROJECTED,
    ),
    Mistake(
        id="rope-permute-wrong-heads",
        families=LLAMAS,
        what="Permutes the rows of k_proj with the wrong number of heads: n_heads, or n_heads / n_kv_heads.",
        why="Keys have num_key_value_heads heads.",
        shows="Exactly nothing whenever n_heads = n_kv²: 64/8 (Llama-2-70B), 4/2 and 9/3 (small tests).",
        fix="Permute with num_key_value_heads, and test with a ratio other than num_key_value_heads.",
        seen="llama.cpp#3364, llama.cpp#2376, transformers#31788, flash-attention#546",
        swaps=(on_load(keys_permuted),),
        killed_by=("golden.logits",),
        touches=PROJECTED,
    ),
    Mistake(
        id="rope-numbers-cut",
        families=TURNING,
        what="Reads the base and the factor of a scaling as integers: int(2.5) is 2.",
        why="Both are real numbers; NTK-aware bases and factors such as 2.5 have a fraction.",
        shows="Only where config.json has a fraction; a factor of 2.5 is then read as 2.",
        fix="Read them as floats.",
        seen="common knowledge",
        swaps=(Swap(FREQUENCIES, numbers_cut),),
        killed_by=("sensitivity.fractions", "invariance.spelling"),
        touches=TURNED,
    ),
    Mistake(
        id="rope-type-old-name-unread",
        families=TURNING,
        what="Looks for rope_type alone: a scaling that says `type`, as older files do, is ignored.",
        why="transformers wrote `type` until 4.43, and reads both.",
        shows="Only with files that say `type`, from position 1 on.",
        fix="Read `type` where there is no rope_type; refuse a scaling without either.",
        seen="common knowledge",
        swaps=(Swap(READ, old_name_unread),),
        killed_by=("invariance.spelling",),
        touches=TURNED,
    ),
)


MISTAKES = (*_PAIRS, *_FREQUENCIES, *_PARTIAL, *_CONVERSION)
