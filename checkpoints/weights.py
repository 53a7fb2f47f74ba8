"""The named arrays of a GPT-2: their shapes, their nesting, and whether their numbers are finite."""

from collections.abc import Iterator

import numpy as np


def widened(upper_halves: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, of which it is the first two bytes."""
    return (upper_halves.astype(np.uint32) << 16).view(np.float32)


def expected_shapes(hparams: dict) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of each variable of a GPT-2, as OpenAI's checkpoints have them."""
    n_embd, n_inner = hparams["n_embd"], hparams.get("n_inner") or 4 * hparams["n_embd"]
    yield "wte", (hparams["n_vocab"], n_embd)
    yield "wpe", (hparams["n_ctx"], n_embd)
    for i in range(hparams["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            yield f"h{i}/{norm}/g", (n_embd,)
            yield f"h{i}/{norm}/b", (n_embd,)
        for linear, n_in, n_out in (
            ("attn/c_attn", n_embd, 3 * n_embd),
            ("attn/c_proj", n_embd, n_embd),
            ("mlp/c_fc", n_embd, n_inner),
            ("mlp/c_proj", n_inner, n_embd),
        ):
            yield f"h{i}/{linear}/w", (1, n_in, n_out)
            yield f"h{i}/{linear}/b", (n_out,)
    yield "ln_f/g", (n_embd,)
    yield "ln_f/b", (n_embd,)


def variable(variables: dict[str, np.ndarray], name: str, shape: tuple[int, ...], source: str) -> np.ndarray:
    """The variable model/NAME, less a leading 1 of its shape. ValueError: it is missing, or something else."""
    array, shape = variables.get(f"model/{name}"), shape[-2:]
    if array is None or array.shape not in (shape, (1, *shape)) or array.dtype != np.float32:
        found = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
        raise ValueError(
            f"{source}: model/{name} is {found}, expected float32{list(shape)} as its hyper-parameters say; "
            "the files must belong to one model"
        )
    return array.reshape(shape)


def nest_params(variables: dict[str, np.ndarray], hparams: dict, source: str) -> dict:
    """The variables model/h0/attn/c_attn/w ... as picoGPT nests them: blocks[0]["attn"]["c_attn"]["w"] ..., views all.

    "model/lm_head", [n_vocab, n_embd], is an output matrix that is not wte. ValueError: one is missing or has another
    shape than `hparams` says. Others (an optimizer's) are left out.
    """
    if f"model/h{hparams['n_layer']}/ln_1/g" in variables:
        raise ValueError(
            f"{source}: more layers than the {hparams['n_layer']} of its hyper-parameters; the files differ"
        )
    params: dict = {"blocks": []}
    if "model/lm_head" in variables:
        params["lm_head"] = variable(variables, "lm_head", (hparams["n_vocab"], hparams["n_embd"]), source).T
    for name, shape in expected_shapes(hparams):
        *path, leaf = name.split("/")
        node = params
        if path and path[0].startswith("h"):
            i = int(path.pop(0)[1:])
            if i == len(params["blocks"]):
                params["blocks"].append({})
            node = params["blocks"][i]
        for key in path:
            node = node.setdefault(key, {})
        node[leaf] = variable(variables, name, shape, source)
    return params


# ----------------------------------------------------------------------------------------------------------------------
# Non-finite numbers
# ----------------------------------------------------------------------------------------------------------------------


def non_finite(arrays, name: str = "") -> Iterator[tuple[str, int, int]]:
    """(name, how many numbers are NaN or infinite, of how many) of each such array in nested dicts and lists."""
    if isinstance(arrays, np.ndarray):
        if n_bad := arrays.size - np.count_nonzero(np.isfinite(arrays)):
            yield name, n_bad, arrays.size
        return
    for key, value in arrays.items() if isinstance(arrays, dict) else enumerate(arrays):
        yield from non_finite(value, f"{name}/{key}" if name else str(key))


def why_not_finite(logits: np.ndarray, params: dict) -> str:
    """What to say of logits that are not all finite."""
    ((_, n_bad, size),) = non_finite(logits)
    bad = [f"{n} of {of} numbers are NaN or infinite in {name}" for name, n, of in non_finite(params)]
    causes = "; ".join(bad) or "finite weights, so sums overflow"
    return f"{n_bad} of {size} numbers are NaN or infinite among the logits: {causes}; utils.py verify checks a model"


def check_finite(variables: dict[str, np.ndarray], source: str) -> None:
    """ValueError: some weights are NaN or infinite, and which."""
    bad = [f"{name} has {n} of {of}" for name, n, of in sorted(non_finite(variables))]
    if bad:
        more = f" and {len(bad) - 3} others" if len(bad) > 3 else ""
        raise ValueError(f"{source}: numbers that are NaN or infinite: {', '.join(bad[:3])}{more}")


def n_weights(params) -> int:
    """How many numbers there are in nested dicts and lists of arrays."""
    if isinstance(params, np.ndarray):
        return params.size
    return sum(map(n_weights, params.values() if isinstance(params, dict) else params))
