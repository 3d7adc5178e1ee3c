"""The launcher and `make install` as a person runs them: real processes, stand-ins for what they call.

Every guard is tested from outside: what it prints, and its exit code.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
JOBS = (
    "fetch",
    "prepare",
    "train",
    "evaluate",
    "refit",
    "score",
    "publish",
    "nightly",
    "rollback",
    "clean",
    "status",
    "runs",
    "sweep",
    "doctor",
)
INSTALL_FILES = (
    "Makefile",
    "spark-submit.sh",
    "pyproject.toml",
    "requirements.lock",
    "requirements-torch.txt",
)
STEPS = ["[1/5]", "[2/5]", "[3/5]", "[4/5]", "[5/5]"]


def run(*command: str | Path, cwd: Path = ROOT, env: Mapping[str, str] = {}) -> subprocess.CompletedProcess[str]:
    # Variables that an outer make or Spark left behind would reach into the inner one.
    ours = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("MAKE", "MFLAGS", "SPARK", "PYSPARK", "LOG4J", "NCF_DRIVER"))
    }
    command_line = [str(part) for part in command]
    return subprocess.run(
        command_line, cwd=cwd, env=ours | dict(env), capture_output=True, text=True, timeout=60, check=False
    )


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return path


def java(path: Path, version: str) -> Path:
    return script(path, f"echo 'openjdk version \"{version}\" 2025-01-01' >&2")


def java_env(tmp_path: Path, version: str) -> dict[str, str]:
    """`java` on PATH says it is `version`, and there is no other."""
    java(tmp_path / "bin" / "java", version)
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "JAVA_HOME": "",
        "JVM_DIR": str(tmp_path / "no-jvm"),
    }


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def launcher_copy(tmp_path: Path) -> Path:
    checkout = tmp_path / "check out"  # a space, because people have them
    checkout.mkdir()
    shutil.copy(ROOT / "spark-submit.sh", checkout)
    return checkout


BUNDLED = Path(".venv/lib/python3.11/site-packages/pyspark")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A launcher whose Python prints what it was given."""
    checkout = launcher_copy(tmp_path)
    script(
        checkout / ".venv/bin/python",
        r'printf "%s\n" "$PYSPARK_PYTHON" "$NCF_SPARK_SUBMIT" "$PYTHONPATH" "$@"; echo "a log" >&2; exit 4',
    )
    (checkout / ".venv/.installed").touch()
    script(checkout / BUNDLED / "bin/spark-submit", "exit 1")
    return checkout


# --- spark-submit.sh: usage ---


@pytest.mark.parametrize("args", [[], [""], ["recommend"], ["--config", "conf/demo.yaml"]])
def test_no_job_or_an_unknown_one_is_refused_with_the_usage(args: list[str]) -> None:
    result = run("./spark-submit.sh", *args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "usage: ./spark-submit.sh JOB" in result.stderr
    assert all(job in result.stderr for job in JOBS)
    assert not args or args[0] in result.stderr


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["train", "--help"], ["train", "--ds", "2026-01-31", "-h"]])
def test_help_is_printed_on_stdout(args: list[str]) -> None:
    result = run("./spark-submit.sh", *args)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ./spark-submit.sh JOB")


# --- spark-submit.sh: Java ---


@pytest.mark.parametrize("version", ["1.8.0_392", "11.0.2", "16.0.1", "22-ea", "25"])
def test_a_wrong_java_is_one_line(tmp_path: Path, version: str) -> None:
    result = run("./spark-submit.sh", "doctor", "--config", "x.yaml", env=java_env(tmp_path, version))
    assert (result.returncode, result.stdout) == (2, "")
    line = one_line(result.stderr)
    assert "Java 17 to 21 is needed" in line
    assert f"found Java {version} at {tmp_path}/bin/java" in line
    assert "apt-get install openjdk-17-jre-headless" in line


@pytest.mark.parametrize("version", ["17", "17.0.15", "21.0.1"])
def test_a_right_java_is_taken(tmp_path: Path, version: str) -> None:
    result = run("./spark-submit.sh", "--java-home", env=java_env(tmp_path, version))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{tmp_path}\n"


def test_a_missing_java_is_one_line(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "readlink"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    env = {"PATH": str(tools), "JAVA_HOME": "/nowhere", "JVM_DIR": str(tmp_path / "no-jvm")}
    result = run("./spark-submit.sh", "doctor", env=env)
    assert (result.returncode, result.stdout) == (2, "")
    assert "Java 17 to 21 is needed, found none (JAVA_HOME=/nowhere)" in one_line(result.stderr)


def test_a_java_17_beside_a_newer_default_is_found(tmp_path: Path) -> None:
    env = java_env(tmp_path, "25.0.1") | {"JVM_DIR": str(tmp_path / "jvm")}
    java(tmp_path / "jvm/java-17-openjdk/bin/java", "17.0.15")
    result = run("./spark-submit.sh", "--java-home", env=env)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}/jvm/java-17-openjdk\n")


