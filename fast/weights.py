"""A model's weights as passes of several rows read them: as they lie, and copied into panels once that pays."""

import contextlib
import math
import threading
import time
from functools import partial
from itertools import cycle

import numpy as np

from fast.memory import available_bytes
from fast.panels import Matrix, as_it_lies, panels_shape, seconds, seconds_to_fill, streamed
from fast.server import find
from fast.threads import team

PRODUCTS = (("attn", "c_attn"), ("attn", "c_proj"), ("mlp", "c_fc"), ("mlp", "c_proj"))  # of a layer
MAX_FEW = 64  # rows for which panels can be faster than the weights as they lie
MANY = 8  # rows; up to so many panels are faster; of more, only multiples are timed
N_TIMINGS = 5  # of each way
TRIAL_BYTES = 1 << 27  # packed first, to see how long it takes: more than caches hold
TYPICAL_STEPS = 8  # of one row, as long as packing takes; 50 and more in memory new to a virtual machine
MIN_GAIN = 0.4  # steps of one row that packed weights save for each token, at least
DRAFT_GAIN = 0.15  # of a draft: it reads two rows at once if all guesses were right, and else single rows


class Clock(threading.local):
    """Seconds, without those in which this thread packs weights and times ways to multiply: that is done once."""

    def __init__(self):
        self.seconds_stopped = 0.0

    def __call__(self) -> float:
        return time.perf_counter() - self.seconds_stopped

    @contextlib.contextmanager
    def stopped(self):
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_stopped += time.perf_counter() - started


clock = Clock()


