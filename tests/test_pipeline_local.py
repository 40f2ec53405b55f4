"""Running compiled pipelines on this machine: real KFP, real processes, small pipelines compiled here."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kfp import compiler, dsl
from rich.console import Console

from hjepa.adapters import lifeline, local_pipeline
from hjepa.adapters.pipeline_view import LineView, TableView, default_view, format_seconds
from hjepa.errors import FutileRetryError, HjepaError, UserError

IMAGE = "toy:1"


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def make_data(text: str, items: list, data: dsl.Output[dsl.Dataset]) -> None:
    import json

    print(f"making {text}")
    with open(data.path, "w", encoding="utf-8") as file:
        json.dump({"text": text, "items": items}, file)
    data.metadata["items"] = len(items)


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def use_data(data: dsl.Input[dsl.Dataset], mode: str, report: dsl.Output[dsl.Artifact]) -> None:
    import json
    import logging
    import os
    import signal
    import subprocess
    import sys
    import time

    with open(data.path, encoding="utf-8") as file:
        content = json.load(file)
    logging.info("read %s", content["text"])
    with open(os.environ["HJEPA_TIMINGS_FILE"], "a") as file:
        file.write(json.dumps({"step": "use_data", "seconds": 0.25}) + "\n")
    if mode == "explain":
        with open(os.environ["HJEPA_ERROR_FILE"], "w") as file:
            json.dump({"step": "use_data", "kind": "Diverged", "message": "loss is NaN", "exit_code": 13}, file)
        sys.exit(13)
    if mode == "raise":
        raise ValueError("bad value 42")
    if mode == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if mode in ("wait", "stubborn", "polite"):
        if mode == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if mode == "polite":
            signal.signal(signal.SIGTERM, lambda *_: (print("saved my state"), sys.exit(143)))
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        print(f"waiting with {worker.pid}")
        time.sleep(600)
    if mode == "unpadded":
        print("\udcff file name", "no end of line", end="")
    with open(report.path, "w", encoding="utf-8") as file:
        file.write(content["text"])


@dsl.pipeline(name="toy")
def toy(text: str = "plain", mode: str = "", items: list = [1]) -> None:  # noqa: B006
    made = make_data(text=text, items=items)
    use_data(data=made.output, mode=mode).set_retry(num_retries=3, backoff_duration="60s")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "toy.yaml"
    compiler.Compiler().compile(toy, str(path))
    return path


@pytest.fixture(autouse=True)
def _nothing_is_left_running() -> Iterator[None]:
    before = {process.pid for process in psutil.process_iter()}
    yield
    own = {process.pid for process in psutil.process_iter() if process.pid not in before and descends(process)}
    assert own == set()


def descends(process: psutil.Process) -> bool:
    """Whether a process was started by this test process or carries its mark."""
    try:
        return process.environ().get("HJEPA_TEST_MARK") == MARK and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


MARK = f"{os.getpid()}-{time.time()}"


def run(compiled: Path, workdir: Path, **arguments: object) -> tuple[local_pipeline.PipelineRun, str]:
    """The result, and what a pipe would have shown."""
    shown = io.StringIO()
    result = local_pipeline.run(
        compiled, arguments, workdir=workdir, environment={"HJEPA_TEST_MARK": MARK}, view=LineView(shown)
    )
    return result, shown.getvalue()


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def finished(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[local_pipeline.PipelineRun, str, Path]:
    """One run that went well, what a pipe would have shown of it, and its folder."""
    workdir = tmp_path_factory.mktemp("finished")
    return *run(compiled, workdir, text="Größe 漢字 ✓", items=[1, "zwei"]), workdir


Finished = tuple[local_pipeline.PipelineRun, str, Path]


def test_run__artifacts_and_unicode_arrive(finished: Finished) -> None:
    result, _, workdir = finished
    assert list(result.steps) == ["make-data", "use-data"]
    assert all(step.succeeded for step in result.steps.values())
    assert result.artifact("use-data", "report").read_text("utf-8") == "Größe 漢字 ✓"
    assert json.loads(result.artifact("make-data", "data").read_text("utf-8"))["items"] == [1, "zwei"]
    assert "making Größe 漢字 ✓\n" in (workdir / "logs" / "make-data.log").read_text("utf-8")


def test_run__shows_the_steps_and_not_kfps_own_talk(finished: Finished) -> None:
    _, shown, _ = finished
    lines = shown.splitlines()
    assert lines[:3] == ["steps: make-data -> use-data", "[make-data] started", "[make-data] making Größe 漢字 ✓"]
    assert lines[3].startswith("[make-data] done in ")
    assert lines[4:6] == ["[use-data] started", "[use-data] read Größe 漢字 ✓"]
    assert lines[6].startswith("[use-data] done in ")
    assert len(lines) == 7


def test_run__times_and_overhead_add_up(finished: Finished) -> None:
    result, _, _ = finished
    assert result.steps["use-data"].own_seconds == 0.25
    made = result.steps["make-data"]
    assert made.own_seconds is None
    assert made.seconds is not None
    assert result.overhead_seconds == pytest.approx(result.wall_seconds - 0.25 - made.seconds)


def test_run__second_one_in_the_same_folder_leaves_the_first_ones_artifacts(compiled: Path, finished: Finished) -> None:
    first, _, workdir = finished
    builtin = print
    text = "x" * 99_000  # just below what a command line takes
    second, _ = run(compiled, workdir, text=text)
    assert second.artifact("use-data", "report").read_text() == text
    assert first.artifact("use-data", "report").read_text("utf-8") == "Größe 漢字 ✓"
    assert print is builtin


def test_run__output_that_is_no_text_and_has_no_end_of_line(compiled: Path, tmp_path: Path) -> None:
    _, shown = run(compiled, tmp_path, mode="unpadded")
    assert "[use-data] \\udcff file name no end of line" in shown


def test_run__interpreter_in_a_folder_with_a_blank(compiled: Path, tmp_path: Path) -> None:
    virtual = tmp_path / "a b" / "$HOME"
    venv.create(virtual, symlinks=True)
    packages = virtual / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    (packages / "outside.pth").write_text("\n".join(folder for folder in sys.path if Path(folder).is_dir()))
    code = DRIVER + "print(sys.executable)"
    command = [str(virtual / "bin" / "python"), "-c", code, str(compiled), "", str(tmp_path / "work space"), "1"]
    environment = {**os.environ, "HJEPA_TEST_MARK": MARK}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "[use-data] done in" in done.stdout, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == command[0]  # only KFP's own process sees the quotes


def test_run__lines_arrive_before_the_step_has_ended(compiled: Path, tmp_path: Path) -> None:
    arrived: list[tuple[str, bool]] = []

    class Watching(LineView):
        def line(self, step: str, text: str) -> None:
            arrived.append((text, bool(list(tmp_path.glob("artifacts/*/use-data/report")))))
            if text.startswith("waiting with"):
                raise ValueError("seen enough")

    with pytest.raises(ValueError, match="seen enough"):
        local_pipeline.run(
            compiled,
            {"mode": "wait"},
            workdir=tmp_path,
            environment={"HJEPA_TEST_MARK": MARK},
            view=Watching(io.StringIO()),
            grace_seconds=3,
        )
    assert arrived[-1][0].startswith("waiting with")
    assert not arrived[-1][1]


def test_failure__reason_and_exit_code_are_the_steps_own(compiled: Path, tmp_path: Path) -> None:
    with pytest.raises(FutileRetryError) as caught:
        run(compiled, tmp_path, mode="explain")
    assert str(caught.value) == "use-data: loss is NaN"
    assert caught.value.exit_code == 13

    # A later failure that gives no reason does not inherit this one.
    with pytest.raises(HjepaError) as caught_later:
        run(compiled, tmp_path, mode="raise")
    assert str(caught_later.value).endswith("ValueError: bad value 42")
    assert "NaN" not in str(caught_later.value)
    assert "\x1b" not in str(caught_later.value)
    assert str(tmp_path / "logs" / "use-data.log") in str(caught_later.value)


def test_failure__killed_step_is_called_that(compiled: Path, tmp_path: Path) -> None:
    with pytest.raises(HjepaError, match="use-data: the step was killed, most often for lack of memory"):
        run(compiled, tmp_path, mode="killed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"txt": "a"}, "txt: no such parameter. Did you mean text?"),
        ({"text": 3}, "text: got 3, expected a text."),
        ({"text": "x" * 200_000}, "more than the 100,000 that fit a command line"),
    ],
)
def test_arguments__bad_ones_are_refused_before_anything_starts(
    compiled: Path, tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(compiled, tmp_path / "new", **arguments)
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()


Start = Callable[..., tuple[subprocess.Popen[str], int]]

DRIVER = """
import sys
from pathlib import Path
from hjepa.adapters import local_pipeline
from hjepa.adapters.pipeline_view import LineView
try:
    local_pipeline.run(
        Path(sys.argv[1]),
        {"mode": sys.argv[2]},
        workdir=Path(sys.argv[3]),
        view=LineView(sys.stdout),
        grace_seconds=float(sys.argv[4]),
    )
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.fixture
def start(compiled: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a run in a process of its own; returns it and its step's worker once the step waits."""
    started: list[subprocess.Popen[str]] = []

    def start(mode: str, grace_seconds: float = 60) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(compiled), mode, str(tmp_path), str(grace_seconds)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HJEPA_TEST_MARK": MARK},
        )
        started.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("[use-data] waiting with "):
                return process, int(line.split()[-1])
        raise AssertionError("the step never waited")

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def marked() -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and descends(process)]


