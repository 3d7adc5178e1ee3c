"""spark-submit jobs/fetch.py --config conf/FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]…"""

import sys

from ncf_dist.cli import run_job
from ncf_dist.fetch.pipeline import fetch

if __name__ == "__main__":
    sys.exit(run_job("fetch", fetch))
