"""propmeta-edit table1, from a clone: python benchmarks/run_table1.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["table1", *sys.argv[1:]]))
