"""spark-submit jobs/nightly.py --config conf/FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]…"""

import sys

from ncf_dist.cli import run_job
from ncf_dist.nightly.pipeline import nightly

if __name__ == "__main__":
    sys.exit(run_job("nightly", nightly))
