"""Mistral's dynamic cache of transformers keeps every key when the window is one key: decoding attends to all of them.

python examples/by_hand/transformers_window_of_one.py
"""

import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

torch.manual_seed(0)
for window in (1, 2, 3):
    config = MistralConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=window, initializer_range=1.0,
    )  # fmt: skip
    model, cache = MistralForCausalLM(config).eval(), DynamicCache(config=config)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(ids.shape[1])]
    difference = (torch.cat(steps, dim=1) - full).abs().amax(-1) / full.abs().max()
    print(f"window {window}: {cache.layers[0].keys.shape[2]} keys kept, off by {difference.max():.0e} when decoding")