def next_multiple(n_rows: int) -> int:
    """The number of rows that is timed for so many."""
    return -(-n_rows // MANY) * MANY


def output_matrix(params):  # -> [n_embd, n_vocab]
    return params.get("lm_head", params["wte"].T)


def lay_out(matrices: list[Matrix], kernel, memory) -> list[Matrix]:
    """Give each its panels in this memory."""
    start = 0
    for matrix in matrices:
        shape = panels_shape(matrix.w, kernel)
        stop = start + math.prod(shape)
        matrix.use(kernel, memory[start:stop].reshape(shape), team.n_threads)
        start = stop
    return matrices


class Weights:
    """`params` are those of the model with each matrix a Matrix. Its methods want a team."""

    def __init__(self, params: dict):
        self.ways: dict = {}  # by the number of rows; as they lie, where there is none
        self.times: dict = {}  # of each way in seconds, by the number of rows that is timed
        self.matrices: list[Matrix] = []  # four of each layer, then the output's
        blocks = [self.with_matrices(block) for block in params["blocks"]]
        self.params = params | {"blocks": blocks, "lm_head": self.matrix(output_matrix(params))}
        self.n_bytes = sum(matrix.w.nbytes for matrix in self.matrices)
        self.layers = cycle([slice(4 * i, 4 * i + 4) for i in range(len(blocks))])  # of `matrices`
        self.lock = threading.Lock()
        self.is_packed, self.has_room = False, True
        self.steps_to_pack = TYPICAL_STEPS  # what packing takes, in steps of one row
        self.report = "none, there were no steps of several rows"  # for --stats: what is packed, or why nothing is

    def matrix(self, w) -> Matrix:
        self.matrices.append(Matrix(w, self.ways))
        return self.matrices[-1]

    def with_matrices(self, block: dict) -> dict:
        block = block | {part: dict(block[part]) for part in ("attn", "mlp")}
        for part, name in PRODUCTS:
            block[part][name] = block[part][name] | {"w": self.matrix(block[part][name]["w"])}
        return block

    def prepare(self, row_counts: set[int], cache) -> None:
        """Before a pass of few rows: pack the weights if the cache has room for enough tokens, choose products.

        Packing waits for the first tokens, which it would delay.
        """
        n_rows, n_left = max(row_counts), cache.n_ctx - cache.length
        n_saved = n_left * (DRAFT_GAIN if n_rows == 2 and cache.n_batch == 1 else MIN_GAIN)
        with clock.stopped():
            if not self.is_packed and cache.length and self.has_room and self.pays(n_saved):
                with self.lock: self.pack(n_rows, n_saved)  # fmt: skip  # noqa: E701  # one line: see Blas.held
            if self.is_packed:
                for n_rows in row_counts:
                    self.choose(n_rows)

    def pays(self, n_saved: float) -> bool:
        """Whether packed weights cost nothing more, or no more than the n_saved steps of one row that they save."""
        return self.is_packed or self.steps_to_pack <= n_saved

    def choose(self, n_rows: int) -> None:
        """Panels for few rows; for more than MANY what is faster for the multiple of MANY that comes next.

        Each of the first passes times both ways once: a busy moment is longer than all the timings.
        """
        n_timed, way = next_multiple(n_rows), streamed
        if n_rows > MANY:
            times = self.times.setdefault(n_timed, {streamed: [], as_it_lies: []})
            if len(times[streamed]) < N_TIMINGS:
                for way, known in times.items():  # each on a layer that is in no cache
                    known.append(seconds(way, n_timed, self.matrices[next(self.layers)]))
            way = min(times, key=lambda way: sorted(times[way])[len(times[way]) // 2])
        self.ways[n_rows] = way

    def fill(self, matrices: list[Matrix]) -> float:
        """Copy these into their panels; the time it takes in seconds."""
        return max(team.run([partial(seconds_to_fill, matrices, i) for i in range(team.n_threads)]))

    def memory_for(self, n: int) -> np.ndarray | None:
        """Memory for n numbers in one piece, hence in large pages; None if they do not fit."""
        n_gb, available_gb = 4 * n / 1e9, available_bytes() / 1e9
        with contextlib.suppress(MemoryError):
            if 2 * n_gb <= available_gb:  # twice: the weights as they lie want room too, or the system drops them
                return np.empty(n, np.float32)
        self.give_up(f"{n_gb:.1f} GB more do not fit in {available_gb:.1f} GB beside the weights")
        return None

    def give_up(self, reason: str) -> None:
        self.has_room, self.steps_to_pack, self.report = False, 0, f"none, {reason}"

    def pack(self, n_rows: int, n_saved: float = math.inf) -> None:
        """Copy the weights, as the kernel reads them that is fastest for so many rows."""
        if self.is_packed:  # by another thread meanwhile
            return
        started, kernels = time.perf_counter(), list(find().kernels)
        sizes = np.array(
            [[math.prod(panels_shape(matrix.w, kernel)) for matrix in self.matrices] for kernel in kernels]
        )
        if (memory := self.memory_for(sizes.sum(axis=1).max())) is None:
            return
        pieces = np.array_split(memory, len(kernels))
        n_trial = np.count_nonzero(sizes.max(axis=0).cumsum() <= min(TRIAL_BYTES // 4, pieces[-1].size))
        trials = [
            lay_out([Matrix(matrix.w, {}) for matrix in self.matrices[:n_trial]], kernel, piece)
            for kernel, piece in zip(kernels, pieces, strict=True)
        ]
        self.steps_to_pack = self.fill(trials[0]) / seconds(streamed, 1, trials[0])
        if not self.pays(n_saved):
            self.report = f"none, they take {self.steps_to_pack:.0f} steps to pack and would have saved {n_saved:.0f}"
            return
        for matrices in trials[1:]:
            self.fill(matrices)
        times = [[seconds(streamed, next_multiple(n_rows), each) for each in trials] for _ in range(N_TIMINGS)]
        best = np.median(times, axis=0).argmin()
        lay_out(self.matrices, kernels[best], memory)
        self.fill(self.matrices[n_trial if best == 0 else 0 :])  # the first trial lies where it belongs
        self.is_packed = True
        self.report = f"{memory.nbytes / 1e9:.3f} GB, packed in {time.perf_counter() - started:.3f} s"