def test_the_callers_java_home_comes_first(tmp_path: Path) -> None:
    java(tmp_path / "mine/bin/java", "21.0.1")
    env = java_env(tmp_path, "17.0.15") | {"JAVA_HOME": str(tmp_path / "mine")}
    assert run("./spark-submit.sh", "--java-home", env=env).stdout == f"{tmp_path}/mine\n"


# --- spark-submit.sh: what it runs ---


def test_without_the_environment_it_names_make_install(tmp_path: Path) -> None:
    checkout = launcher_copy(tmp_path)
    (checkout / ".venv").mkdir()  # half made
    result = run(checkout / "spark-submit.sh", "doctor", "--config", "x.yaml")
    assert (result.returncode, result.stdout) == (2, "")
    line = one_line(result.stderr)
    assert f"{checkout}/.venv is missing or half made; run make -C '{checkout}' install" in line


def test_the_command_line_of_a_job(checkout: Path, tmp_path: Path) -> None:
    job = ["--config", "my conf.yaml", "--ds", "2026-01-31", "--set", "train.epochs=2\n3"]
    mine = ["--driver-memory", "8g", "--conf", "spark.ui.enabled=true"]
    result = run(checkout / "spark-submit.sh", "train", *job, "--", *mine, cwd=tmp_path)
    assert result.stderr == "a log\n"
    assert result.stdout.split("\n")[:-1] == [
        *(f"{checkout}/.venv/bin/python", f"{checkout}/{BUNDLED}/bin/spark-submit", ""),
        *(f"{checkout}/jobs/train.py", *"\n".join(job).split("\n")),
        *("--", "--properties-file", f"{checkout}/conf/spark-defaults.conf"),
        *("--conf", "spark.ui.showConsoleProgress=false"),
        *mine,  # mine come after ours, so they win
    ]
    assert result.returncode == 4, "the job's exit code is the launcher's"


