"""propmeta-edit dependent, from a clone: python benchmarks/run_dependent.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["dependent", *sys.argv[1:]]))
