"""propmeta-edit figure3, from a clone: python benchmarks/run_figure3.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["figure3", *sys.argv[1:]]))
