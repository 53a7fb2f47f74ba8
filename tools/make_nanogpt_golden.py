"""Make tests/goldens/nanogpt.json and tests/goldens/ckpt.pt: what PyTorch computes and writes for nanoGPT's models.

    pip install torch && python tools/make_nanogpt_golden.py

The JSON has the logits and the 50 greedy tokens of small models with the weights of tests/torchfiles.py; the file is
one of torch.save, as nanoGPT's train.py leaves it after a step. The tests need no PyTorch.

Follows the shape of karpathy/nanoGPT's model.py: its names, its tied output, its optional biases.
"""

import json
import os
import sys

import fire
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))  # run as a script from anywhere
sys.path.insert(1, os.path.join(sys.path[0], "tests"))
from torchfiles import HPARAMS, model_args, nanogpt_weights

GOLDENS = os.path.join(sys.path[0], "tests", "goldens")
SHAPE = {"n_vocab": 65, "n_ctx": 64, "n_embd": 24, "n_head": 3, "n_layer": 3}
PROMPT, N_TOKENS = [5, 40, 17, 3, 3, 61, 0, 22], 50
CASES = [
    {"name": "biases", "bias": True, "gelu": "erf"},
    {"name": "no biases", "bias": False, "gelu": "erf"},
    {"name": "tanh", "bias": True, "gelu": "tanh"},
    {"name": "tanh without biases", "bias": False, "gelu": "tanh"},
    {"name": "padded", "bias": False, "gelu": "erf", "n_vocab": 128, "prefix": "_orig_mod."},
    {"name": "own output", "bias": True, "gelu": "erf", "is_tied": False},
]


class Norm(nn.Module):
    def __init__(self, n_embd, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, n_embd, n_head, bias):
        super().__init__()
        self.n_head = n_head
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, n_embd, bias, approximate):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)
        self.approximate = approximate

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, n_embd, n_head, bias, approximate):
        super().__init__()
        self.ln_1, self.attn = Norm(n_embd, bias), Attention(n_embd, n_head, bias)
        self.ln_2, self.mlp = Norm(n_embd, bias), FeedForward(n_embd, bias, approximate)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, hparams, bias=True, gelu="erf", is_tied=True):
        super().__init__()
        n_embd, approximate = hparams["n_embd"], {"erf": "none", "tanh": "tanh"}[gelu]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(hparams["n_vocab"], n_embd),
                "wpe": nn.Embedding(hparams["n_ctx"], n_embd),
                "h": nn.ModuleList(
                    Block(n_embd, hparams["n_head"], bias, approximate) for _ in range(hparams["n_layer"])
                ),
                "ln_f": Norm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, hparams["n_vocab"], bias=False)
        if is_tied:
            self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, ids):  # [n_batch, n_seq] -> [n_batch, n_seq, n_vocab]
        x = self.transformer["wte"](ids) + self.transformer["wpe"].weight[: ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


def nanogpt(hparams, bias=True, gelu="erf", is_tied=True, seed=0):
    """The model with the weights of tests/torchfiles.py. An output of its own is wte's rows in reverse."""
    model = NanoGPT(hparams, bias, gelu, is_tied)
    weights = {name: torch.from_numpy(array) for name, array in nanogpt_weights(hparams, bias, seed).items()}
    wte = weights["transformer.wte.weight"]
    model.load_state_dict(weights | {"lm_head.weight": wte if is_tied else wte.flip(0)})
    return model


def golden(case):
    hparams = SHAPE | {"n_vocab": case.get("n_vocab", SHAPE["n_vocab"])}
    model, ids = nanogpt(hparams, case["bias"], case["gelu"], case.get("is_tied", True)), list(PROMPT)
    with torch.inference_mode():
        logits = model(torch.tensor([ids]))[0, [0, -1]]
        for _ in range(N_TOKENS):
            best = model(torch.tensor([ids]))[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-3  # no near tie
            ids.append(int(best.indices[0]))
    rounded = [[float(f"{value:.6g}") for value in row] for row in logits.tolist()]
    return case | {"hparams": hparams, "prompt": PROMPT, "logits": rounded, "ids": ids[len(PROMPT) :]}


def save_trained(path):
    """A checkpoint as train.py writes it after a step, with the state of its optimizer."""
    model = nanogpt(HPARAMS, bias=False)
    groups = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    loss = F.cross_entropy(model(torch.tensor([[0, 1]])).flatten(0, 1), torch.tensor([1, 2]))
    loss.backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model_args(HPARAMS, bias=False),
        "iter_num": 250,
        "best_val_loss": loss.detach(),
        "config": {"out_dir": "out", "learning_rate": 6e-4, "compile": True, "device": "cuda", "seed": -1},
    }
    torch.save(content, path)
    return content


def main(folder: str = GOLDENS):
    """Write nanogpt.json and ckpt.pt to FOLDER."""
    save_trained(os.path.join(folder, "ckpt.pt"))
    rows = ",\n  ".join(json.dumps(golden(case), separators=(",", ":")) for case in CASES)
    with open(os.path.join(folder, "nanogpt.json"), "w", encoding="utf-8") as f:
        f.write(f'{{\n "versions": {{"torch": "{torch.__version__}"}},\n "cases": [\n  {rows}\n ]\n}}\n')


if __name__ == "__main__":
    fire.Fire(main)
