"""propmeta-edit search, from a clone: python benchmarks/run_search.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["search", *sys.argv[1:]]))
