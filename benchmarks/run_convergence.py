"""propmeta-edit convergence, from a clone: python benchmarks/run_convergence.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["convergence", *sys.argv[1:]]))
