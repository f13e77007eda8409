"""propmeta-edit table2, from a clone: python benchmarks/run_table2.py --help"""

import sys

from propmeta_edit import main

if __name__ == "__main__":
    sys.exit(main(["table2", *sys.argv[1:]]))