def test_the_launcher_becomes_the_job(checkout: Path) -> None:
    """One process: what is sent to it reaches the job, and its stderr is the launcher's own."""
    script(checkout / ".venv/bin/python", 'echo "$$"; test -p /dev/stderr; echo "$?"')
    process = subprocess.Popen(
        [str(checkout / "spark-submit.sh"), "train"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.communicate(timeout=60)[0].split() == [str(process.pid), "1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_that_is_stopped_before_the_job_says_so(checkout: Path, tmp_path: Path, number: int) -> None:
    (tmp_path / "bin").mkdir()
    os.mkfifo(tmp_path / "asked")
    script(tmp_path / "bin/java", f"echo >{tmp_path}/asked; sleep 0.2; echo 'openjdk version \"17.0.1\"' >&2")
    process = subprocess.Popen(
        [str(checkout / "spark-submit.sh"), "train"],
        env={**os.environ, "JAVA_HOME": "", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    (tmp_path / "asked").read_text()
    process.send_signal(number)
    report = json.loads(process.communicate(timeout=60)[0])
    assert process.returncode == 75
    assert (report["job"], report["status"]) == ("train", "failed")
    assert set(report) == {"job", "ds", "run_key", "status", "outputs", "metrics", "error", "details", "seconds"}


def test_a_refused_config_ends_it_with_the_jobs_own_words(checkout: Path) -> None:
    script(checkout / ".venv/bin/python", "echo '{\"status\": \"failed\"}'; echo 'unknown key trian' >&2; exit 2")
    result = run(checkout / "spark-submit.sh", "train", "--config", "x.yaml")
    assert (result.returncode, result.stderr) == (2, "unknown key trian\n")
    assert result.stdout == '{"status": "failed"}\n'


def test_spark_home_names_the_spark_and_keeps_its_defaults(checkout: Path, tmp_path: Path) -> None:
    submit = script(tmp_path / "spark/bin/spark-submit", "exit 1")
    env = {"SPARK_HOME": str(tmp_path / "spark")}
    plain = run(checkout / "spark-submit.sh", "train", "--config", "x.yaml", env=env).stdout.splitlines()
    assert plain[1:3] == [str(submit), ""]
    assert "--load-spark-defaults" not in plain

    (tmp_path / "spark/conf").mkdir()
    (tmp_path / "spark/conf/spark-defaults.conf").touch()
    assert "--load-spark-defaults" in run(checkout / "spark-submit.sh", "train", env=env).stdout.splitlines()

    (tmp_path / "spark/jars").mkdir()
    (tmp_path / "spark/jars/spark-core_2.12-3.5.6.jar").touch()  # Spark 3.5 does not know the option
    older = run(checkout / "spark-submit.sh", "train", env=env)
    assert "--load-spark-defaults" not in older.stdout.splitlines()
    assert "Spark 3 does not read" in older.stderr.splitlines()[0]


def test_python_talks_to_another_spark_in_its_own_version(checkout: Path, tmp_path: Path) -> None:
    script(tmp_path / "spark/bin/spark-submit", "exit 1")
    parts = [tmp_path / "spark/python/lib" / name for name in ("pyspark.zip", "py4j-0.10.9.7-src.zip")]
    parts[0].parent.mkdir(parents=True)
    for part in parts:
        part.touch()
    env = {"SPARK_HOME": str(tmp_path / "spark"), "PYTHONPATH": "/mine"}
    found = run(checkout / "spark-submit.sh", "train", env=env).stdout.splitlines()[2]
    assert found == ":".join([*map(str, parts), "/mine"])
    env["SPARK_HOME"] = str(checkout / BUNDLED)
    assert run(checkout / "spark-submit.sh", "train", env=env).stdout.splitlines()[2] == "/mine"


def test_a_wrong_spark_home_is_one_line(checkout: Path) -> None:
    result = run(checkout / "spark-submit.sh", "train", env={"SPARK_HOME": "/nowhere"})
    assert (result.returncode, result.stdout) == (2, "")
    assert "SPARK_HOME is /nowhere, which has no bin/spark-submit" in one_line(result.stderr)


# --- make ---


def test_make_lists_its_targets() -> None:
    listed = [line.split()[1] for line in run("make").stdout.splitlines()]
    assert listed[:6] == ["help", "install", "check", "format", "test", "soak"]
    assert listed[6:11] == ["cluster-test", "package", "demo", "nightly-demo", "ml-1m"]
    assert listed[11:] == ["bench", "extras", "lock", "audit", "docs", "sbom", "clean"]


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The files that `make install` reads, and nothing built."""
    folder = tmp_path / "fresh"
    folder.mkdir()
    for name in INSTALL_FILES:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def python311(tmp_path: Path) -> Path:
    """A Python 3.11; the one it puts in a .venv does nothing, or fails where there is a file `broken`."""
    inner = (
        "test ! -e broken || { echo no space left; exit 1; }; "
        "test ! -e said || case $* in *install*-r*) cat said;; esac; "
        'echo "$*" >>.venv/calls; for a; do case $a in /dev/fd/*) cat $a >>.venv/calls;; esac; done'
    )
    return script(
        tmp_path / "python",
        "case $* in *-c*) echo 3.11.9;; *venv*) mkdir .venv/bin; "
        f"printf '#!/bin/bash\\n%s\\n' {shlex.quote(inner)} > .venv/bin/python; chmod +x .venv/bin/python;; esac",
    )


def test_make_refuses_a_python_that_is_not_there(fresh: Path) -> None:
    result = run("make", "PYTHON=/nowhere/python", "install", cwd=fresh)
    assert (result.returncode, result.stdout) == (2, "")
    line = one_line(result.stderr)
    assert "Python 3.11 or 3.10 is needed, found none at /nowhere/python" in line
    assert "make PYTHON=/path/to/python3.11 install" in line


@pytest.mark.parametrize("version", ["3.9.18", "3.12.1", "3.110.0"])
def test_make_refuses_a_wrong_python(fresh: Path, tmp_path: Path, version: str) -> None:
    for name in ("python3.11", "python3"):
        script(tmp_path / "bin" / name, f"echo {version}")
    result = run("make", "install", cwd=fresh, env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert (result.returncode, result.stdout) == (2, "")
    assert f"Python 3.11 or 3.10 is needed, found {version} at {tmp_path}/bin/python3.11" in one_line(result.stderr)
    assert not (fresh / ".venv").exists()


def test_make_refuses_a_wrong_java(fresh: Path, tmp_path: Path, python311: Path) -> None:
    result = run("make", f"PYTHON={python311}", "install", cwd=fresh, env=java_env(tmp_path, "11.0.2"))
    assert (result.returncode, result.stdout) == (2, "")
    assert "Java 17 to 21 is needed, found Java 11.0.2" in one_line(result.stderr)
    assert not (fresh / ".venv").exists()


def install(fresh: Path, python: Path) -> subprocess.CompletedProcess[str]:
    return run("make", f"PYTHON={python}", "install", cwd=fresh)


def steps(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split()[0] for line in result.stdout.splitlines() if line.startswith("[")]


def test_a_half_made_environment_is_built_afresh(fresh: Path, python311: Path) -> None:
    (fresh / "broken").touch()
    failed = install(fresh, python311)
    assert failed.returncode == 2
    assert "no space left" in failed.stderr
    assert "installing requirements.lock failed; the whole story is in .venv/install.log" in failed.stderr
    assert not (fresh / ".venv/.installed").exists()

    (fresh / "broken").unlink()
    (fresh / ".venv/debris").touch()
    assert steps(install(fresh, python311)) == STEPS
    assert not (fresh / ".venv/debris").exists()
    assert steps(install(fresh, python311)) == []


def test_what_is_installed_is_checked_against_the_lock(fresh: Path, python311: Path) -> None:
    """The setuptools of the lock comes first, because it builds what the lock has as source; then the lock itself."""
    install(fresh, python311)
    calls = (fresh / ".venv/calls").read_text()
    checked = "install --no-deps --require-hashes --no-build-isolation -r"
    first, tool, second = re.findall(rf"^.* {checked} (\S+)\n|^(setuptools==.*)$", calls, re.MULTILINE)
    assert first[0].startswith("/dev/fd/")
    assert second[0] == "requirements.lock"
    assert re.search(rf"^{re.escape(tool[1])}\n( +--hash=sha256:\w{{64}}( \\)?\n)+.*requirements.lock$", calls, re.M)
    assert calls.index(checked) < calls.index("requirements-torch.txt"), "so that torch finds what it needs"


def test_an_installation_says_how_far_it_is(fresh: Path, python311: Path) -> None:
    """What pip says is in the log; what takes long is seen."""
    (fresh / "said").write_text(
        "Collecting pyarrow==14.0.2 (from -r requirements.lock (line 7))\n"
        "  Downloading pyarrow-14.0.2-cp311.whl (38.0 MB)\n  Downloading six-1.17.whl (11 kB)\n"
        "  Downloading tiny-1.0.whl (1.5 MB)\nInstalling collected packages: six, tiny, pyarrow\n"
    )
    seen = install(fresh, python311).stdout.splitlines()
    lock, torch = (seen.index(next(line for line in seen if line.startswith(step))) for step in STEPS[1:3])
    assert seen[lock + 1 : torch] == ["      pyarrow-14.0.2-cp311.whl (38.0 MB)", "      unpacking 3 packages"] * 2
    assert (fresh / "said").read_text() in (fresh / ".venv/install.log").read_text()


def test_a_new_lock_updates_the_environment_in_place(fresh: Path, python311: Path) -> None:
    install(fresh, python311)
    (fresh / ".venv/kept").touch()
    soon = time.time() + 5
    os.utime(fresh / "requirements.lock", (soon, soon))
    assert steps(install(fresh, python311)) == STEPS[1:]
    assert (fresh / ".venv/kept").exists()


def test_spark_classes_are_archived_anew_with_a_new_lock_alone(fresh: Path, python311: Path) -> None:
    """It takes as long as all else that an installation does once more."""

    def made() -> int:
        return (fresh / ".venv/calls").read_text().count("-m ncf_dist.spark_classes")

    install(fresh, python311)
    assert made() == 1
    for changed, wanted in (("pyproject.toml", 1), ("requirements.lock", 2)):
        soon = time.time() + 5
        os.utime(fresh / changed, (soon, soon))
        assert steps(install(fresh, python311)) == STEPS[1:]
        assert made() == wanted


def test_an_environment_that_lost_its_python_is_built_afresh(fresh: Path, python311: Path) -> None:
    install(fresh, python311)
    (fresh / ".venv/bin/python").unlink()
    (fresh / ".venv/bin/python").symlink_to("/nowhere/python")
    assert steps(install(fresh, python311)) == STEPS


@pytest.mark.skipif(not (ROOT / ".venv/.installed").exists(), reason="this checkout has no .venv from make install")
def test_a_second_make_install_does_nothing() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run("make", "install")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (result.returncode, steps(result)) == (0, [])
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1, "seconds of a processor"


# --- what is pinned ---


LOCKS = {
    "requirements.lock": 40,
    "requirements-audit.lock": 40,
    "requirements-ops.lock": 40,
    "requirements-sweep.lock": 8,
}
"""By name: more packages than this are in it."""


def entries(name: str) -> list[tuple[Requirement, list[str]]]:
    """Each requirement of a file with the hashes beside it."""
    text = re.sub(r"(?m)^ *#.*\n", "", (ROOT / name).read_text()).replace("\\\n", " ")
    parts = [line.split(" --hash=") for line in text.splitlines() if line.strip()]
    return [(Requirement(first), [digest.strip() for digest in digests]) for first, *digests in parts]


def pins(*names: str) -> dict[str, str]:
    """Project -> version, of the lines that hold for this Python."""
    found = [requirement for name in names for requirement, _ in entries(name)]
    here = [r for r in found if r.marker is None or r.marker.evaluate()]
    return {r.name.lower(): str(r.specifier).removeprefix("==") for r in here}


@pytest.mark.parametrize("name", LOCKS)
def test_everything_in_a_lock_has_one_version_and_its_hashes(name: str) -> None:
    found = entries(name)
    assert len(found) > LOCKS[name]
    for requirement, digests in found:
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement
        assert digests, requirement
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest) for digest in digests), requirement


@pytest.mark.parametrize(("extra", "locks"), [("dev", []), ("ops", ["ops"]), ("sweep", ["sweep"])])
def test_the_lock_holds_everything_the_project_asks_for(extra: str, locks: list[str]) -> None:
    pinned = pins("requirements.lock", "requirements-torch.txt", *(f"requirements-{name}.lock" for name in locks))
    env = {k: str(v) for k, v in default_environment().items()} | {"extra": extra}
    wanted = [Requirement(text) for text in metadata.requires("ncf-dist") or []]
    assert wanted
    wrong = [
        str(r)
        for r in wanted
        if (r.marker is None or r.marker.evaluate(env)) and pinned.get(r.name.lower(), "0") not in r.specifier
    ]
    assert wrong == []


@pytest.mark.parametrize("extra", ["ops", "sweep"])
def test_an_extra_changes_no_version_of_the_environment(extra: str) -> None:
    ours, more = pins("requirements.lock", "requirements-torch.txt"), pins(f"requirements-{extra}.lock")
    assert {name: more[name] for name in ours.keys() & more.keys()} == {
        name: ours[name] for name in ours.keys() & more.keys()
    }


@pytest.mark.parametrize(
    "name",
    [
        *("requirements.in", "requirements-audit.in", "requirements-ops.in", "requirements-sweep.in"),
        *("requirements-torch.txt", *LOCKS),
    ],
)
def test_pins_name_no_registry(name: str) -> None:
    text = (ROOT / name).read_text()
    assert "://" not in text
    assert "--index" not in text
    assert "--find-links" not in text


# --- make audit ---

KNOWN = '{"dependencies": [{"name": "pyarrow", "vulns": [{"aliases": ["CVE-2023-47248"]}]}]}'


@pytest.mark.parametrize(
    ("known", "code", "said"),
    [
        ("exit 1", 2, "NOTHING WAS AUDITED"),  # No connection.
        ("echo '{}' >$out; exit 0", 2, "NOTHING WAS AUDITED"),  # A registry without advisories: all is well there.
        (f"echo '{KNOWN}' >$out; exit 1", 0, "audited jinja2==3.1.6, torch==2.13.0"),
        (f"echo '{KNOWN}' >$out; touch bad; exit 1", 2, "audited jinja2==3.1.6, torch==2.13.0"),
    ],
)
def test_an_audit_without_advisories_is_not_green(
    fresh: Path, tmp_path: Path, known: str, code: int, said: str
) -> None:
    (fresh / "requirements.lock").write_text("jinja2==3.1.6 \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n")
    audit = (
        'for a; do case $last in -o) out=$a;; -r) pinned=$a;; esac; last=$a; done; case "$*" in *known*) '
        f"{known};; esac; echo audited $(grep -v '#' $pinned | paste -sd, | sed 's/,/, /g'); test ! -e bad"
    )
    script(
        fresh / ".venv/bin/python",
        f'case "$*" in *venv*) mkdir "${{@: -1}}/bin"; printf "#!/bin/bash\\n%s\\n" {shlex.quote(audit)} '
        '>"${@: -1}/bin/pip-audit"; chmod +x "${@: -1}/bin/pip-audit";; esac',
    )
    (fresh / ".venv/.installed").touch()
    java_home = java_env(tmp_path, "17.0.9")
    result = run("make", "audit", cwd=fresh, env=java_home | {"TMPDIR": str(tmp_path)})
    assert result.returncode == code, result.stderr
    assert said in result.stdout + result.stderr
    assert ("NOTHING WAS AUDITED" in result.stderr) == ("NOTHING" in said)
    assert list(tmp_path.glob("tmp*")) == [], "the tools are gone"
