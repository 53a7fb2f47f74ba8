"""Other programs that run GPT-2, to compare times and logits with: each gets the weights of a Model.

A peer has prefill(ids), which feeds a prompt and returns the logits of its last row, and decode(ids), which feeds the
last n_steps ids one by one after the others, which were fed before, and returns the logits of the first of these.
Those that have batches have complete(prompts, n_tokens), which returns n_tokens ids after each prompt, greedily.
"""

import math
import sys
import tempfile

import numpy as np

from fast.threads import count_threads
from fast.weights import PRODUCTS

N_STEPS = 8  # tokens decoded one after another: the first after a pause takes longer than the others

# ----------------------------------------------------------------------------------------------------------------------
# Plain NumPy
# ----------------------------------------------------------------------------------------------------------------------


def plain_forward(ids, params, n_head, past=None, every_row=True):  # [n_new] -> [n_new or 1, n_vocab]
    """GPT-2 as one writes it first, in the dtype of the weights; `past` is a cache that grows by concatenation."""
    n_past = past[0][0].shape[0] if past else 0
    x = params["wte"][ids] + params["wpe"][n_past : n_past + len(ids)]
    d_head = x.shape[-1] // n_head

    def norm(x, g, b):
        return g * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + x.dtype.type(1e-5)) + b

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))

    mask = np.triu(np.full((len(ids), n_past + len(ids)), -1e10, x.dtype), n_past + 1)
    for i, block in enumerate(params["blocks"]):
        h = norm(x, **block["ln_1"]) @ block["attn"]["c_attn"]["w"] + block["attn"]["c_attn"]["b"]
        q, k, v = np.split(h, 3, axis=-1)
        if past is not None:
            if n_past:
                k, v = (np.concatenate(pair) for pair in zip(past[i], (k, v), strict=True))
            past[i : i + 1] = [(k, v)]
        heads = []
        for qh, kh, vh in zip(*(np.split(part, n_head, axis=-1) for part in (q, k, v)), strict=True):
            scores = qh @ kh.T / math.sqrt(d_head) + mask
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(scores / scores.sum(-1, keepdims=True) @ vh)
        x = x + np.hstack(heads) @ block["attn"]["c_proj"]["w"] + block["attn"]["c_proj"]["b"]
        h = gelu(norm(x, **block["ln_2"]) @ block["mlp"]["c_fc"]["w"] + block["mlp"]["c_fc"]["b"])
        x = x + h @ block["mlp"]["c_proj"]["w"] + block["mlp"]["c_proj"]["b"]
    return norm(x if every_row else x[-1:], **params["ln_f"]) @ params["wte"].T


class PlainNumPy:
    name = "plain NumPy, no cache (picoGPT's way)"
    n_steps = 1  # without a cache the next would be a prefill as well

    def __init__(self, model):
        self.model = model

    def prefill(self, ids):
        return plain_forward(ids, self.model.params, self.model.hparams["n_head"])[-1]

    decode = prefill


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face transformers
# ----------------------------------------------------------------------------------------------------------------------


