"""propmeta-edit figure4, from a clone: python benchmarks/run_figure4.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["figure4", *sys.argv[1:]]))
