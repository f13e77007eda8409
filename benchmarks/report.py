"""propmeta-edit report, from a clone: python benchmarks/report.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
