"""Two models in a process, generators in turn, several threads, forked children: each text is as it is alone."""

import os
import threading
from itertools import zip_longest

import numpy as np
import pytest
from helpers import ROOT, first_layer, random_model, run, shared_out

import gpt2
from decoding.sampling import make_sampler
from speculative import DraftModel, PromptLookup

N_TOKENS = 20


@pytest.fixture(scope="module", params=["on this thread", "on several threads"])
def tasks(request, nano):
    """Functions that each begin a text anew: two random models and an embedded one, greedy and sampled, drafted.

    Small models as they are, and as large ones would be: all but single rows by a team of threads.
    """
    rng = np.random.default_rng(0)
    models = random_model(n_ctx=40), random_model(n_embd=32, n_head=4, n_ctx=40, seed=1), nano[1], first_layer(nano[1])
    small, other, target, draft = models if request.param == "on this thread" else map(shared_out, models)
    ids = [rng.integers(61, size=n).tolist() for n in (14, 1, 13, 5)]
    prompt = nano[0].encode("JULIET:\nWhat man art thou that thus bescreen'd in night")
    return [
        lambda: gpt2.generate(small, ids[0], N_TOKENS),
        lambda: gpt2.generate(other, ids[1], N_TOKENS, make_sampler(seed=3)),
        lambda: gpt2.generate(small, ids[2], N_TOKENS, draft=PromptLookup(4, 1)),
        lambda: gpt2.generate(other, ids[3], N_TOKENS, draft=DraftModel(small, 4)),
        lambda: gpt2.generate(target, prompt, N_TOKENS, make_sampler(0.8, seed=1), DraftModel(draft, 3)),
        lambda: gpt2.generate(draft, prompt, N_TOKENS),
        lambda: iter(gpt2.generate_batch(small, [ids[0], ids[1], ids[3]], N_TOKENS)),
    ]


def test_generators_in_turn(tasks):
    alone = [list(task()) for task in tasks]
    generators = [task() for task in tasks for _ in range(2)]
    texts = [[i for i in ids if i is not None] for ids in zip(*zip_longest(*generators), strict=True)]
    assert texts == [ids for ids in alone for _ in range(2)]


def test_several_threads(tasks):
    alone, texts = [list(task()) for task in tasks], {}
    begin = threading.Barrier(2 * len(tasks))

    def write(number):
        begin.wait()
        texts[number] = [list(tasks[number % len(tasks)]()) for _ in range(3)]

    writers = [threading.Thread(target=write, args=[number], daemon=True) for number in range(2 * len(tasks))]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert texts == {number: [alone[number % len(tasks)]] * 3 for number in range(2 * len(tasks))}


def test_a_generator_goes_on_in_another_thread(tasks):
    for task in tasks:
        alone, ids = list(task()), task()
        first, rest = [next(ids)], []
        reader = threading.Thread(target=rest.extend, args=[ids], daemon=True)
        reader.start()
        reader.join(60)
        assert first + rest == alone


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("is_busy", [False, True])
def test_forks_after_the_model_is_loaded(is_busy):
    """The children have none of the parent's threads, not even where these are in the middle of a product."""
    code = f"""if True:
        import os, sys, threading
        sys.path.insert(0, "tests")
        import gpt2
        from helpers import first_layer, shared_out
        from speculative import DraftModel
        from utils import load_encoder_hparams_and_params
        nano = gpt2.Model(*load_encoder_hparams_and_params("nano")[1:])
        target, draft = shared_out(nano), shared_out(first_layer(nano))
        def write():
            return list(gpt2.generate(target, list(range(40)), 12, draft=DraftModel(draft, 4)))
        expected, stop, wrong = write(), threading.Event(), []
        def write_on():
            while not stop.is_set():
                write() == expected or wrong.append(1)
        writers = [threading.Thread(target=write_on) for _ in range({2 * is_busy})]
        for writer in writers:
            writer.start()
        children = []
        for _ in range(6):
            child = os.fork()
            if not child:
                os._exit(0 if write() == expected else 1)
            children.append(child)
            write() == expected or wrong.append(1)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        stop.set()
        for writer in writers:
            writer.join()
        sys.exit(any(statuses) or bool(wrong))
    """
    done = run("-W", "ignore::DeprecationWarning", "-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_waits_for_the_passes_of_other_threads():
    """OpenBLAS ends its threads before a fork: a product that used them would never end."""
    code = """if True:
        import os, threading, time
        import gpt2
        from helpers import random_model
        passed, begun, end = [], threading.Event(), threading.Event()

        class Cache(gpt2.KVCache):
            def note(self, x):
                begun.set()
                end.wait()
                passed.append(x)

        model = random_model()
        cache = model.new_cache()
        busy = threading.Thread(target=model.forward, args=[[[1]], Cache(cache.kv)])
        busy.start()
        begun.wait()
        threading.Timer(0.2, end.set).start()
        child = os.fork()
        n_passed = len(passed)
        if not child:
            os._exit(0 if n_passed and list(gpt2.generate(model, [1], 3)) else 1)
        assert n_passed > model.hparams["n_layer"]
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        busy.join()

        class Forks(gpt2.KVCache):  # in the middle of a pass of its own
            child = None

            def note(self, x):
                self.child = os.fork() if self.child is None else self.child

        cache = Forks(cache.kv)
        model.forward([[1]], cache)
        if not cache.child:
            os._exit(0 if list(gpt2.generate(model, [1], 3)) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(cache.child, 0)[1]) == 0
    """
    done = run("-W", "ignore::DeprecationWarning", "-c", code, env={"PYTHONPATH": f"{ROOT}/tests"})
    assert (done.returncode, done.stderr) == (0, "")
