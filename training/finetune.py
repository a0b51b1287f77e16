"""The job of ``glare finetune`` for ``accelerate launch training/finetune.py --recipe ...``."""

import sys

from glare.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
