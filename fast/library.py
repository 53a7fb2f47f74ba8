"""NumPy's BLAS, and how many threads its products use."""

import contextlib
import threading
from functools import cached_property


class Blas:
    """NumPy's BLAS, held to one thread where passes need that. The number holds for all threads of the process.

    Holding takes 3 us, so it is done for each pass of a small model and each shared part of a large one's, not for a
    text: between two tokens a program has BLAS as it was.
    """

    def __init__(self):
        self.lock, self.holders, self.n_before, self.n_spare = threading.Lock(), set(), 0, 0

    @cached_property
    def controller(self):
        """What sets the number of threads, or None."""
        try:
            import threadpoolctl  # only needed here; without it all products are plain ones on BLAS's threads
        except ImportError:
            return None
        found = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
        return min(found, key=lambda library: "numpy" not in library.filepath, default=None)

    def set(self, n: int) -> None:
        # From 3.8 on the public method does nothing but in the first thread that called it, as long as that lives.
        getattr(self.controller, "_real_set_num_threads", self.controller.set_num_threads)(n)

    @contextlib.contextmanager
    def held(self, n_used: int = 1):
        """Within it products use one thread, while the caller hands n_used of BLAS's threads work of its own."""
        me = threading.get_ident()
        try:
            # On one line: a signal cannot come between the lines of a `with`, but the test's KeyboardInterrupt can.
            with self.lock: self.hold(me, n_used)  # fmt: skip  # noqa: E701
            yield
            with self.lock: self.let_go(me)  # fmt: skip  # noqa: E701
        except BaseException:  # not `finally`: Ctrl-C may come in the line above, too
            with self.lock: self.let_go(me)  # fmt: skip  # noqa: E701
            raise

    # In this order, an interrupt between two lines leaves BLAS's number to `let_go`, and never loses it.

    def hold(self, me: int, n_used: int) -> None:
        if self.controller:
            if not self.holders:
                self.n_before = self.controller.get_num_threads()
            self.holders.add(me)
            if self.n_spare < n_used > 1 and threading.active_count() > 1:
                # Another thread may raise the number meanwhile. Then products of the threads in use wait for idle ones.
                self.set(2 * max(n_used, self.n_before))  # which starts them
                self.n_spare = n_used
            self.set(1)

    def let_go(self, me: int) -> None:
        if self.holders == {me}:
            self.set(self.n_before)
        self.holders.discard(me)


blas = Blas()
