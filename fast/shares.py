"""Passes in which each thread computes whole layers for its own heads and its own hidden units.

A head's output goes through its own rows of attn/c_proj, a hidden unit's through its own row of mlp/c_proj, and the sum
over all of them is the layer's output (Shoeybi et al. 2019, Megatron-LM, figure 3). So the threads meet twice a layer,
to add up, and nothing else passes between them.
"""

import contextlib
import math
import sys
import threading
import time
from functools import partial
from itertools import chain, cycle, pairwise
from queue import SimpleQueue

import numpy as np

from fast.memory import available_bytes
from fast.panels import WIDTHS, Matrix, in_panels, panels_shape, seconds, seconds_to_fill, ways, widths
from fast.threads import Stopped, in_turn, others_turn, run

PRODUCTS = (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))  # of a layer
MAX_FEW = 64  # rows for which panels can be faster than the weights as they lie
MANY = 8  # rows; of more, only multiples are timed
MAX_IN_TURN = 32  # rows; with more, what is not a product takes longer than waking up
N_ROWS_OF_WIDTH = 5  # the width of the panels is what suits so many rows best
N_TIMINGS = 5  # of each way
N_PARTS = 32  # of the output matrix: one is timed at a time
TRIAL_BYTES = 1 << 27  # packed first, to see how long it takes: more than caches hold
TYPICAL_STEPS = 8  # of one row, as long as packing takes; 50 and more in memory new to a virtual machine
MIN_GAIN = 0.5  # steps of one row that packed weights save for each token, at least


class Meeting:
    """Where the threads of one pass add up."""

    def __init__(self, n: int):
        self.boxes = [[SimpleQueue() for _ in range(n)] for _ in range(n)]  # [to][from]
        self.is_stopped = False

    def total(self, me, x):  # [...] -> [...], the sum over all threads, the same in each
        for thread, boxes in enumerate(self.boxes):
            if thread != me:
                boxes[me].put(x)
        with others_turn:
            parts = [x if thread == me else box.get() for thread, box in enumerate(self.boxes[me])]
        if self.is_stopped:
            raise Stopped
        return sum(parts[1:], start=parts[0])

    def stop(self) -> None:
        self.is_stopped = True
        for box in chain(*self.boxes):
            box.put(None)


def cut(n: int, n_parts: int, size: int) -> list[slice]:
    """range(n) in n_parts as equal as can be, each but the last of whole `size`s if there are enough of these."""
    size = size if n >= size * n_parts else 1
    edges = [min(n, round(n * i / n_parts / size) * size) for i in range(n_parts)]
    return [slice(*edge) for edge in pairwise([*edges, n])]


def output_matrix(params):  # -> [n_embd, n_vocab]
    return params.get("lm_head", params["wte"].T)


