"""The exact worlds: every run of the plan that docs/study/worlds.csv has not, then the tables and the picture.

python scripts/study_worlds/run.py

It takes 43 minutes of two cores. Killed at any moment and started again, it goes on.
"""

from plan import PARTS
from runs import WORLDS_CSV, run_all

import results

if __name__ == "__main__":
    run_all((run for part in PARTS.values() for run in part()), WORLDS_CSV)
    results.main()
