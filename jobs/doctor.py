"""spark-submit jobs/doctor.py --config conf/FILE.yaml [--set section.key=value]…"""

import sys

from ncf_dist.cli import run_job
from ncf_dist.doctor.pipeline import doctor

if __name__ == "__main__":
    sys.exit(run_job("doctor", doctor))
