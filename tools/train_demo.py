"""Train the embedded models: a vocabulary, `tiny` on a text, and `nano` distilled from `tiny`.

    python tools/train_demo.py tinyshakespeare.txt --models_dir models

The model is GPT-2's (Radford et al. 2019), written once more in TensorFlow because training needs gradients; what it
saves are checkpoints in OpenAI's own format. The last tenth of the text is held out, and the weights with the lowest
loss on it are kept. `nano` learns to give `tiny`'s distribution (KL divergence, Hinton et al. 2015), so that it
guesses `tiny`'s next token well: the two behave like 124M and 1558M do.

Left out: accelerators, mixed precision, resuming. Two CPU cores take about an hour.
"""

import json
import math
import os
import sys
import time

import fire
import numpy as np
import tensorflow as tf
import tokenizers

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))  # run as a script from anywhere
from encoder import BYTE_TO_CHAR, END_OF_TEXT, get_encoder

N_VOCAB, N_CTX = 2048, 512
TINY = {"n_vocab": N_VOCAB, "n_ctx": N_CTX, "n_embd": 128, "n_head": 4, "n_layer": 12}
NANO = {"n_vocab": N_VOCAB, "n_ctx": N_CTX, "n_embd": 64, "n_head": 4, "n_layer": 2}
N_BATCH = 8  # windows of n_ctx tokens a step
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 3e-3, 0.1

# ----------------------------------------------------------------------------------------------------------------------
# The vocabulary
# ----------------------------------------------------------------------------------------------------------------------


