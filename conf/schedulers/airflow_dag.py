"""A night as an Airflow DAG (Airflow 3): one task a stage, in order. Copy it into the DAGs folder.

Set in the environment of the workers: NCF_HOME, the folder of ncf-dist; NCF_CONFIG, the config file; and where wanted
NCF_ARGS (more arguments for every job, such as `--set train.ranks=4`), NCF_POOL, NCF_SCHEDULE, and NCF_REFIT=true with
a config whose train.refit is true: the judged model is then trained on every row before users are ranked.

- Exit codes 2, 3 and 4 (config, input, a gate's refusal) fail for good: another try would find the same. 1, 5 and 75
  (unexpected, busy, preempted) are tried again, and go on where the last try stopped. A refusal must not become a
  skipped task, as `skip_on_exit_code=4` would have it: skipped nights count as successes.
- `ds` is the day of the schedule, in UTC. `airflow backfill create --dag-id ncf_nightly --from-date … --to-date …`
  makes earlier nights; a night that is published already is found done.
- The last line of stdout is the task's XCom, and `publish` updates the asset `ncf_recommendations`.
- A task that is killed sends SIGTERM, which training answers with a checkpoint.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from airflow.sdk import DAG, Asset, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

REFIT = ("refit",) if os.environ.get("NCF_REFIT") == "true" else ()
STAGES = ("prepare", "train", "evaluate", *REFIT, "score", "publish")
FOR_GOOD = {2, 3, 4}
RECOMMENDATIONS = Asset("ncf_recommendations")


class NcfJob(BaseOperator):
    """Runs one job of ncf-dist; its result is what the job says."""

    template_fields: Sequence[str] = ("night",)

    def __init__(self, *, job: str, night: str = "{{ ds }}", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.job, self.night = job, night
        self._process: subprocess.Popen[str] | None = None

    def execute(self, context: Any) -> dict[str, Any]:
        launcher = os.path.join(os.environ["NCF_HOME"], "spark-submit.sh")
        more = shlex.split(os.environ.get("NCF_ARGS", ""))
        command = [launcher, self.job, "--config", os.environ["NCF_CONFIG"], "--ds", self.night, *more]
        self.log.info("%s", shlex.join(command))
        # What the job logs on stderr is the task's log, whole.
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        last = ""
        for line in self._process.stdout:
            last = line.strip() or last
            self.log.info("%s", line.rstrip())
        code = self._process.wait()
        try:
            said = json.loads(last)
        except ValueError:
            said = {"error": last}
        if code:
            failed = AirflowFailException if code in FOR_GOOD else AirflowException
            raise failed(f"{self.job} of {self.night} ended with {code}: {said.get('error')}")
        return dict(said)

    def on_kill(self) -> None:
        if self._process is not None:
            self._process.terminate()


with DAG(
    "ncf_nightly",
    description=__doc__.splitlines()[0],
    schedule=os.environ.get("NCF_SCHEDULE", "0 2 * * *"),
    start_date=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc),
    catchup=False,
    max_active_runs=1,  # Each night's index goes on from the one before.
    default_args={"retries": 2, "retry_delay": dt.timedelta(minutes=10)},
    tags=["ncf-dist"],
) as dag:
    before: NcfJob | None = None
    for stage in STAGES:
        outlets = [RECOMMENDATIONS] if stage == "publish" else []
        pool = os.environ.get("NCF_POOL", "default_pool")
        task = NcfJob(task_id=stage, job=stage, pool=pool, outlets=outlets)
        if before is not None:
            before >> task
        before = task
