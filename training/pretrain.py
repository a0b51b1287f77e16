"""The job of ``glare pretrain`` for ``accelerate launch training/pretrain.py --recipe ...``."""

import sys

from glare.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", *sys.argv[1:]]))
