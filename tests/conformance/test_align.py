"""Alignment finds where a program first goes wrong, whatever its layout, and is not fooled by look-alikes.

The oracle below is a small Llama, written with einsum in (batch, kv_heads, group, seq, head_dim); it names its probes.
`Candidate` computes the same with ordinary layouts, fused projections and in-place additions, and has deliberate bugs.
"""

import math
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.align import Alignment, Finding, Probe, align
from conformance.record import Recorder

# Sizes are pairwise distinct, also as products: batch, seq, kv_heads, group, head_dim, hidden, intermediate, vocab.
B, T, KV, G, D, HIDDEN, INNER, VOCAB, LAYERS = 3, 11, 2, 4, 6, 40, 52, 61, 3
H = KV * G
HEADS = ("batch", "kv_heads", "group", "seq", "head_dim")
KV_HEADS = ("batch", "kv_heads", "seq", "head_dim")
STREAM = ("batch", "seq", "hidden")


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[-1])

    made = {"embedding": draw(VOCAB, HIDDEN), "norm": 1 + draw(HIDDEN), "head": draw(VOCAB, HIDDEN)}
    for n in range(LAYERS):
        made |= {
            f"{n}.norm1": 1 + draw(HIDDEN), f"{n}.norm2": 1 + draw(HIDDEN),
            f"{n}.q": 3 * draw(H * D, HIDDEN), f"{n}.k": 3 * draw(KV * D, HIDDEN), f"{n}.v": draw(KV * D, HIDDEN),
            f"{n}.o": draw(HIDDEN, H * D),
            f"{n}.gate": draw(INNER, HIDDEN), f"{n}.up": draw(INNER, HIDDEN), f"{n}.down": draw(HIDDEN, INNER),
        }  # fmt: skip
    return made


W = weights()
IDS = torch.randint(VOCAB, (B, T), generator=torch.Generator().manual_seed(2))


