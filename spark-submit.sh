#!/usr/bin/env bash
# Runs one job; `./spark-submit.sh --help` says how. This process becomes the job's Python, which starts a stock spark-submit
# as its child when it needs Spark: so signals reach the job, and a terminal is one.
# stdout belongs to the job, whose last line is one JSON object. What is said here goes to stderr.
set -euo pipefail

here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
jobs="fetch prepare train evaluate refit score publish nightly rollback clean status runs sweep doctor"

usage() {
  cat <<END
usage: ./spark-submit.sh JOB --config conf/FILE.yaml [--ds YYYY-MM-DD] [--set section.key=value]... [-- SPARK_SUBMIT_OPTIONS]

  JOB                     one of: $jobs
  --config FILE.yaml      the configuration of this line
  --ds YYYY-MM-DD         the night; default today (UTC); nightly takes several: --ds repeated, or --from D1 --to D2
  --allow-future          take a --ds after tomorrow, for a backtest
  --set section.key=value overrides one value of the config; may be repeated
  --cluster               send the environment that make package made to the executors
  -- OPTIONS              handed to spark-submit last, so they win: -- --driver-memory 8g --conf spark.ui.enabled=true

  SIGTERM or SIGINT end it with exit code 75; in training after a checkpoint. With --deploy-mode cluster the job runs elsewhere,
  under a spark-submit that is waited for, and that holds for it alone.

  SPARK_HOME, if set, names the Spark whose bin/spark-submit is used; else the one in .venv, else the one on PATH.
  PYSPARK_PYTHON and PYSPARK_DRIVER_PYTHON default to .venv's Python.
  ./spark-submit.sh --java-home prints the JAVA_HOME that jobs run with.

exit codes: 0 done, 1 unexpected, 2 usage or config, 3 input, 4 gate refused, 5 busy or stale, 75 preempted (safe to rerun)
END
}

stop() {
  echo "ncf-dist: $*" >&2
  exit 2
}

# Asked to stop before there is a job: nothing was begun.
stopped() {
  printf '{"job": "%s", "ds": null, "run_key": null, "status": "failed", "outputs": {}, "metrics": {}, ' "$job"
  printf '"error": "stopped before the job had begun: run the same command again", "details": null, "seconds": 0}\n'
  exit 75
}

# Sets JAVA_HOME to the first Java that Spark runs on: the caller's JAVA_HOME, `java` on PATH, then where Debian puts JDK 17.
find_java() {
  local java about major found=""
  for java in "${JAVA_HOME:+$JAVA_HOME/bin/java}" "$(command -v java || true)" "${JVM_DIR:-/usr/lib/jvm}"/*17*/bin/java; do
    [[ -x $java ]] || continue
    about=$("$java" -XshowSettings:properties -version 2>&1) || true
    [[ $about =~ version\ \"([^\"]+)\" ]] || continue
    major=${BASH_REMATCH[1]%%[!0-9]*}
    if ((major >= 17 && major <= 21)); then
      # The JVM knows its home even where `java` is a link or a wrapper.
      if [[ $about =~ java\.home\ =\ ([^$'\n']+) ]]; then JAVA_HOME=${BASH_REMATCH[1]}; else JAVA_HOME=${java%/bin/java}; fi
      export JAVA_HOME
      return
    fi
    found="${found:+$found, }Java ${BASH_REMATCH[1]} at $java"
  done
  stop "Java 17 to 21 is needed, found ${found:-none}${JAVA_HOME:+ (JAVA_HOME=$JAVA_HOME)};" \
    "run apt-get install openjdk-17-jre-headless, or export JAVA_HOME=/path/to/jdk-17"
}

# Sets SPARK_HOME, and `submit` to the spark-submit to use.
find_spark() {
  local bundled=("$here"/.venv/lib/python3.*/site-packages/pyspark)
  if [[ -z ${SPARK_HOME:-} ]]; then
    if [[ ! -x ${bundled[0]}/bin/spark-submit ]]; then
      submit=$(command -v spark-submit) || stop "no spark-submit in .venv or on PATH; run make -C '$here' install, or set SPARK_HOME"
      return
    fi
    export SPARK_HOME=${bundled[0]}
  fi
  submit=$SPARK_HOME/bin/spark-submit
  [[ -x $submit ]] || stop "SPARK_HOME is $SPARK_HOME, which has no bin/spark-submit; unset it, or set it to the folder that has one"
  # Python's half of Spark must be of the same version as the JVM's.
  if [[ $SPARK_HOME -ef ${bundled[0]} ]]; then return; fi
  local part
  for part in "$SPARK_HOME"/python/lib/py4j-*-src.zip "$SPARK_HOME"/python/lib/pyspark.zip; do
    if [[ -e $part ]]; then PYTHONPATH=$part${PYTHONPATH:+:$PYTHONPATH}; fi
  done
  if [[ -n ${PYTHONPATH:-} ]]; then export PYTHONPATH; fi
}

case ${1:-} in
  -h | --help) usage; exit ;;
  --java-home) find_java; echo "$JAVA_HOME"; exit ;;
esac
if [[ -z ${1:-} || " $jobs " != *" $1 "* ]]; then
  [[ -z ${1:-} ]] || echo "ncf-dist: there is no job '$1'" >&2
  usage >&2
  exit 2
fi

job=$1
shift
trap stopped TERM INT
job_args=()
while (($#)); do
  case $1 in
    --) shift; break ;;
    -h | --help) usage; exit ;;
    *) job_args+=("$1"); shift ;;
  esac
done
user_options=("$@")

find_java
[[ -e $here/.venv/.installed ]] || stop "the environment $here/.venv is missing or half made; run make -C '$here' install"
python=$here/.venv/bin/python
export PYSPARK_PYTHON=${PYSPARK_PYTHON:-$python} PYSPARK_DRIVER_PYTHON=${PYSPARK_DRIVER_PYTHON:-$python}
export LOG4J_CONFIGURATION_FILE=${LOG4J_CONFIGURATION_FILE:-$here/conf/log4j2.properties}
find_spark

options=(--properties-file "$here/conf/spark-defaults.conf")
# A cluster's own defaults (where its storage is, for example) stay in force; Spark 3.5 reads one file only.
cluster_defaults=${SPARK_CONF_DIR:-${SPARK_HOME:-}/conf}/spark-defaults.conf
if [[ -e $cluster_defaults ]]; then
  if compgen -G "${SPARK_HOME:-}/jars/spark-core_*-3.*.jar" >/dev/null; then
    echo "ncf-dist: Spark 3 does not read $cluster_defaults beside conf/spark-defaults.conf; pass what you need from it after --" >&2
  else
    options+=(--load-spark-defaults)
  fi
fi
# The progress bar is for people; in a log file it is noise.
if [[ -t 2 ]]; then options+=(--conf spark.ui.showConsoleProgress=true); else options+=(--conf spark.ui.showConsoleProgress=false); fi

# An outer Spark's JVM is not this job's.
unset PYSPARK_GATEWAY_PORT PYSPARK_GATEWAY_SECRET NCF_SPARK_OPTIONS NCF_SPARK_LENT

# Nothing that a job starts takes a module from the working folder. Hashes of text are as spark-submit sets them.
export NCF_SPARK_SUBMIT=$submit PYTHONSAFEPATH=1 PYTHONHASHSEED=${PYTHONHASHSEED:-0}
exec "$PYSPARK_DRIVER_PYTHON" "$here/jobs/$job.py" "${job_args[@]}" -- "${options[@]}" "${user_options[@]}"
