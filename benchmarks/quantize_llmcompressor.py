"""Quantize with llmcompressor, in its own environment: `MODEL OUTPUT WINDOWS gptq|awq BITS`."""

import json
import sys
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM

model, output, windows, method, bits = sys.argv[1:6]
torch.set_num_threads(2)
ids = json.loads(Path(windows).read_text())
weights = QuantizationArgs(
    num_bits=int(bits), type="int", symmetric=method == "gptq", strategy="group", group_size=128
)
groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
if method == "awq":
    from llmcompressor.modifiers.awq import AWQModifier as Modifier
else:
    from llmcompressor.modifiers.quantization import GPTQModifier as Modifier
loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
data = Dataset.from_list([{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids])
oneshot(
    model=loaded,
    dataset=data,
    recipe=Modifier(config_groups=groups, ignore=["lm_head"]),
    max_seq_length=len(ids[0]),
    num_calibration_samples=len(ids),
)
loaded.save_pretrained(output)
