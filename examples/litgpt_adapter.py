# litgpt through litgpt's own weight converter.  litgpt reads no config.json, so its fields are mapped here.
from copy import deepcopy
from importlib.metadata import version

from litgpt import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

from conformance import Unsupported


class LitGPT:
    name, families = f"litgpt {version('litgpt')}", {"llama", "mistral"}

    def load(self, checkpoint):
        c = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e4, "rope_parameters": {}} | checkpoint.config
        shared, window = (8, 4096) if c["model_type"] == "mistral" else (None, None)  # where config.json says nothing
        rope = {"rope_type": "default", "rope_theta": c["rope_theta"]} | (c.get("rope_scaling") or c["rope_parameters"])
        if rope["rope_type"] not in ("default", "linear", "llama3") or c["hidden_act"] not in ("silu", "gelu"):
            raise Unsupported(f"rope_type {rope['rope_type']} with hidden_act {c['hidden_act']}")
        config = Config.from_name(
            "Llama-2-7b-hf", n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"], rope_base=rope["rope_theta"],
            n_head=c["num_attention_heads"], n_query_groups=c.get("num_key_value_heads", shared), block_size=5000,
            head_size=c.get("head_dim"), sliding_window_size=c.get("sliding_window", window),
            intermediate_size=c["intermediate_size"], padded_vocab_size=c["vocab_size"], norm_eps=c["rms_norm_eps"],
            mlp_class_name="LLaMAMLP" if c["hidden_act"] == "silu" else "GemmaMLP",  # both gated
            rope_adjustments={key.replace("position_embeddings", "seq_len"): rope[key] for key in rope},
        )  # fmt: skip
        copy_weights_hf_llama(config, {}, weights := {}, checkpoint.tensors())
        (model := Model(config).to(checkpoint.device, checkpoint.dtype)).load_state_dict(weights)
        return model


class Model(GPT):
    fed, session = 0, deepcopy  # litgpt keeps the cache inside the model

    def feed(self, input_ids):
        if not self.fed:
            self.set_kv_cache(len(input_ids), device=input_ids.device)
        self.fed += input_ids.shape[1]
        return self(input_ids, input_ids.new_tensor(range(self.fed))[-input_ids.shape[1] :], self.fed)
