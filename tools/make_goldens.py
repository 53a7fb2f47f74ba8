"""Make tests/goldens/transformers.json: what Hugging Face transformers gives where this project promises the same.

    pip install torch transformers && python tools/make_goldens.py

Three parts: the ids that its logits processors keep of random logits, beam search with the weights of the embedded
`tiny`, and the log-probability of each id of a few texts. The file names the versions that made it; the tests need
neither of the two packages.
"""

import json
import os
import sys

import fire
import numpy as np
import torch
import transformers
from transformers.generation import logits_process

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))  # run as a script from anywhere
from benchmarks.peers import Transformers
from gpt2 import Model
from utils import load_encoder_hparams_and_params

ROOT = sys.path[0]
N_VOCAB, N_VECTORS, N_SEEN = 300, 20, 25
SETTINGS = {
    "top_k": (logits_process.TopKLogitsWarper, [1, 7, 40]),
    "top_p": (logits_process.TopPLogitsWarper, [0.1, 0.5, 0.9]),
    "min_p": (logits_process.MinPLogitsWarper, [0.3, 0.05, 0.01]),
}
PENALTIES = [0.5, 1.2, 3.0]
ALL = {"repetition_penalty": 1.3, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.04}
PROMPTS = ["ROMEO:", "The king", "My lord, I", "What is thy name?\n\n", "First Citizen:\nWe are"]
TEXTS = [
    "ROMEO:\nI'll tell thee, sir, I'll not be your husband.\n\nROMEO:\n",
    "KING RICHARD III:\nNow is the winter of our discontent\nMade glorious summer by this sun of York;\n",
    "Colourless green ideas sleep furiously: 3.14159 <tag/> ÄÖÜ\n",
]

# ----------------------------------------------------------------------------------------------------------------------
# Logits processors
# ----------------------------------------------------------------------------------------------------------------------


def random_logits(seed: int) -> np.ndarray:  # -> float32[N_VOCAB]
    # The old generator, whose numbers NumPy promises never to change; the test makes the same.
    return np.random.RandomState(seed).normal(scale=3, size=N_VOCAB).astype(np.float32)


def kept_ids(processor, seen: list[int], logits: np.ndarray) -> list[int]:
    processed = processor(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0]
    return torch.isfinite(processed).nonzero()[:, 0].tolist()


def penalized(seen: list[int], logits: np.ndarray, penalty: float) -> dict[int, float]:
    """The logits of the ids in `seen`; the others stay as they were."""
    processor = logits_process.RepetitionPenaltyLogitsProcessor(penalty)
    processed = processor(torch.tensor([seen]), torch.from_numpy(logits.copy())[None])[0].numpy()
    others = np.delete(np.arange(N_VOCAB), seen)
    assert (processed[others] == logits[others]).all()
    return {i: float(f"{processed[i]:.6g}") for i in sorted(set(seen))}


def all_processors():
    """In the order in which generate() puts them."""
    return transformers.LogitsProcessorList(
        [
            logits_process.RepetitionPenaltyLogitsProcessor(ALL["repetition_penalty"]),
            logits_process.TemperatureLogitsWarper(ALL["temperature"]),
            logits_process.TopKLogitsWarper(ALL["top_k"]),
            logits_process.TopPLogitsWarper(ALL["top_p"]),
            logits_process.MinPLogitsWarper(ALL["min_p"]),
        ]
    )


def make_logits(seed: int) -> dict:
    logits = random_logits(seed)
    seen = np.random.RandomState(1000 + seed).randint(N_VOCAB, size=N_SEEN).tolist()
    kept = {
        name: [[value, kept_ids(processor(value), seen, logits)] for value in values]
        for name, (processor, values) in SETTINGS.items()
    }
    return {
        "seed": seed,
        "seen": seen,
        "kept": kept,
        "penalized": [[penalty, penalized(seen, logits, penalty)] for penalty in PENALTIES],
        "kept_by_all": kept_ids(all_processors(), seen, logits),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Beam search and scores
# ----------------------------------------------------------------------------------------------------------------------


def make_beams(gpt2, prompt: list[int], n_tokens: int, n_beam: int, length_penalty: float, eot_id: int) -> dict:
    out = gpt2.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n_tokens,
        num_beams=n_beam,
        num_return_sequences=n_beam,
        length_penalty=length_penalty,
        do_sample=False,
        early_stopping=False,
        eos_token_id=eot_id,
        pad_token_id=eot_id,
        return_dict_in_generate=True,
        output_scores=True,
    )
    beams = []
    for ids, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = ids.index(eot_id) + 1 if eot_id in ids else len(ids)  # what follows is padding
        beams.append([round(score, 6), ids[:end]])
    return {
        "prompt": prompt,
        "n_tokens": n_tokens,
        "n_beam": n_beam,
        "length_penalty": length_penalty,
        "eot_id": eot_id,
        "beams": beams,
    }


def make_all_beams(gpt2, encoder) -> list[dict]:
    # The embedded model was trained on one text and hardly ever ends it, so other ids take the role of the end too.
    ends = [encoder.eot_id, *(encoder.encode(text)[0] for text in ("\n", ",", "."))]
    cases = []
    for n, prompt in enumerate(PROMPTS):
        for n_beam in (2, 4, 5):
            for length_penalty in (1.0, 0.6, 1.5):
                eot_id = ends[n % len(ends)]
                cases.append(make_beams(gpt2, encoder.encode(prompt), 20 + 2 * n, n_beam, length_penalty, eot_id))
    return cases


def log_probabilities(gpt2, ids: list[int]) -> list[float]:
    """Of each id after the first."""
    with torch.inference_mode():
        rows = gpt2(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    return [round(value, 6) for value in rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()]


def main(path: str = os.path.join(ROOT, "tests", "goldens", "transformers.json")):
    """Write what transformers gives to PATH."""
    encoder, hparams, params = load_encoder_hparams_and_params("tiny", os.path.join(ROOT, "models"))
    gpt2 = Transformers(Model(hparams, params)).gpt2
    beams = make_all_beams(gpt2, encoder)
    assert any(len(ids) < case["n_tokens"] for case in beams for _, ids in case["beams"])
    texts = [encoder.encode(text) for text in TEXTS]
    golden = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "n_vocab": N_VOCAB,
        "all": ALL,
        "logits": [make_logits(seed) for seed in range(N_VECTORS)],
        "beams": beams,
        "scores": [{"ids": ids, "log_probabilities": log_probabilities(gpt2, ids)} for ids in texts],
    }
    parts = []
    for name, value in golden.items():
        rows = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in value) if isinstance(value, list) else ""
        parts.append(f' "{name}": ' + (f"[\n  {rows}\n ]" if rows else json.dumps(value)))
    with open(path, "w", encoding="utf-8") as f:
        f.write("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    fire.Fire(main)
