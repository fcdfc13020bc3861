"""litgpt 0.5.13: a chunk of several tokens that wraps around the ring buffer of a sliding window overwrites keys that
its first queries need, and they see its later ones instead: shown without the suite.

pip install torch==2.13.0 litgpt==0.5.13
"""

import torch
from litgpt import GPT, Config

torch.manual_seed(0)
config = Config(
    n_layer=1, n_head=2, n_embd=16, intermediate_size=24, padded_vocab_size=29, block_size=64, sliding_window_size=5,
    mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", bias=False, rotary_percentage=1.0, parallel_residual=False,
)  # fmt: skip
model = GPT(config).double().eval()
for parameter in model.parameters():
    if parameter.dim() == 2:
        torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
ids = torch.arange(16)[None]


@torch.no_grad()
def fed(ids, size):
    """Logits of a text that is fed in chunks of this size."""
    model.clear_kv_cache()
    model.set_kv_cache(1)
    chunks = torch.arange(ids.shape[1]).split(size)
    return torch.cat([model(ids[:, chunk], chunk, int(chunk[-1]) + 1) for chunk in chunks], dim=1)


with torch.no_grad():
    full = model(ids)
for size in (1, 2, 4, 5):
    off = (fed(ids, size) - full).abs().amax(-1)[0] / full.abs().max()
    wrong = (off > 1e-6).nonzero().flatten().tolist()
    print(f"chunks of {size}, window of 5: off by {off.max():.0e}, wrong at tokens {wrong}")
changed = ids.clone()
changed[0, 7] = 28
moved = (fed(changed, 4) - fed(ids, 4)).abs().amax(-1)[0].nonzero().flatten().tolist()
print(f"chunks of 4, token 7 changed: the logits of tokens {moved} move")
