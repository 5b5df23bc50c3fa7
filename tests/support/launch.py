"""One rank of a distributed test: `launch.py TEST_FILE FUNCTION RANK WORLD_SIZE FOLDER MEETING`.

Calls FUNCTION(rank, world_size, folder) in a gloo group that meets, and leaves its JSON answers, in the folder MEETING.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch.distributed as dist


def main() -> None:
    file, function, rank, world_size, folder, meeting = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("distributed_test", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_test"] = module
    spec.loader.exec_module(module)
    store = f"file://{meeting}/store"
    dist.init_process_group("gloo", init_method=store, rank=int(rank), world_size=int(world_size))
    answer = getattr(module, function)(int(rank), int(world_size), Path(folder))
    Path(meeting, f"answer-{rank}.json").write_text(json.dumps(answer))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
