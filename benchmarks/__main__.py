"""python -m benchmarks TABLE [flags]: see benchmarks/__init__.py."""

import os

from benchmarks.endurance import endurance
from benchmarks.evaluation import evaluate
from benchmarks.explain import ablation, cache, components, load
from benchmarks.measure import FOLDER
from benchmarks.passes import batch, decode, prefill, rows
from benchmarks.runs import runs
from benchmarks.speculation import acceptance, drafters
from console import command

OF_ANY_MODEL = (decode, prefill, rows, batch, components, ablation)
OF_CERTAIN_MODELS = (cache, load, drafters, acceptance)


def speculation(models_dir: str | None = None):
    """Both tables on speculation: the embedded pair with each drafter, and the real shapes by acceptance."""
    drafters(models_dir=models_dir)
    acceptance(models_dir=models_dir)


def all_tables(model_size: str = "random:124M", models_dir: str | None = None):
    """Every table, and one Markdown file of them all."""
    for table in OF_ANY_MODEL:
        table(model_size, models_dir)
    for table in OF_CERTAIN_MODELS:
        table(models_dir=models_dir)
    with open(os.path.join(FOLDER, "all.md"), "w", encoding="utf-8") as f:
        for table in OF_ANY_MODEL + OF_CERTAIN_MODELS:
            with open(os.path.join(FOLDER, f"{table.__name__}.md"), encoding="utf-8") as part:
                f.write(part.read() + "\n")


COMMANDS = {table.__name__: table for table in OF_ANY_MODEL + OF_CERTAIN_MODELS}
COMMANDS |= {"speculative": speculation, "runs": runs, "endurance": endurance, "eval": evaluate, "all": all_tables}

if __name__ == "__main__":
    command.run(COMMANDS)
