"""scripts/train.py on CPU processes, in the environment of `accelerate launch`, as on cards; for test_launch_files.py.

    torchrun --nproc_per_node 2 tests/launched_as_on_cards.py OPTION …

accelerate shards by FSDP only where there are cards, and runs DDP on a CPU without a word: it is told that these are
cards. DeepSpeed's processes it connects only there.
"""

import runpy
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

_init = PartialState.__init__


def _init_as_on_cards(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        PartialState.__init__ = _init_as_on_cards  # type: ignore[method-assign]
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "train.py"), run_name="__main__")
