"""spark-submit jobs/prepare.py --config conf/FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]…"""

import sys

from ncf_dist.cli import run_job
from ncf_dist.prepare.pipeline import prepare

if __name__ == "__main__":
    sys.exit(run_job("prepare", prepare))
