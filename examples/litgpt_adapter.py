# litgpt's Llama through litgpt's own weight converter.  litgpt reads no config.json, so its fields are mapped here.
from copy import deepcopy
from importlib.metadata import version

from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

from conformance import Unsupported


class LitGPT:
    name, families, dtypes = f"litgpt {version('litgpt')}", {"llama"}, {"float64", "float32", "bfloat16", "float16"}

    def load(self, checkpoint):
        c = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0} | checkpoint.config
        rope = {"rope_type": "default", "rope_theta": c["rope_theta"]} | (c.get("rope_scaling") or {})
        rope |= c.get("rope_parameters", {})
        if rope["rope_type"] not in ("default", "linear", "llama3") or c["hidden_act"] not in ("silu", "gelu"):
            raise Unsupported(f"rope_type {rope['rope_type']} with hidden_act {c['hidden_act']}")
        config = Config.from_name(
            "Llama-2-7b-hf", n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"], rope_base=rope["rope_theta"],
            n_head=c["num_attention_heads"], n_query_groups=c.get("num_key_value_heads"), head_size=c.get("head_dim"),
            intermediate_size=c["intermediate_size"], padded_vocab_size=c["vocab_size"], norm_eps=c["rms_norm_eps"],
            mlp_class_name="LLaMAMLP" if c["hidden_act"] == "silu" else "GemmaMLP",  # both gated
            rope_adjustments={key.replace("position_embeddings", "seq_len"): rope[key] for key in rope},
        )  # fmt: skip
        copy_weights_hf_llama(config, {}, weights := {}, checkpoint.tensors())
        model = Llama(config).to(checkpoint.device, checkpoint.dtype)
        model.load_state_dict(weights)
        return model


class Llama(GPT):
    session = deepcopy  # litgpt keeps the cache inside the model

    def feed(self, input_ids):
        if self.mask_cache is None:
            self.set_kv_cache(len(input_ids), device=input_ids.device)
        start, self.fed = getattr(self, "fed", 0), getattr(self, "fed", 0) + input_ids.shape[1]
        return self(input_ids, input_ids.new_tensor(range(start, self.fed)), self.fed)
