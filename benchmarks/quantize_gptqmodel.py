"""Quantize with gptqmodel, in its own environment: `MODEL OUTPUT WINDOWS.json gptq|awq BITS`."""

import json
import os
import sys
from pathlib import Path

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD

model, output, windows, method, bits = sys.argv[1:6]
os.chdir(Path(output).parent)  # it writes logs where it is started
torch.set_num_threads(2)
ids = json.loads(Path(windows).read_text())
kind = (
    {"method": METHOD.AWQ, "format": FORMAT.GEMM, "sym": False}
    if method == "awq"
    else {"method": METHOD.GPTQ}
)
config = QuantizeConfig(bits=int(bits), group_size=128, device="cpu", **kind)
loaded = GPTQModel.load(model, config)
loaded.quantize([{"input_ids": one, "attention_mask": [1] * len(one)} for one in ids], batch_size=8)
loaded.save(output)
