"""scripts/train.py under FSDP2 on CPU processes, as accelerate would start it on cards; for test_sharded.py.

    torchrun --nproc_per_node 2 tests/launched_fsdp.py OPTION …

accelerate shards only where there are cards, and runs DDP on a CPU without a word: it is told that these are cards. Its
own options come by the environment, as `accelerate launch` passes them on.
"""

import runpy
from pathlib import Path

from accelerate.state import PartialState
from accelerate.utils import DistributedType

_init = PartialState.__init__


def _init_as_on_cards(self, *args, **kwargs):
    _init(self, *args, **kwargs)
    if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = _init_as_on_cards  # type: ignore[method-assign]
    runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "train.py"), run_name="__main__")