def oracle() -> list[Probe]:
    """The probes, in computational order."""
    probes: list[Probe] = []

    def probe(name: str, value: Tensor, axes: tuple[str, ...], *parents: str) -> Tensor:
        probes.append(Probe(name, value, axes, parents))
        return value

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    angle = torch.arange(T, dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(D // 2).double() / (D // 2))
    turn = torch.cos(angle) + 1j * torch.sin(angle)

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x, before = probe("embedding", W["embedding"][IDS], STREAM), "embedding"
    for n in range(LAYERS):
        p, w = f"{n}.", {name[2:]: value for name, value in W.items() if name.startswith(f"{n}.")}
        y = probe(p + "norm1", norm(x, w["norm1"]), STREAM, before)
        q = torch.einsum("kgdh,bth->bkgtd", w["q"].view(KV, G, D, HIDDEN), y)
        k, v = (torch.einsum("kdh,bth->bktd", w[name].view(KV, D, HIDDEN), y) for name in "kv")
        probe(p + "query", q, HEADS, p + "norm1")
        probe(p + "key", k, KV_HEADS, p + "norm1")
        probe(p + "value", v, KV_HEADS, p + "norm1")
        q = probe(p + "query_rotated", rotate(q), HEADS, p + "query")
        k = probe(p + "key_rotated", rotate(k), KV_HEADS, p + "key")
        s = torch.einsum("bkgtd,bksd->bkgts", q, k) / math.sqrt(D)
        axes = (*HEADS[:3], "query_position", "key_position")
        probe(p + "scores", s, axes, p + "query_rotated", p + "key_rotated")
        a = s.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
        probe(p + "weights", a, axes, p + "scores")
        c = torch.einsum("bkgts,bksd->bkgtd", a, v)
        probe(p + "context", c, HEADS, p + "weights", p + "value")
        o = torch.einsum("okgd,bkgtd->bto", w["o"].view(HIDDEN, KV, G, D), c)
        probe(p + "output", o, STREAM, p + "context")
        x = probe(p + "residual", x + o, STREAM, before, p + "output")
        y = probe(p + "norm2", norm(x, w["norm2"]), STREAM, p + "residual")
        wide = ("batch", "seq", "intermediate")
        gate = probe(p + "gate", y @ w["gate"].T, wide, p + "norm2")
        up = probe(p + "up", y @ w["up"].T, wide, p + "norm2")
        product = probe(p + "product", gate * torch.sigmoid(gate) * up, wide, p + "gate", p + "up")
        down = probe(p + "down", product @ w["down"].T, STREAM, p + "product")
        x, before = probe(p + "block", x + down, STREAM, p + "residual", p + "down"), p + "block"
    y = probe("final_norm", norm(x, W["norm"]), STREAM, before)
    probe("logits", y @ W["head"].T, ("batch", "seq", "vocab"), "final_norm")
    return probes


PROBES = oracle()


class Candidate:
    """The same model as an engine writes it.  `bugs` are (kind, layer); `style` changes nothing that matters."""

    def __init__(self, *bugs: tuple[str, int], style: str = "bhtd") -> None:
        self.bugs, self.style = bugs, style

    def has(self, bug: str, layer: int = 0) -> bool:
        return (bug, layer) in self.bugs

    def __call__(self) -> Tensor:
        ids = IDS[[1, 2, 0]] if self.has("batch swapped at the start") else IDS
        x = F.embedding(ids, W["embedding"])
        for n in range(LAYERS):
            w = {name[2:]: value for name, value in W.items() if name.startswith(f"{n}.")}
            y = F.rms_norm(x, (HIDDEN,), w["norm1"], 1e-2 if self.has("eps", n) else 1e-5)
            if self.style == "in place":
                x += self.attention(n, w, y)
            else:
                x = x + self.attention(n, w, y)
            y = F.rms_norm(x, (HIDDEN,), w["norm2"], 1e-5)
            gate, up = y @ w["gate"].T, y @ w["up"].T
            if self.has("gate and up swapped", n):
                gate, up = up, gate
            activation = F.gelu(gate) if self.has("gelu", n) else F.silu(gate)
            if self.style == "in place":
                x += activation.mul_(up) @ w["down"].T
            else:
                x = x + activation * up @ w["down"].T
        logits = F.rms_norm(x, (HIDDEN,), W["norm"], 1e-5) @ W["head"].T
        return logits[[2, 1, 0]] if self.has("batch swapped at the end") else logits

    def attention(self, n: int, w: dict[str, Tensor], y: Tensor) -> Tensor:
        if self.style == "fused":
            q, k, v = (y @ torch.cat([w["q"], w["k"], w["v"]]).T).split([H * D, KV * D, KV * D], dim=-1)
        else:
            q, k, v = y @ w["q"].T, y @ w["k"].T, y @ w["v"].T
        if self.has("value", n):
            v = v * 1.001
        q, k, v = q.view(B, T, H, D), k.view(B, T, KV, D), v.view(B, T, KV, D)  # (B, T, H, D)
        out = w["o"]
        if self.style == "heads reordered":  # also across key-value groups
            order = torch.tensor([5, 1, 4, 7, 0, 2, 6, 3])
            q, k, v = q[:, :, order], k[:, :, order // G], v[:, :, order // G]
            out = out.view(HIDDEN, H, D)[:, order].reshape(HIDDEN, H * D)
        q, k = self.rotate(n, q), self.rotate(n, k)
        if self.style != "heads reordered":
            k, v = (z.repeat(1, 1, G, 1) if self.has("tile", n) else z.repeat_interleave(G, 2) for z in (k, v))
        c = self.kernel(n, q, k, v)
        return (c.transpose(1, 2) if self.has("merge", n) else c).reshape(B, T, H * D) @ out.T

    def rotate(self, n: int, x: Tensor) -> Tensor:
        position = torch.arange(T).double() + (1 if self.style == "positions shifted" else 0)
        angle = position[:, None] / 100.0 ** (torch.arange(0, D, 2) / D)  # (T, D/2)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if self.has("interleaved", n):
            even, odd = x[..., 0::2], x[..., 1::2]
            return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)
        first, second = x.chunk(2, -1)
        first, second = first * cos - second * sin, second * cos + first * sin
        if self.style == "head_dim interleaved":
            return torch.stack([first, second], -1).flatten(-2)
        return torch.cat([first, second], -1)

    def kernel(self, n: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, T, H, D) three times -> (B, T, H, D)."""
        scale = 1 / D if self.has("scale", n) else D**-0.5
        mask = torch.ones(T, T).tril(-1 if self.has("mask", n) else 0).bool()
        mask[0, 0] = True
        if self.style == "bthd":
            scores = torch.einsum("bthd,bshd->bths", q, k) * scale
            weights = scores.where(mask[:, None], torch.finfo(scores.dtype).min).softmax(-1)
            return torch.einsum("bths,bshd->bthd", weights, v)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        if self.style == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
        scores = q * scale @ k.mT if self.style == "scale folded" else q @ k.mT * scale
        return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(1, 2)


def verdict(*bugs: tuple[str, int], style: str = "bhtd", probes: list[Probe] = PROBES) -> Alignment:
    with Recorder() as recorder, torch.no_grad():
        logits = Candidate(*bugs, style=style)()
    return align(probes, recorder.tensors, result=logits)


def names(findings: Iterable[Finding]) -> list[str]:
    return [finding.name for finding in findings]


def first(alignment: Alignment) -> str | None:
    return alignment.first_divergence and alignment.first_divergence.name


def statuses(alignment: Alignment, *probes: str) -> list[str]:
    return [alignment.findings[name].status for name in probes]


# --- correct programs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["bhtd", "bthd", "fused", "in place"])
def test_every_probe_of_a_correct_program_matches_in_any_layout(style: str) -> None:
    alignment = verdict(style=style)
    assert {finding.status for finding in alignment.findings.values()} == {"matched"}
    assert alignment.first_divergence is None
    assert names(alignment.last_good) == ["logits"]
    assert alignment.notes == ()


STYLES: dict[str, dict[str, str]] = {  # what is different inside, without consequence
    "sdpa": {"scores": "unobserved", "weights": "unobserved"},
    "scale folded": {},
    "positions shifted": {"query_rotated": "unmatched", "key_rotated": "unmatched"},
    "head_dim interleaved": {"query_rotated": "permuted", "key_rotated": "permuted"},
    "heads reordered": {
        "query_rotated": "permuted", "key_rotated": "unmatched",  # rotated after it was repeated
        "scores": "permuted", "weights": "permuted", "context": "permuted",
    },
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_harmless_difference_is_a_note_and_no_divergence(style: str) -> None:
    alignment = verdict(style=style)
    expected = {f"{n}.{name}": status for n in range(LAYERS) for name, status in STYLES[style].items()}
    assert {f.name: f.status for f in alignment.findings.values() if f.status != "matched"} == expected
    assert all(alignment.findings[name].healed for name in expected)
    assert alignment.first_divergence is None
    assert len(alignment.notes) == len(expected)


def test_note_names_the_permuted_axis() -> None:
    assert verdict(style="head_dim interleaved").notes[0] == "0.query_rotated (permuted along head_dim): harmless"


def test_heads_swapped_across_groups_are_a_permutation_of_the_merged_axis() -> None:
    assert verdict(style="heads reordered").findings["0.context"].permuted_axes == ("kv_heads×group",)


# --- programs with one mistake, in layer 1 ------------------------------------------------------------------------

# mistake: style -> (first divergence, last good)
LAYER_1: dict[tuple[str, str], tuple[str, set[str]]] = {
    ("eps", "bhtd"): ("1.norm1", {"0.block"}),
    ("interleaved", "bhtd"): ("1.query_rotated", {"1.query"}),
    ("interleaved", "sdpa"): ("1.query_rotated", {"1.query"}),
    ("tile", "bhtd"): ("1.scores", {"1.query_rotated", "1.key_rotated"}),
    ("scale", "bhtd"): ("1.scores", {"1.query_rotated", "1.key_rotated"}),
    ("scale", "bthd"): ("1.scores", {"1.query_rotated", "1.key_rotated"}),
    ("scale", "sdpa"): ("1.context", {"1.query_rotated", "1.key_rotated", "1.value"}),
    ("mask", "bthd"): ("1.weights", {"1.scores"}),
    ("mask", "sdpa"): ("1.context", {"1.query_rotated", "1.key_rotated", "1.value"}),
    ("value", "fused"): ("1.context", {"1.weights", "1.value"}),
    ("merge", "bhtd"): ("1.output", {"1.context"}),
    ("merge", "sdpa"): ("1.output", {"1.context"}),
    ("gate and up swapped", "in place"): ("1.product", {"1.gate", "1.up"}),
    ("gelu", "bthd"): ("1.product", {"1.gate", "1.up"}),
}


@pytest.mark.parametrize(("mistake", "style"), LAYER_1)
def test_mistake_is_between_the_last_good_probes_and_the_first_divergence(mistake: str, style: str) -> None:
    alignment = verdict((mistake, 1), style=style)
    wrong, good = LAYER_1[mistake, style]
    assert first(alignment) == wrong
    assert set(names(alignment.last_good)) == good


def test_interval_says_what_was_not_observed() -> None:
    alignment = verdict(("scale", 1), style="sdpa")
    assert names(alignment.between) == ["1.scores", "1.weights"]
    assert str(alignment).endswith("between: 1.scores (unobserved), 1.weights (unobserved)")


def test_mistake_after_a_harmless_difference_in_earlier_layers() -> None:
    alignment = verdict(("gelu", 1), style="positions shifted")
    assert first(alignment) == "1.product"


def test_everything_after_the_divergence_is_left_to_it() -> None:
    assert verdict(("gelu", 1)).others == ()


def test_first_of_two_mistakes_is_reported() -> None:
    assert first(verdict(("gelu", 2), ("scale", 1))) == "1.scores"


def test_independent_second_mistake_is_reported_too() -> None:
    alignment = verdict(("interleaved", 1))
    assert names(alignment.others) == ["1.key_rotated"]


def test_batch_swapped_at_the_start_diverges_at_the_embedding() -> None:
    alignment = verdict(("batch swapped at the start", 0))
    assert alignment.first_divergence is not None
    assert (alignment.first_divergence.name, alignment.first_divergence.permuted_axes) == ("embedding", ("batch",))
    assert {f.status for f in alignment.findings.values()} == {"permuted"}
    assert alignment.last_good == ()


def test_batch_swapped_at_the_end_is_a_permutation_of_the_result() -> None:
    alignment = verdict(("batch swapped at the end", 0))
    assert str(alignment).startswith("first divergence: logits (permuted along batch); last good: final_norm (")


def test_new_values_are_blamed_before_a_permutation_inside_the_token() -> None:
    alignment = verdict(("scale", 1), style="head_dim interleaved")
    assert first(alignment) == "1.scores"
    assert set(names(alignment.last_good)) == {"1.query_rotated", "1.key_rotated"}


def test_permutation_before_new_values_is_noted_as_the_next_suspect() -> None:
    alignment = verdict(("scale", 1), style="head_dim interleaved")
    assert any(note.startswith("1.query_rotated (permuted along head_dim): a layout") for note in alignment.notes)


def test_divergence_has_its_distance_from_the_nearest_tensor() -> None:
    divergence = verdict(("eps", 1)).first_divergence
    assert divergence is not None
    assert divergence.distance is not None
    assert 1e-4 < divergence.distance < 1e-1


def test_record_of_a_match_is_a_position_among_the_recorded() -> None:
    x = values(2, 3, 5)
    assert one(x, noise(30), x.mT).record == 1


# --- one probe ----------------------------------------------------------------------------------------------------


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def noise(numel: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def one(probe: Tensor, *recorded: Tensor, tolerance: float = 1e-9) -> Finding:
    axes = ("batch", "heads", "seq", "head_dim", "more")[: probe.ndim]
    return align([Probe("p", probe, axes)], recorded, tolerance=tolerance).findings["p"]


REORDERED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "batch rows": (lambda x: x[[2, 0, 1]], ("batch",)),
    "two heads": (lambda x: x[:, [1, 0, 2, 3, 4, 5]], ("heads",)),
    "time flipped": (lambda x: x.flip(2), ("seq",)),
    "time rolled": (lambda x: x.roll(1, 2), ("seq",)),
    "head_dim interleaved": (lambda x: x.unflatten(-1, (2, 5)).mT.flatten(-2), ("head_dim",)),
    "heads, in another layout": (lambda x: x[:, [1, 0, 2, 3, 4, 5]].transpose(1, 2).flatten(2), ("heads",)),
    "batch and time": (lambda x: x.flip(0).flip(2), ("batch", "seq")),
}


@pytest.mark.parametrize("how", REORDERED)
def test_reordered_indices_are_named_by_axis(how: str) -> None:
    reorder, axes = REORDERED[how]
    finding = one(values(3, 6, 13, 10), reorder(values(3, 6, 13, 10)).contiguous())
    assert (finding.status, finding.permuted_axes) == ("permuted", axes)


def test_scores_reordered_along_both_positions() -> None:
    x, order = values(3, 4, 7, 7), torch.tensor([3, 1, 0, 2, 6, 5, 4])
    finding = one(x, x[:, :, order][..., order])
    assert finding.permuted_axes == ("seq", "head_dim")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_axis_order_is_only_a_layout(order: tuple[int, ...]) -> None:
    x = values(3, 6, 13, 10)
    assert one(x, x.permute(order).contiguous()).status == "matched"


def test_merged_and_split_dimensions_are_only_a_layout() -> None:
    x = values(3, 6, 13, 10)
    assert one(x, x.transpose(1, 2).reshape(39, 60)).status == "matched"


def test_dimensions_of_size_one_are_ignored() -> None:
    assert one(values(1, 6, 1, 10), values(1, 6, 1, 10).transpose(1, 3).flatten()).status == "matched"


def test_axes_are_named_beside_dimensions_of_size_one() -> None:
    assert one(values(1, 6, 13, 10), values(1, 6, 13, 10).flip(1)).permuted_axes == ("heads",)


def test_match_is_preferred_to_an_earlier_permutation() -> None:
    x = values(3, 6, 13, 10)
    assert one(x, x.flip(0), x.transpose(1, 2).contiguous()).record == 1


def test_scrambled_values_are_no_match_although_they_sort_equal() -> None:
    x = values(3, 6, 13, 10)
    finding = one(x, x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(5))])
    assert finding.status == "unmatched"
    assert finding.distance == 0


@pytest.mark.parametrize("shape", [(40,), (4, 10), (4, 5, 6)])
def test_shuffle_is_no_permutation_of_an_axis(shape: tuple[int, ...]) -> None:
    x = values(*shape)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(5))
    assert one(x, x.flatten()[order]).status == "unmatched"


def test_one_wrong_row_is_no_match() -> None:
    x = values(3, 6, 13, 10)
    wrong = x.clone()
    wrong[1, 2, 3] = x[1, 2, 4]
    assert one(x, wrong).status == "unmatched"


def test_two_swapped_elements_are_no_match() -> None:
    x = values(3, 6, 13, 10)
    wrong = x.clone()
    wrong[0, 0, 0, 0], wrong[1, 2, 3, 4] = x[1, 2, 3, 4], x[0, 0, 0, 0]
    assert one(x, wrong).status == "unmatched"


@pytest.mark.parametrize(("error", "status"), [(0.9e-9, "matched"), (1.1e-9, "unmatched")])
def test_tolerance_is_relative_to_the_largest_value(error: float, status: str) -> None:
    x = 1000 * values(3, 6, 13, 10)
    moved = x.clone()
    moved[1, 2, 3, 4] += error * x.abs().max()
    finding = one(x, moved)
    assert finding.status == status
    if status == "matched":
        assert finding.distance == pytest.approx(error, rel=1e-3)


def test_tolerance_can_be_chosen() -> None:
    x = values(3, 6, 13, 10)
    assert one(x, x * 1.001, tolerance=0.01).status == "matched"


def test_rounding_does_not_hide_a_permutation() -> None:
    x = values(3, 6, 13, 10)
    assert one(x, x.flip(0) * (1 + 1e-15 * noise(2340).view(x.shape))).permuted_axes == ("batch",)


def test_nothing_of_that_size_is_unobserved() -> None:
    assert one(values(3, 5), noise(14)).status == "unobserved"


def test_size_of_another_tensor_is_unmatched_with_its_distance() -> None:
    finding = one(torch.arange(10.0, dtype=torch.float64), torch.arange(10.0, dtype=torch.float64) + 0.9)
    assert finding.status == "unmatched"
    assert finding.distance == pytest.approx(0.1)


def test_distance_is_from_the_nearest_of_all() -> None:
    x = values(3, 5)
    assert one(x, noise(15), x + 0.5, x + 0.25, x - 1).distance == pytest.approx(0.25 / x.abs().max().item())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_recorded_tensor_that_is_not_finite_matches_nothing(bad: float) -> None:
    x = values(3, 5)
    wrong = x.clone()
    wrong[0, 0] = bad
    assert one(x, wrong).distance == math.inf
    assert one(x, wrong, x).status == "matched"


# --- look-alikes --------------------------------------------------------------------------------------------------

ONE_HOT = F.one_hot(torch.tensor([0, 3, 1, 2, 0, 1, 2, 3, 3, 1]), 4).double()
DEGENERATE: dict[str, tuple[Tensor, Tensor]] = {  # probe, and a recorded tensor that would match it by accident
    "zeros": (torch.zeros(4, 6).double(), torch.zeros(24).double()),
    "ones": (torch.ones(4, 6).double(), torch.ones(24).double()),
    "nearly constant": (1 + 1e-12 * values(4, 6), torch.ones(24).double()),
    "one-hot": (ONE_HOT, ONE_HOT),
    "one-hot of another choice": (ONE_HOT, ONE_HOT.flip(0)),
    "additive mask": (torch.full((5, 5), -math.inf).triu(1).double(), torch.full((5, 5), -1e9).triu(1).double()),
    "everything masked": (torch.full((5, 5), -math.inf).double(), torch.full((5, 5), -math.inf).double()),
    "few values": (torch.tensor([0.1, 0.7, 0.3, 0.9] * 6).double(), torch.tensor([0.1, 0.7, 0.3, 0.9] * 6).double()),
    "few elements": (values(7), values(7)),
    "NaN": (torch.cat([values(20), torch.tensor([math.nan])]), torch.cat([values(20), torch.tensor([math.nan])])),
    "infinite": (torch.cat([values(20), torch.tensor([math.inf])]), torch.cat([values(20), torch.tensor([math.inf])])),
    "empty": (torch.zeros(0, 3).double(), torch.zeros(0).double()),
    "scalar": (torch.tensor(3.5).double(), torch.tensor(3.5).double()),
}  # fmt: skip


@pytest.mark.parametrize("name", DEGENERATE)
def test_probe_with_too_few_distinct_values_takes_no_part(name: str) -> None:
    probe, recorded = DEGENERATE[name]
    assert one(probe, recorded).status == "degenerate"


def test_eight_distinct_values_are_enough() -> None:
    assert one(values(8), values(8)).status == "matched"


def test_degenerate_probe_neither_heals_nor_diverges() -> None:
    x, wrong = values(4, 6), noise(24)
    probes = [chain("a", x), chain("b", ONE_HOT, "a"), chain("c", values(5, 3), "b")]
    alignment = align(probes, [wrong, ONE_HOT, values(5, 3)])
    assert not alignment.findings["b"].healed
    assert alignment.first_divergence is None
    alignment = align(probes, [wrong, ONE_HOT, noise(15)])
    assert first(alignment) == "a"


def test_sparse_values_match() -> None:
    x = values(4, 6, 10).relu()
    assert one(x, x.mT.contiguous()).status == "matched"


def test_sparse_values_in_another_place_are_no_match() -> None:
    x = torch.zeros(40, dtype=torch.float64)
    x[:10] = values(10)
    assert one(x.view(4, 10), x.roll(1)).status == "unmatched"


def test_values_hidden_among_many_zeros_match() -> None:
    x = torch.zeros(1000, dtype=torch.float64)
    x[1:10] = values(9)
    assert one(x, x).status == "matched"


def test_repeated_slices_match() -> None:
    x = values(3, 1, 13, 10).expand(3, 6, 13, 10)
    assert one(x, x.transpose(1, 2).contiguous()).status == "matched"


def test_slices_that_tie_are_not_said_to_be_permuted() -> None:
    rows = torch.stack([values(40), values(40), noise(40)])
    assert one(rows, rows[[2, 0, 1]]).status == "unmatched"


def test_masked_scores_match_whatever_fills_the_mask() -> None:
    scores, mask = values(3, 4, 9, 9), torch.ones(9, 9).triu(1).bool()
    probe = scores.masked_fill(mask, -math.inf)
    assert one(probe, scores.masked_fill(mask, -1e9)).status == "matched"
    assert one(probe, scores + mask.double() * torch.finfo(torch.float32).min).status == "matched"


def test_mask_fill_does_not_make_scores_negligible() -> None:
    scores, mask = values(3, 4, 9, 9), torch.ones(9, 9).triu(1).bool()
    assert one(scores.masked_fill(mask, -1e9), (scores + 1e-6).masked_fill(mask, -1e9)).status == "unmatched"


def test_another_mask_is_no_match() -> None:
    scores, mask = values(3, 4, 9, 9), torch.ones(9, 9).triu(1).bool()
    assert one(scores.masked_fill(mask, -math.inf), scores.masked_fill(mask.roll(1), -math.inf)).status == "unmatched"


def test_causal_weights_with_heads_reordered_are_permuted() -> None:
    weights = values(3, 4, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf).softmax(-1)
    assert one(weights, weights[:, [3, 1, 0, 2]]).permuted_axes == ("heads",)


def test_normalised_rows_with_time_reordered_are_permuted() -> None:
    x = F.layer_norm(values(3, 13, 10), (10,))
    axes = ("batch", "seq", "hidden")
    assert align([Probe("p", x, axes)], [x.roll(1, 1)]).findings["p"].permuted_axes == ("seq",)


# --- the graph ----------------------------------------------------------------------------------------------------


def chain(name: str, value: Tensor, *parents: str) -> Probe:
    return Probe(name, value, ("batch", "seq", "hidden")[: value.ndim], parents)


def graph(parents: dict[str, str], wrong: str) -> Alignment:
    """A graph whose probes are named by letters, each of a size of its own; `wrong` ones were recorded as noise."""
    tensors = {name: values(9, 2 + i) for i, name in enumerate(parents)}
    probes = [chain(name, tensors[name], *above) for name, above in parents.items()]
    return align(probes, [noise(t.numel()) if name in wrong else t for name, t in tensors.items()])


def test_wrong_probe_with_a_matched_descendant_is_healed() -> None:
    alignment = graph({"a": "", "b": "a", "c": "b", "d": "c"}, wrong="bc")
    assert alignment.first_divergence is None
    assert [f.name for f in alignment.findings.values() if f.healed] == ["b", "c"]


def test_wrong_probe_beside_a_matched_branch_is_not_healed() -> None:
    alignment = graph({"input": "", "s": "", "v": "", "w": "s", "c": "vw"} | {"o": "c"}, wrong="vco")
    assert first(alignment) == "v"


def test_last_good_is_latest_first_and_only_the_nearest() -> None:
    alignment = graph({"a": "", "b": "a", "c": "a", "d": "bc"}, wrong="d")
    assert names(alignment.last_good) == ["c", "b"]


def test_last_good_is_found_through_healed_probes() -> None:
    alignment = graph({"a": "", "b": "a", "c": "b", "d": "b"}, wrong="bd")
    assert first(alignment) == "d"
    assert names(alignment.last_good) == ["a"]
    assert names(alignment.between) == ["b"]


def test_residual_stream_shows_the_branch_that_went_wrong() -> None:
    alignment = graph({"x": "", "n": "x", "o": "n", "y": "xo", "m": "y", "z": "ym"}, wrong="oymz")
    assert first(alignment) == "o"
    assert names(alignment.last_good) == ["n"]


def test_two_wrong_branches_are_both_reported() -> None:
    alignment = graph({"a": "", "q": "a", "k": "a", "s": "qk"}, wrong="qks")
    assert (first(alignment), names(alignment.others)) == ("q", ["k"])


def test_without_divergence_the_last_good_probes_are_those_that_nothing_matched_follows() -> None:
    alignment = graph({"a": "", "b": "a", "c": "a"}, wrong="")
    assert names(alignment.last_good) == ["c", "b"]


def test_program_of_which_nothing_was_observed_has_no_divergence() -> None:
    alignment = align(PROBES, [])
    assert {f.status for f in alignment.findings.values()} == {"unobserved"}
    assert str(alignment) == "first divergence: none; last good: none; between: none"


def test_only_the_result_was_observed() -> None:
    alignment = align(PROBES, [], result=PROBES[-1].value + 1)
    assert first(alignment) == "logits"
    assert alignment.last_good == ()
    assert len(alignment.between) == len(PROBES) - 1


def test_result_of_another_size_is_unobserved() -> None:
    x = values(3, 5)
    assert align([chain("a", x)], [x], result=x[:2]).findings["a"].status == "unobserved"


def test_result_in_float32_is_compared() -> None:
    x = values(3, 5)
    assert align([chain("a", x)], [x], result=x.float()).findings["a"].status == "unmatched"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_axes_must_name_every_dimension() -> None:
    with pytest.raises(ValueError, match=r"probe p: axes=\('batch',\) must name 2"):
        Probe("p", values(3, 5), ("batch",))


def test_too_many_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="7 <= 6"):
        Probe("p", values(1, 1, 1, 1, 1, 1, 1), tuple("abcdefg"))


def test_probe_must_be_double() -> None:
    with pytest.raises(ValueError, match=r"torch.float32, must be float64"):
        Probe("p", values(3, 5).float(), ("batch", "seq"))


@pytest.mark.parametrize("parents", [("b",), ("a",)], ids=["unknown", "itself"])
def test_parents_must_come_first(parents: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="after its parents"):
        align([chain("a", values(3, 5), *parents)], [])


def test_names_must_be_unique() -> None:
    with pytest.raises(ValueError, match="must occur once"):
        align([chain("a", values(3, 5)), chain("a", values(3, 5))], [])
