"""What a model computes on the way: hidden states and attention weights, and a picture of the latter.

    python -m analysis "The king and his" --model_size tiny --layer 3 --path attention.png

All passes through the cache that a caller hands to Model.forward, so looking is a cache that keeps more.
"""

import warnings

import numpy as np

from decoding.sampling import check, is_whole, log_softmax
from gpt2 import KVCache, Model, attention_scores, load_model


class Trace(KVCache):
    """A cache for one call of Model.forward, `plainly`, that keeps what the layers compute.

    `hidden`: what goes into each layer and, last, what comes out of the last one, n_layer + 1 arrays
    float32[n_batch, n_new, n_embd]. `weights`: the attention of each layer, float32[n_batch, n_head, n_new, n_seq],
    each row a distribution over the tokens up to its own. Both of the last layer for the n_last rows only.
    """

    def __init__(self, cache: KVCache):
        super().__init__(cache.kv, cache.length, cache.n_pad)
        self.hidden: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def attend(self, layer, q, kv):
        heads = super().attend(layer, q, kv)
        k = self.kv[layer, 0, :, :, : self.length + kv.shape[3]]
        self.weights.append(np.exp(log_softmax(attention_scores(q, k, self.padding(k.shape[2])))))
        return heads

    def note(self, x):
        self.hidden.append(x.copy())


def look_inside(model: Model, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(hidden states float32[n_layer + 1, n_seq, n_embd], attention weights float32[n_layer, n_head, n_seq, n_seq])."""
    trace = Trace(model.new_cache())
    model.forward([ids], trace, n_last=len(ids), plainly=True)
    return np.concatenate(trace.hidden), np.concatenate(trace.weights)


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401  # only pictures need it
    except ImportError:
        return False
    return True


def draw_attention(weights: np.ndarray, tokens: list[str], title: str, path: str) -> None:
    """A PNG of float32[n_head, n_seq, n_seq]: the heads in a grid, in each a row of weights for every token."""
    import matplotlib  # only pictures need it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    n_columns = int(np.ceil(np.sqrt(len(weights))))
    n_rows = -(-len(weights) // n_columns)
    size = max(2.2, 0.22 * len(tokens))
    figure, grid = pyplot.subplots(
        n_rows, n_columns, figsize=(size * n_columns, size * n_rows + 0.5), layout="constrained", squeeze=False
    )
    for head, axes in enumerate(grid.flat):
        if head >= len(weights):
            axes.axis("off")
            continue
        axes.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head}", fontsize=9)
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
    figure.suptitle(title, fontsize=10, parse_math=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # an emoji is drawn as a box
            figure.savefig(path, format="png", dpi=110)  # or .png would become .png.png
    except OSError as e:
        raise OSError(e.errno, e.strerror, path) from e
    finally:
        pyplot.close(figure)


def main(
    prompt: str,
    *,
    model_size: str = "124M",
    models_dir: str | None = None,
    layer=0,
    path: str = "attention.png",
):
    """Draw where each token of a prompt looks: python -m analysis "PROMPT" [flags]

    PROMPT                 a text of up to 64 tokens
    --model_size 124M      124M, 355M, 774M or 1558M, downloaded when first used, or a folder of models_dir
    --models_dir models    where the models are, beside the programs unless given
    --layer 0              whose attention, counted from 0
    --path attention.png   the picture: heads in a grid, a row for each token, dark where it looks
    """
    check("layer", layer, is_whole(layer) and layer >= 0, "a whole number of 0 or more")
    check("path", path, path.endswith(".png"), "a name that ends in .png")
    if not has_matplotlib():
        raise ValueError("drawing needs matplotlib; pip install matplotlib")
    encoder, model = load_model(model_size, models_dir)
    check("layer", layer, layer < model.hparams["n_layer"], f"a whole number from 0 to {model.hparams['n_layer'] - 1}")
    ids = encoder.encode_prompt(prompt)
    if len(ids) > 64:
        raise ValueError(f"a prompt of {len(ids)} tokens; pictures of more than 64 cannot be read, shorten it")
    _, weights = look_inside(model, ids)
    # Line ends and the like by their names; a dollar sign would begin a formula.
    tokens = [repr(encoder.token_bytes(i).decode("utf-8", "replace"))[1:-1].replace("$", r"\$") for i in ids]
    draw_attention(weights[layer], tokens, f"{model_size}, layer {layer}: where each token (row) looks", path)
