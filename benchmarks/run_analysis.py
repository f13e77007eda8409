"""propmeta-edit analysis, from a clone: python benchmarks/run_analysis.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["analysis", *sys.argv[1:]]))
