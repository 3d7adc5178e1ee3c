"""spark-submit jobs/publish.py --config conf/FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]…"""

import sys

from ncf_dist.cli import run_job
from ncf_dist.publish.pipeline import publish

if __name__ == "__main__":
    sys.exit(run_job("publish", publish))