def train_vocabulary(text: str, folders: list[str]) -> None:
    """Write encoder.json and vocab.bpe, numbered as OpenAI's are: the bytes, the merges in order, <|endoftext|>."""
    trainer = tokenizers.ByteLevelBPETokenizer()
    trainer.train_from_iterator([text], vocab_size=N_VOCAB - 1, show_progress=False)
    merges = [tuple(pair) for pair in json.loads(trainer.to_str())["model"]["merges"]]
    tokens = [*BYTE_TO_CHAR.values(), *(left + right for left, right in merges), END_OF_TEXT]
    assert len(set(tokens)) == N_VOCAB
    for folder in folders:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "encoder.json"), "w", encoding="utf-8") as f:
            json.dump({token: i for i, token in enumerate(tokens)}, f)
        with open(os.path.join(folder, "vocab.bpe"), "w", encoding="utf-8") as f:
            f.write("\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]))


# ----------------------------------------------------------------------------------------------------------------------
# The model, with OpenAI's variable names
# ----------------------------------------------------------------------------------------------------------------------


def init_params(hparams):
    """GPT-2's initialisation: normal with 0.02, smaller where a residual sum grows with depth."""
    n_embd, n_layer = hparams["n_embd"], hparams["n_layer"]

    def normal(*shape, std=0.02):
        return tf.Variable(tf.random.normal(shape, stddev=std))

    def linear(n_in, n_out, std=0.02):
        return {"w": normal(n_in, n_out, std=std), "b": tf.Variable(tf.zeros(n_out))}

    def norm():
        return {"g": tf.Variable(tf.ones(n_embd)), "b": tf.Variable(tf.zeros(n_embd))}

    residual_std = 0.02 / math.sqrt(2 * n_layer)
    params = {"wte": normal(hparams["n_vocab"], n_embd), "wpe": normal(hparams["n_ctx"], n_embd, std=0.01)}
    for i in range(n_layer):
        params[f"h{i}"] = {
            "ln_1": norm(),
            "attn": {"c_attn": linear(n_embd, 3 * n_embd), "c_proj": linear(n_embd, n_embd, residual_std)},
            "ln_2": norm(),
            "mlp": {"c_fc": linear(n_embd, 4 * n_embd), "c_proj": linear(4 * n_embd, n_embd, residual_std)},
        }
    return params | {"ln_f": norm()}


def named_variables(params, prefix="model"):
    """(name, variable) for every leaf: model/h0/attn/c_attn/w ..."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from named_variables(value, f"{prefix}/{name}")
        else:
            yield f"{prefix}/{name}", value


def layer_norm(x, g, b):  # [..., n_embd] -> [..., n_embd]
    mean, variance = tf.nn.moments(x, axes=-1, keepdims=True)
    return (x - mean) * tf.math.rsqrt(variance + 1e-5) * g + b


def linear(x, w, b):  # [n_rows, n_in] -> [n_rows, n_out]
    return tf.matmul(x, w) + b


def forward(params, tokens, n_head, dropout):  # int[n_batch, n_seq] -> [n_batch * n_seq, n_vocab]
    n_batch, n_seq = tokens.shape
    n_embd = params["wte"].shape[-1]
    d_head = n_embd // n_head
    mask = (tf.linalg.band_part(tf.ones((n_seq, n_seq)), -1, 0) - 1) * 1e10

    def drop(x):
        return tf.nn.dropout(x, dropout) if dropout else x

    x = drop(tf.reshape(tf.gather(params["wte"], tokens) + params["wpe"][:n_seq], (-1, n_embd)))
    for name in (name for name in params if name.startswith("h")):
        block = params[name]
        qkv = linear(layer_norm(x, **block["ln_1"]), **block["attn"]["c_attn"])
        qkv = tf.transpose(tf.reshape(qkv, (n_batch, n_seq, 3, n_head, d_head)), (2, 0, 3, 1, 4))
        q, k, v = tf.unstack(qkv)
        weights = tf.nn.softmax(tf.matmul(q * d_head**-0.5, k, transpose_b=True) + mask)
        heads = tf.reshape(tf.transpose(tf.matmul(weights, v), (0, 2, 1, 3)), (-1, n_embd))
        x = x + drop(linear(heads, **block["attn"]["c_proj"]))
        hidden = tf.nn.gelu(linear(layer_norm(x, **block["ln_2"]), **block["mlp"]["c_fc"]), approximate=True)
        x = x + drop(linear(hidden, **block["mlp"]["c_proj"]))
    return tf.matmul(layer_norm(x, **params["ln_f"]), params["wte"], transpose_b=True)


def save_model(folder, hparams, params):
    """hparams.json and a checkpoint as OpenAI writes them: weights as [1, n_in, n_out]."""
    tensors = {}
    for name, variable in sorted(named_variables(params), key=lambda named: named[0]):
        value = variable.numpy()
        tensors[name] = value[None] if name.endswith("/w") else value
    tf.raw_ops.SaveV2(
        prefix=os.path.join(folder, "model.ckpt"),
        tensor_names=list(tensors),
        shape_and_slices=[""] * len(tensors),
        tensors=list(tensors.values()),
    )
    with open(os.path.join(folder, "hparams.json"), "w", encoding="utf-8") as f:
        json.dump(hparams, f, indent=2)
        f.write("\n")


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def orthogonalize(g):  # [..., n_in, n_out] -> the same, its singular values near 1
    """Newton-Schulz iteration with the coefficients of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""
    tall = g.shape[-2] > g.shape[-1]
    x = tf.linalg.matrix_transpose(g) if tall else g
    x = x / (tf.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)
    for _ in range(5):
        a = tf.matmul(x, x, transpose_b=True)
        x = 3.4445 * x + tf.matmul(-4.7750 * a + 2.0315 * tf.matmul(a, a), x)
    x = tf.linalg.matrix_transpose(x) if tall else x
    return x * math.sqrt(max(1.0, g.shape[-1] / g.shape[-2]))


class Optimizer:
    """Muon for the matrices inside the blocks, Adam (Kingma & Ba 2015) for the rest; both decay decoupled weights."""

    def __init__(self, params):
        named = list(named_variables(params))
        self.matrices = [v for name, v in named if name.endswith("/w")]
        self.others = [v for name, v in named if not name.endswith("/w")]
        self.variables = self.matrices + self.others
        self.m = [tf.Variable(tf.zeros_like(v)) for v in self.variables]
        self.v = [tf.Variable(tf.zeros_like(v)) for v in self.others]

    def apply(self, grads, rate, step):
        grads, _ = tf.clip_by_global_norm(grads, 1.0)
        n_matrices = len(self.matrices)
        for v, g, m in zip(self.matrices, grads, self.m, strict=False):
            m.assign(0.95 * m + g)
            v.assign(v * (1 - rate * MUON_RATE * WEIGHT_DECAY) - rate * MUON_RATE * orthogonalize(g + 0.95 * m))
        for v, g, m, s in zip(self.others, grads[n_matrices:], self.m[n_matrices:], self.v, strict=True):
            g = tf.convert_to_tensor(g)  # the embedding's gradient is sparse
            m.assign(0.9 * m + 0.1 * g)
            s.assign(0.95 * s + 0.05 * g * g)
            m_hat, s_hat = m / (1 - 0.9**step), s / (1 - 0.95**step)
            v.assign_sub(rate * ADAM_RATE * m_hat / (tf.sqrt(s_hat) + 1e-8))


def batches(encoder, ids, seed):
    """Yield int[N_BATCH, N_CTX + 1] for ever: random windows of `ids`.

    One in eight begins where a speech does, after <|endoftext|>, so that an empty prompt begins a speech.
    """
    rng = np.random.default_rng(seed)
    (newline,) = encoder.encode("\n")
    last_start = len(ids) - N_CTX - 1
    speeches = 1 + np.flatnonzero((ids[:last_start] == newline) & (ids[1 : last_start + 1] == newline))
    while True:
        starts = rng.integers(last_start + 1, size=N_BATCH)
        at_speech = rng.random(N_BATCH) < 1 / 8
        starts[at_speech] = rng.choice(speeches, at_speech.sum())
        windows = ids[starts[:, None] + np.arange(N_CTX + 1)]
        windows[at_speech, 0] = encoder.eot_id
        yield windows


def targets(window):  # int[n_batch, n_seq + 1] -> int[n_batch * n_seq]
    return tf.reshape(window[:, 1:], (-1,))


def cross_entropy(logits, targets):  # [n_rows, n_vocab], int[n_rows] -> [n_rows]
    return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)