@pytest.mark.parametrize("mode", ["wait", "polite", "stubborn"])
def test_interrupt__leaves_no_process(start: Start, mode: str) -> None:
    process, worker = start(mode, grace_seconds=2 if mode == "stubborn" else 60)
    assert psutil.pid_exists(worker)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert output.endswith("interrupted\n")
    assert marked() == []
    assert ("[use-data] saved my state" in output) == (mode == "polite")


def test_interrupt__second_one_kills_at_once(start: Start) -> None:
    process, _ = start("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert "Ctrl-C again" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)  # half of the grace period
    assert marked() == []


@pytest.mark.parametrize("mode", ["wait", "stubborn"])
def test_sigkill__of_the_parent_ends_everything_soon(start: Start, mode: str) -> None:
    process, worker = start(mode)
    assert len(marked()) >= 4  # the parent, KFP, the step, its worker
    wait_for(lambda: "TMPDIR" in psutil.Process(worker).environ())  # empty while the worker becomes its program
    scratch = Path(psutil.Process(worker).environ()["TMPDIR"])
    assert scratch.name.startswith("hjepa-")
    process.kill()
    process.wait()
    wait_for(lambda: marked() == [], seconds=3 if mode == "wait" else 4)
    assert not scratch.exists()


def test_sigkill__of_kfp_ends_the_step_and_is_an_error(start: Start) -> None:
    process, _ = start("wait")
    (kfp_process,) = psutil.Process(process.pid).children()
    kfp_process.kill()
    process.communicate(timeout=30)
    assert process.returncode == 1
    assert marked() == []


def test_lifeline__process_ends_after_its_announced_parent() -> None:
    environment = dict(os.environ)
    parent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    environment[lifeline.PARENT] = f"{parent.pid}:{psutil.Process(parent.pid).create_time()}"
    child = subprocess.Popen(
        [sys.executable, "-c", "from hjepa.adapters import lifeline; lifeline.die_with_parent()\nimport time\n"
         "print('up', flush=True); time.sleep(600)"],
        env=environment,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        time.sleep(0.6)
        assert child.poll() is None
        parent.kill()  # and stays a zombie, since nobody waits for it yet
        assert child.wait(timeout=3) == -signal.SIGTERM
    finally:
        for process in (parent, child):
            process.kill()
            process.wait()


def test_lifeline__pid_given_to_another_process_counts_as_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setenv(lifeline.PARENT, f"{os.getpid()}:{psutil.Process().create_time() - 3600}")
    lifeline.watch_parent(ended.set)
    assert ended.wait(2)


def test_lifeline__without_a_parent_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(lifeline.PARENT, raising=False)
    assert lifeline.watch_parent(lambda: None) is None


def test_table__shows_state_time_and_last_line_of_each_step() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)
    view = TableView(console)
    view.open(["prepare-data", "train", "evaluate"])
    view.started("prepare-data")
    view.line("prepare-data", "70,000 images")
    view.finished("prepare-data", "done", 3.21)
    view.started("train")
    view.line("train", "epoch 1 of 10, [red]brackets[/red] stay " + "x" * 100)
    view.notice("stopping")
    view.finished("train", "failed", 247)
    view.close()
    assert isinstance(console.file, io.StringIO)
    last = console.file.getvalue().split("\x1b[2K")[-1].splitlines()
    assert last[0].split() == ["✓", "prepare-data", "3.2", "s", "70,000", "images"]
    assert last[1].split()[:5] == ["✗", "train", "4m07s", "epoch", "1"]
    assert "[red]brackets[/red" in last[1]
    assert last[2].split() == ["·", "evaluate"]
    assert last[3].strip() == "stopping"
    assert all(len(line) <= 60 for line in last[:4])


def test_default_view__is_plain_lines_in_a_pipe() -> None:
    assert isinstance(default_view(), LineView)


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1m00s"), (7500, "2h05m")])
def test_format_seconds__reads_well(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_names__a_turn_that_failed_half_way_does_not_shift_the_names_of_the_next() -> None:
    names = local_pipeline._Names(["plan", "open", "train", "judge", "compare"], {"open", "train", "judge"}, ["a", "b"])
    assert names.in_order() == ["plan", "a.open", "a.train", "a.judge", "b.open", "b.train", "b.judge", "compare"]
    started = ["plan", "open", "train", "open", "train", "judge", "compare"]  # a's training failed
    assert [names.of_next(task) for task in started] == [
        "plan", "a.open", "a.train", "b.open", "b.train", "b.judge", "compare",
    ]  # fmt: skip
    plain = local_pipeline._Names(["open", "train"], set(), [])
    assert plain.in_order() == ["open", "train"] == [plain.of_next(task) for task in ("open", "train")]
