import os, sys
from pathlib import Path
import torch
from tests.run_distributed import *
from tests import run_distributed as rd

def first(folder):
    return rd.accumulation(folder, 1)

if __name__ == "__main__":
    rd.shard_on_cpu()
    folder=Path(sys.argv[1])
    for name in sys.argv[2:]:
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        torch.save(globals()[name](place), folder / f"{name}_{RANK}.pt")
    torch.distributed.barrier(); torch.distributed.destroy_process_group()
