"""Runs exported folders with optimum, in a Python of its own: it needs an older transformers.

    python optimum_runs.py JOBS.json RESULTS.json

A job has a ``folder``, a ``kind`` (``decoder``, ``features`` or ``classes``) and either ``ids``
(rows, padded with 0 where ``mask`` is 0) or, for the folder's own tokenizer, a ``text``; a decoder
also ``tokens``, how many are wanted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import (
    ORTModelForCausalLM,
    ORTModelForFeatureExtraction,
    ORTModelForSequenceClassification,
)
from transformers import AutoTokenizer

CLASSES = {
    "decoder": ORTModelForCausalLM,
    "features": ORTModelForFeatureExtraction,
    "classes": ORTModelForSequenceClassification,
}


def run(job: dict[str, Any]) -> Any:
    """Tokens of a decoder, or the first output of an encoder."""
    more = {"use_cache": True} if job["kind"] == "decoder" else {}
    model = CLASSES[job["kind"]].from_pretrained(
        job["folder"], subfolder="onnx", use_io_binding=False, **more
    )
    if "text" in job:
        job["ids"] = [AutoTokenizer.from_pretrained(job["folder"])(job["text"])["input_ids"]]
    ids = torch.tensor(job["ids"])
    mask = torch.tensor(job["mask"]) if "mask" in job else torch.ones_like(ids)
    if job["kind"] != "decoder":
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask)[0].tolist()
    found = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=job["tokens"],
        min_new_tokens=job["tokens"], pad_token_id=0,
    )  # fmt: skip
    return found[:, ids.shape[1] :].tolist()


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([run(job) for job in jobs]))