class Shares:
    """A model's weights in shares, one for each thread: as they lie, and copied into panels once that pays."""

    def __init__(self, hparams: dict, params: dict, n_threads: int):
        self.params = params
        n_head, d_head = hparams["n_head"], hparams["n_embd"] // hparams["n_head"]
        n = min(n_threads, n_head, len(params["wte"]))
        self.heads = cut(n_head, n, 1)
        self.columns = [slice(heads.start * d_head, heads.stop * d_head) for heads in self.heads]
        self.units = cut(params["blocks"][0]["mlp"]["c_fc"]["w"].shape[1], n, 64)
        self.ids = cut(len(params["wte"]), n, 64)
        self.ways, self.output_ways = {}, {}  # by the number of rows; as they lie, where there is none
        self.matrices: list[list[Matrix]] = [[] for _ in range(n)]  # by share: four of each layer, then the output's
        self.params_of = [self.share(i) for i in range(n)]
        self.n_bytes = sum(matrix.w.nbytes for matrices in self.matrices for matrix in matrices)
        self.layers = cycle([slice(4 * i, 4 * i + 4) for i in range(len(params["blocks"]))])  # of `matrices`
        self.parts = cycle(range(N_PARTS))
        self.lock = threading.Lock()
        self.is_packed, self.has_room = False, True
        self.steps_to_pack = TYPICAL_STEPS  # what packing takes, in steps of one row
        self.report = "none, there were no steps of several rows"  # for --stats: what is packed, or why nothing is

    def share(self, i: int) -> dict:
        """Params with the matrices of share i, noted in `matrices`. The first adds the biases of what is summed up."""
        heads, units, is_first = self.columns[i], self.units[i], np.float32(i == 0)

        def matrix(w, ways=self.ways):
            self.matrices[i].append(Matrix(w, ways))
            return self.matrices[i][-1]

        blocks = []
        for block in self.params["blocks"]:
            c_attn, attn_proj, c_fc, mlp_proj = (block[part][name]["w"] for part, name in PRODUCTS)
            b = [block[part][name]["b"] for part, name in PRODUCTS]
            c_attn = {"w": matrix(c_attn.reshape(len(c_attn), 3, -1).swapaxes(0, 1)[..., heads])}
            c_attn["b"] = b[0].reshape(3, -1)[:, heads].ravel()
            attn = {"c_attn": c_attn, "c_proj": {"w": matrix(attn_proj[None, heads]), "b": b[1] * is_first}}
            c_fc = {"w": matrix(c_fc[None, :, units]), "b": b[2][units]}
            mlp = {"c_fc": c_fc, "c_proj": {"w": matrix(mlp_proj[None, units]), "b": b[3] * is_first}}
            blocks.append(block | {"attn": attn, "mlp": mlp})
        lm_head = matrix(output_matrix(self.params)[None, :, self.ids[i]], self.output_ways)
        return self.params | {"blocks": blocks, "lm_head": lm_head}

    def on_all(self, work) -> list:
        """What work(matrices) returns for each share, on its thread."""
        return run([partial(work, matrices) for matrices in self.matrices])

    def prepare(self, row_counts: set[int], cache) -> None:
        """Before a pass of few rows: pack the weights if the cache has room for enough tokens, choose products.

        Packing waits for the first tokens, which it would delay.
        """
        n_left = cache.n_ctx - cache.length
        if not self.is_packed and cache.length and self.has_room and self.pay(n_left):
            with self.lock: self.pack(n_left)  # fmt: skip  # noqa: E701  # one line: see Blas.held
        if self.is_packed:
            for n_rows in row_counts - self.ways.keys():
                self.choose(n_rows)

    def pay(self, n_left: int) -> bool:
        """Whether the weights are packed, or n_left tokens to come earn back the time of packing."""
        return self.is_packed or self.steps_to_pack <= MIN_GAIN * n_left

    def choose(self, n_rows: int) -> None:
        """Time all ways for n_rows rows, or for the multiple of MANY that comes next."""
        n_timed = n_rows if n_rows < MANY else -(-n_rows // MANY) * MANY
        for chosen, sample in ((self.output_ways, self.sample_output), (self.ways, self.sample_layer)):
            if n_timed not in chosen:
                chosen[n_timed] = self.fastest(dict.fromkeys(ways(self.width), sample), n_timed)
            chosen[n_rows] = chosen[n_timed]

    def sample_layer(self) -> list[list[Matrix]]:
        """By share, the matrices of the next layer, which no cache holds."""
        layer = next(self.layers)
        return [matrices[layer] for matrices in self.matrices]

    def sample_output(self) -> list[list[Matrix]]:
        part = next(self.parts)
        return [[matrices[-1].part(part, N_PARTS)] for matrices in self.matrices]

    def fastest(self, samples: dict, n_rows: int):
        """The way, of those in `samples`, that is fastest with the matrices that its sample takes for each timing."""
        times: dict = {way: [] for way in samples}
        for way in [*samples] * N_TIMINGS:
            works = [partial(seconds, way, n_rows, matrices) for matrices in samples[way]()]
            times[way].append(sum(run(works)))
        return min(samples, key=lambda way: np.median(times[way]))

    def fastest_in_panels(self):
        """Timed on copies of a layer, one for each way, which push each other out of the caches."""
        layer, samples = self.sample_layer(), {}
        for way, width in widths().items():
            copies = run([partial(in_panels, matrices, width) for matrices in layer])
            samples[way] = partial(list, copies)
        return self.fastest(samples, N_ROWS_OF_WIDTH)

    def memory_for(self, n: int) -> np.ndarray | None:
        """Memory for n numbers in one piece, hence in large pages; None if they do not fit."""
        n_gb, available_gb = 4 * n / 1e9, available_bytes() / 1e9
        with contextlib.suppress(MemoryError):
            if 2 * n_gb <= available_gb:  # twice: the weights as they lie want room too, or the system drops them
                return np.empty(n, np.float32)
        self.has_room, self.steps_to_pack = False, 0
        self.report = f"none, {n_gb:.1f} GB more do not fit in {available_gb:.1f} GB beside the weights"
        return None

    def pack(self, n_left: int = sys.maxsize) -> None:
        if self.is_packed:  # by another thread meanwhile
            return
        started, matrices = time.perf_counter(), [m for share in self.matrices for m in share]
        way = self.fastest_in_panels()
        self.width = WIDTHS[way]
        shapes = [panels_shape(m.w, self.width) for m in matrices]
        sizes = [math.prod(shape) for shape in shapes]
        if (memory := self.memory_for(sum(sizes))) is None:
            return
        for matrix, panels, shape in zip(matrices, np.split(memory, np.cumsum(sizes)[:-1]), shapes, strict=True):
            matrix.panels = panels.reshape(shape)
        n_trial = len(PRODUCTS) * math.ceil(TRIAL_BYTES * len(self.params["blocks"]) / memory.nbytes)
        seconds_to_pack = max(self.on_all(lambda m: seconds_to_fill(m[:n_trial])))
        self.steps_to_pack = seconds_to_pack / max(self.on_all(lambda m: seconds(way, 1, m[:n_trial])))
        if not self.pay(n_left):
            for matrix in matrices:
                matrix.panels = None
            self.report = f"none, they take {self.steps_to_pack:.0f} steps to pack and {n_left} tokens were to come"
            return
        self.on_all(lambda m: seconds_to_fill(m[n_trial:]))
        self.is_packed = True
        self.report = f"{memory.nbytes / 1e9:.3f} GB, packed in {time.perf_counter() - started:.3f} s"


def in_shares(gpt2, tokens, cache, n_last, shares: Shares):  # int[n_batch, n_new] -> [n_batch, n_last, n_vocab]
    """gpt2(tokens, cache, n_last), its heads, hidden units and logits shared out."""
    n = len(shares.heads)
    meeting, turn = Meeting(n), threading.Lock()
    turns = [turn] * n if tokens.size <= MAX_IN_TURN else [threading.Lock() for _ in range(n)]
    logits = np.empty((len(tokens), n_last, len(shares.params["wte"])), np.float32)

    def work(i):
        total, heads = partial(meeting.total, i), cache.share(shares.heads[i])
        logits[..., shares.ids[i]] = gpt2(tokens, heads, n_last, total=total, **shares.params_of[i])

    run([partial(in_turn, turns[i], partial(work, i)) for i in range(n)], meeting.stop)
    return logits
