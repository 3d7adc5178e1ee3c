"""spark-submit jobs/score.py --config conf/FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]… [--dry-run]"""

import sys

from ncf_dist.cli import run_job
from ncf_dist.score.pipeline import forecast, score

if __name__ == "__main__":
    sys.exit(run_job("score", score, dry_run=forecast))