class Transformers:
    name = "Hugging Face transformers, PyTorch float32"
    n_steps = N_STEPS

    def __init__(self, model):
        import torch
        import transformers

        self.torch = torch
        names = {"n_vocab": "vocab_size", "n_ctx": "n_positions"}
        config = transformers.GPT2Config(**{names.get(name, name): value for name, value in model.hparams.items()})
        self.gpt2 = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            self.copy_weights(model.params)
        self.past = None

    def copy_weights(self, params):
        def copy(target, source):
            target.copy_(self.torch.from_numpy(np.array(source)))

        target = self.gpt2.transformer
        copy(target.wte.weight, params["wte"])
        copy(target.wpe.weight, params["wpe"])
        copy(target.ln_f.weight, params["ln_f"]["g"])
        copy(target.ln_f.bias, params["ln_f"]["b"])
        for layer, block in zip(target.h, params["blocks"], strict=True):
            for norm in ("ln_1", "ln_2"):
                copy(getattr(layer, norm).weight, block[norm]["g"])
                copy(getattr(layer, norm).bias, block[norm]["b"])
            for part, name in PRODUCTS:
                linear = getattr(getattr(layer, part), name)
                copy(linear.weight, block[part][name]["w"])
                copy(linear.bias, block[part][name]["b"])

    def feed(self, ids, past):
        with self.torch.inference_mode():
            out = self.gpt2(self.torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].numpy(), out.past_key_values

    def prefill(self, ids):
        logits, self.past = self.feed(ids, None)
        return logits

    def decode(self, ids):
        if too_many := self.past.get_seq_length() - (len(ids) - self.n_steps):
            self.past.crop(-too_many)
        logits = []
        for i in ids[-self.n_steps :]:
            scores, self.past = self.feed([i], self.past)
            logits.append(scores)
        return logits[0]

    def complete(self, prompts, n_tokens):  # -> n_tokens ids after each of the prompts, all padded to the longest
        n_longest = max(map(len, prompts))
        ids = [[0] * (n_longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (n_longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        with self.torch.inference_mode():
            out = self.gpt2.generate(
                self.torch.tensor(ids),
                attention_mask=self.torch.tensor(mask),
                max_new_tokens=n_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, n_longest:].tolist()


# ----------------------------------------------------------------------------------------------------------------------
# CTranslate2
# ----------------------------------------------------------------------------------------------------------------------


class CTranslate2:
    """Decodes greedily after a static prompt, the one state that it keeps between calls.

    Each call copies that state, which may take as long as a token: hence more tokens a call.
    """

    name = "CTranslate2 float32"
    n_steps = 2 * N_STEPS

    def __init__(self, model):
        import ctranslate2

        with tempfile.TemporaryDirectory() as folder:
            self.specify(ctranslate2.specs, model).save(folder)
            self.generator = ctranslate2.Generator(folder, compute_type="float32", intra_threads=count_threads())

    def specify(self, specs, model):
        activation = specs.common_spec.Activation.GELUTanh
        spec = specs.TransformerDecoderModelSpec.from_config(
            model.hparams["n_layer"], model.hparams["n_head"], activation=activation
        )
        spec.register_vocabulary([str(i) for i in range(model.hparams["n_vocab"])])
        spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"  # it wants them to be words
        spec.decoder.scale_embeddings = False
        self.set_weights(spec.decoder, **model.params)
        spec.validate()
        spec.optimize()  # stores wte once
        return spec

    def set_weights(self, decoder, wte, wpe, blocks, ln_f):
        def set_norm(target, g, b):
            target.gamma, target.beta = g, b

        def set_linear(target, w, b):
            target.weight, target.bias = w.T, b

        decoder.embeddings.weight = decoder.projection.weight = wte
        decoder.position_encodings.encodings = wpe
        set_norm(decoder.layer_norm, **ln_f)
        for layer, block in zip(decoder.layer, blocks, strict=True):
            set_norm(layer.self_attention.layer_norm, **block["ln_1"])
            set_norm(layer.ffn.layer_norm, **block["ln_2"])
            set_linear(layer.self_attention.linear[0], **block["attn"]["c_attn"])
            set_linear(layer.self_attention.linear[1], **block["attn"]["c_proj"])
            set_linear(layer.ffn.linear_0, **block["mlp"]["c_fc"])
            set_linear(layer.ffn.linear_1, **block["mlp"]["c_proj"])

    def feed(self, ids, n_tokens, **options):
        result = self.generator.generate_batch(
            [[str(i) for i in ids]],
            max_length=n_tokens,
            end_token=[],  # none ends the text
            include_prompt_in_result=False,  # else the prompt is fed a token at a time
            return_logits_vocab=True,
            **options,
        )
        return np.array(result[0].logits[0][0]).reshape(-1)

    def prefill(self, ids):
        return self.feed(ids, 1)

    def decode(self, ids):
        past, following = ids[: -self.n_steps], ids[-self.n_steps :]
        return self.feed(following[:1], self.n_steps, static_prompt=[str(i) for i in past])

    def complete(self, prompts, n_tokens):
        # What prompts have beyond the shortest is fed a token at a time, and is in the result.
        n_shortest, n_longest = min(map(len, prompts)), max(map(len, prompts))
        results = self.generator.generate_batch(
            [[str(i) for i in prompt] for prompt in prompts],
            max_length=n_longest - n_shortest + n_tokens,
            end_token=[],
            include_prompt_in_result=False,
        )
        new = [result.sequences_ids[0] for result in results]
        starts = [len(prompt) - n_shortest for prompt in prompts]
        return [ids[start : start + n_tokens] for ids, start in zip(new, starts, strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# All of them
# ----------------------------------------------------------------------------------------------------------------------

PEERS = (PlainNumPy, Transformers, CTranslate2)


def installed_peers(model) -> list:
    """A peer of each kind, with the weights of `model`. Those that are not installed are named on stderr."""
    peers = []
    for peer in PEERS:
        try:
            peers.append(peer(model))
        except ImportError as e:
            print(f"{peer.name}: not installed ({e.name})", file=sys.stderr)
    return peers
