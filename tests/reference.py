"""GPT-2 in float64, one head and one position at a time: the slow, obvious reference, written from the papers.

Radford et al. 2019 (pre-norm, a norm after the last block, tied output), Vaswani et al. 2017 (attention),
Ba et al. 2016 (layer norm), Hendrycks & Gimpel 2016 (GELU, tanh form).
"""

import math

import numpy as np


def norm(x, g, b, eps=1e-5):  # [n_embd] -> [n_embd]
    return g * (x - np.mean(x)) / math.sqrt(np.var(x) + eps) + b


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "gelu_new": gelu,
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "relu": lambda x: x * (x > 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def reference_inside(model, ids):  # [n_seq] -> float64[n_layer + 1, n_seq, n_embd], [n_layer, n_head, n_seq, n_seq]
    """What goes into each layer and comes out of the last, and who looks where."""
    params, eps = to_float64(model.params), model.hparams.get("layer_norm_epsilon", 1e-5)
    activation = ACTIVATIONS[model.hparams.get("activation", "gelu_new")]
    n_head, n_embd = model.hparams["n_head"], model.hparams["n_embd"]
    d_head = n_embd // n_head
    x = [params["wte"][i] + params["wpe"][position] for position, i in enumerate(ids)]
    hidden, attention = [np.array(x)], np.zeros((len(params["blocks"]), n_head, len(ids), len(ids)))
    for i, layer in enumerate(params["blocks"]):
        c_attn, c_proj = layer["attn"]["c_attn"], layer["attn"]["c_proj"]
        qkv = [norm(row, **layer["ln_1"], eps=eps) @ c_attn["w"] + c_attn["b"] for row in x]
        for position in range(len(x)):
            heads = []
            for h in range(n_head):
                q, k, v = (slice(part * n_embd + h * d_head, part * n_embd + (h + 1) * d_head) for part in range(3))
                scores = [qkv[position][q] @ qkv[past][k] / math.sqrt(d_head) for past in range(position + 1)]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                attention[i, h, position, : position + 1] = weights
                heads.append(sum(weight * qkv[past][v] for past, weight in enumerate(weights)))
            x[position] = x[position] + np.concatenate(heads) @ c_proj["w"] + c_proj["b"]
        c_fc, c_proj = layer["mlp"]["c_fc"], layer["mlp"]["c_proj"]
        for position, row in enumerate(x):
            inner = activation(norm(row, **layer["ln_2"], eps=eps) @ c_fc["w"] + c_fc["b"])
            x[position] = row + inner @ c_proj["w"] + c_proj["b"]
        hidden.append(np.array(x))
    return np.array(hidden), attention


def reference_logits(model, ids):  # [n_seq] -> float64[n_seq, n_vocab]
    params, eps = to_float64(model.params), model.hparams.get("layer_norm_epsilon", 1e-5)
    hidden, _ = reference_inside(model, ids)
    output = params["lm_head"] if "lm_head" in params else params["wte"].T
    return np.array([norm(row, **params["ln_f"], eps=eps) @ output for row in hidden[-1]])


def to_float64(tree):
    if isinstance(tree, dict):
        return {name: to_float64(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [to_float64(value) for value in tree]
    return tree.astype(np.float64)
