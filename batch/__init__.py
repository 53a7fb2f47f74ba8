"""Many prompts: one file in, one file out: python -m batch prompts.jsonl --output out.jsonl.

From Python: for result in batch.complete_many(model, encoder, requests), see schedule.py.
"""

from batch.requests import Request
from batch.schedule import complete_many

__all__ = ["Request", "complete_many"]