def validation_loss(params, hparams, ids):
    """Mean nats a token over `ids`, each scored once, in windows of n_ctx that do not overlap."""

    @tf.function
    def losses(window):
        return cross_entropy(forward(params, window[:, :-1], hparams["n_head"], 0.0), targets(window))

    total = 0.0
    for start in range(0, len(ids) - 1, N_CTX):
        total += float(tf.reduce_sum(losses(tf.constant(ids[None, start : start + N_CTX + 1]))))
    return total / (len(ids) - 1)


def fit(params, hparams, batch_loss, windows, held_out, n_steps):
    """Minimise `batch_loss(window)`; keep the weights of the lowest loss on `held_out`, and return that loss."""
    optimizer = Optimizer(params)

    @tf.function
    def train_step(window, rate, step):
        with tf.GradientTape() as tape:
            loss = batch_loss(window)
        optimizer.apply(tape.gradient(loss, optimizer.variables), rate, step)
        return loss

    best_loss, best_weights, started = math.inf, None, time.time()
    for step in range(1, n_steps + 1):
        rate = min(step / 50, 1.0) * min(1.0, 1.5 * (1 - (step - 1) / n_steps))  # warm up, hold for a third, decay
        loss = train_step(tf.constant(next(windows)), tf.constant(rate, tf.float32), tf.constant(float(step)))
        if step % 100 and step != n_steps:
            continue
        held_out_loss = validation_loss(params, hparams, held_out)
        minutes = (time.time() - started) / 60
        print(f"step {step}: training {float(loss):.4f}, held out {held_out_loss:.4f}, {minutes:.1f} min", flush=True)
        if held_out_loss < best_loss:
            best_loss, best_weights = held_out_loss, [v.numpy() for v in optimizer.variables]
    for variable, weights in zip(optimizer.variables, best_weights, strict=True):
        variable.assign(weights)
    return best_loss


def train_tiny(encoder, ids, held_out, n_steps, dropout):
    params = init_params(TINY)

    def batch_loss(window):
        return tf.reduce_mean(cross_entropy(forward(params, window[:, :-1], TINY["n_head"], dropout), targets(window)))

    return params, fit(params, TINY, batch_loss, batches(encoder, ids, seed=0), held_out, n_steps)


def distil_nano(encoder, tiny, ids, held_out, n_steps):
    params = init_params(NANO)

    def batch_loss(window):
        teacher = tf.nn.log_softmax(forward(tiny, window[:, :-1], TINY["n_head"], 0.0))
        student = tf.nn.log_softmax(forward(params, window[:, :-1], NANO["n_head"], 0.0))
        return tf.reduce_mean(tf.reduce_sum(tf.exp(teacher) * (teacher - student), axis=-1))

    return params, fit(params, NANO, batch_loss, batches(encoder, ids, seed=1), held_out, n_steps)


def main(text_file, models_dir="models", n_steps=1800, n_distil_steps=1800, dropout=0.15):
    """Train both models on TEXT_FILE and write them to MODELS_DIR/tiny and MODELS_DIR/nano."""
    with open(text_file, encoding="utf-8") as f:
        text = f.read()
    n_train = len(text) * 9 // 10
    folders = [os.path.join(models_dir, name) for name in ("tiny", "nano")]
    train_vocabulary(text[:n_train], folders)
    encoder = get_encoder("tiny", models_dir)
    ids, held_out = (np.array(encoder.encode(part), np.int32) for part in (text[:n_train], text[n_train:]))
    n_characters = len(text[n_train:]) / len(held_out)
    print(f"{len(ids)} tokens to learn from, {len(held_out)} held out, {n_characters:.2f} characters each")
    tf.random.set_seed(0)
    tiny, loss = train_tiny(encoder, ids, held_out, n_steps, dropout)
    save_model(folders[0], TINY, tiny)
    print(f"tiny: {loss:.4f} nats a token on the held-out text")
    nano, loss = distil_nano(encoder, tiny, ids, held_out, n_distil_steps)
    save_model(folders[1], NANO, nano)
    print(f"nano: {loss:.4f} nats a token on the held-out text")


if __name__ == "__main__":
    fire.Fire(main)
