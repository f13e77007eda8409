"""propmeta-edit figure2, from a clone: python benchmarks/run_figure2.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["figure2", *sys.argv[1:]]))
