"""Launch target: accelerate launch scripts/train.py --config configs/nca_mistral7b.yaml [--option value …]."""

import sys

from nca_align.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
