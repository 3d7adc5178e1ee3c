"""spark-submit jobs/refit.py --config conf/FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]…"""

import sys

from ncf_dist.stopping import listen

if __name__ == "__main__":
    listen()  # Before the large imports: a request to stop counts from the first moment.
    from ncf_dist.cli import main

    sys.exit(main(["refit", *sys.argv[1:]]))
