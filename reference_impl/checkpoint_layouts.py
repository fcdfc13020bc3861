"""Ways of storing the same weights: names and shapes that files have, as the model names and shapes them."""

from collections.abc import Iterator, Mapping

from reference_impl.stored_tensors import Stored


def with_model_names(stored: Mapping[str, Stored], wanted: set[str]) -> dict[str, Stored]:
    """The stored tensors under their names in the model; what fits nothing keeps its own.

    `wanted`: the names of the model's parameters.
    """
    return with_full_names(with_separate_experts(stored, wanted), wanted)


def with_full_names(stored: Mapping[str, Stored], wanted: set[str]) -> dict[str, Stored]:
    """Adds the first part of the names where it was left out.

    Files written from a model without its head, such as OpenAI's GPT-2 on the hub, leave the first part of the names
    out: "h.0.ln_1.weight" for "transformer.h.0.ln_1.weight". A tensor whose full name is stored too keeps its own.
    """
    full = {name.partition(".")[2]: name for name in wanted - stored.keys()}
    return {name if name in wanted else full.get(name, name): entry for name, entry in stored.items()}


def with_separate_experts(stored: Mapping[str, Stored], wanted: set[str]) -> dict[str, Stored]:
    """Cuts the experts of a layer apart where they are stored as one tensor.

    Mixtral's files hold a tensor for each matrix of each expert; the files that transformers 5 writes with
    save_original_format=False hold those of all E experts together (F: intermediate_size, H: hidden_size):

        mlp.experts.gate_up_proj (E, 2 F, H)    →    block_sparse_moe.experts.N.w1.weight, …w3.weight (F, H)
        mlp.experts.down_proj    (E, H, F)      →    block_sparse_moe.experts.N.w2.weight (H, F)
        mlp.gate.weight          (E, H)         →    block_sparse_moe.gate.weight
    """
    separate: dict[str, Stored] = {}
    for name, entry in stored.items():
        parts = dict(_parts(name, entry))
        separate |= parts if parts and parts.keys() & wanted else {name: entry}
    return separate


def _parts(name: str, entry: Stored) -> Iterator[tuple[str, Stored]]:
    """What a tensor of the second layout is in the first."""
    layer, found, what = name.partition(".mlp.")
    experts = f"{layer}.block_sparse_moe.experts"
    if found and what == "gate.weight":
        yield f"{layer}.block_sparse_moe.gate.weight", entry
    if found and what in ("experts.gate_up_proj", "experts.down_proj") and len(entry.shape) == 3:
        number, rows, columns = entry.shape
        if what == "experts.down_proj":
            for expert in range(number):
                yield f"{experts}.{expert}.w2.weight", entry.part(expert, (rows, columns))
        elif rows % 2 == 0:
            for expert in range(number):
                yield f"{experts}.{expert}.w1.weight", entry.part(2 * expert, (rows // 2, columns))
                yield f"{experts}.{expert}.w3.weight", entry.part(2 * expert + 1, (rows // 2, columns))
