import platform
import subprocess
import sys

import pytest
from conftest import ROOT

WINDOWS = """if True:
    import resource
    import gpt2
    from utils import load_encoder_hparams_and_params

    {before}
    _, hparams, params = load_encoder_hparams_and_params("tiny")
    model = gpt2.Model(hparams, params)
    for _ in gpt2.generate(model, [1], 1030, slide_by=256):  # which feeds three times 257 tokens anew
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def page_faults(before):
    done = subprocess.run(
        [sys.executable, "-c", WINDOWS.format(before=before)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the limits are glibc's")
def test_prompts_find_their_memory_again():
    assert page_faults("") < 0.6 * page_faults("gpt2.keep_freed_memory = bool")
