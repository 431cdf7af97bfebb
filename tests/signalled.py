"""`nca-align train` in a process of its own that sends itself a signal in a step; small shards of the reference."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

NEVER = "-1 -1 0"  # rank, step and how many times


def start_training(
    flags: Mapping[str, object], processes: int, number: signal.Signals, when: str = NEVER, **environment: str
) -> subprocess.Popen:
    """Start it, under torchrun where `processes` is not 0; `when` is the rank, the step, and how many times."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes else []), __file__, *given],
        env=os.environ | {"OMP_NUM_THREADS": "1", "SIGNAL": f"{int(number)} {when}"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip


def main() -> int:
    from transformers import TrainerCallback

    import nca_align.training.reference_cache
    from nca_align import trainer
    from nca_align.commands.train.command import main as train

    nca_align.training.reference_cache.ROWS_PER_SHARD = 4
    number, rank, step, times = map(int, os.environ["SIGNAL"].split())

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if (args.process_index, state.global_step) == (rank, step):
                for _ in range(times):
                    os.kill(os.getpid(), number)

    own = trainer.NCATrainer.__init__

    def with_callback(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.add_callback(Signal())

    trainer.NCATrainer.__init__ = with_callback
    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
