"""Write torch_save.pth, a file by PyTorch itself with a tensor of each kind, for the reader that does without PyTorch.

    .venv-oracle/bin/python tests/golden/torch_save.py tests/golden/torch_save.pth

Each tensor counts 0, 1, 2, ... in its own order, but for what its name says.
"""

import argparse
import sys
import types

import torch

count = torch.arange(24.0)
dtypes = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16",
          "uint8", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]  # fmt: skip
norm = torch.nn.BatchNorm2d(3)
saved = {
    "dtypes": {name: count[:6].to(getattr(torch, name)).reshape(2, 3) for name in dtypes},
    "bool": count[:6] > 2,
    "transposed": count.reshape(2, 3, 4).permute(2, 0, 1),
    "expanded": count[:3].expand(4, 3),
    "part": count[5:11],  # shares its storage with transposed and expanded
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(count[:4].clone()),
    "state_dict": norm.state_dict(),
    "optimizer": torch.optim.AdamW(norm.parameters(), lr=0.5).state_dict(),
    "args": argparse.Namespace(model="faster_vit_0_224", lr=0.005, mean=(0.5, 0.25), amp=True, resume=None),
    "plain": types.SimpleNamespace(a=1),
    "size": torch.Size([2, 3]),
    "metric": 82.1,
}
torch.save(saved, sys.argv[1])
