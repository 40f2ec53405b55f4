"""The command line: one subcommand per step, and the whole pipeline with ``hjepa run``.

Exit codes: 0 done; 2 your mistake; 13 a retry would fail again; 130 interrupted; 143 told to stop, resumable; 1
anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import select
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from hjepa import __version__, cli_data, cli_models
from hjepa.config import Config, load_config, packaged_configs, parse_yaml, read_source, sha256_json
from hjepa.errors import HjepaError, UserError
from hjepa.utils.logging import say, warn
from hjepa.words import print_line

DESCRIPTION = "Self-supervised image pretraining with a hierarchical JEPA, from raw images to a registered encoder."
INTERRUPTED = 130
TERMINATED = 143
NOBODY_READS = 141  # as a shell has it for SIGPIPE
PIPELINES = ("pretrain", "pretrain-distributed", "pretrain-sweep", "prepare")
SWEEP = PIPELINES[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; an error the user can mend is a message, never a traceback."""
    options = build_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a closed terminal; nohup ignores it
        signal.signal(signal.SIGHUP, _terminate)
    try:
        _check_run_uri(options)
        code = int(options.command(options) or 0)
        sys.stdout.flush()
        return code
    except (HjepaError, OSError) as problem:
        if isinstance(problem, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
            return NOBODY_READS
        from hjepa.steps import as_hjepa_error, report_error

        error = as_hjepa_error(problem)
        if os.environ.get("RANK", "0") == "0":
            report_error("hjepa", error)
        print_line(f"error: {error}", sys.stderr)
        if os.environ.get("WORLD_SIZE", "1") != "1":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all ranks at once; this one has its own code
        return error.exit_code
    except _TerminatedError:
        print_line(f"terminated{_what_now(options)}", sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print_line(f"interrupted{_what_now(options)}", sys.stderr)
        return INTERRUPTED


def _nobody_reads() -> bool:
    """Whether the other end of stdout has gone, as that of ``| head`` does."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


def _what_now(options: argparse.Namespace) -> str:
    if options.command is pipeline_run:
        return "; a run that was submitted goes on, and is stopped on its server; this command would submit another"
    resumable = (run, resolve_config, prepare_data, train, export, evaluate, register, job_submit, sync)
    return "; the same command goes on where this one was" if options.command in resumable else ""


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, which ends things the way Ctrl-C does."""


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _TerminatedError


# -- the parser ------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hjepa", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"hjepa {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function: Any, help: str, *, into: Any = commands) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = into.add_parser(name, help=help, description=help)
        command.set_defaults(command=function)
        return command

    command = add("run", run, "Run the whole pipeline on this machine, with its own S3 and MLflow servers.")
    _add_config(command)
    _add_home(command)
    command.add_argument(
        "--pipeline", choices=PIPELINES[:2], default=PIPELINES[0], help="which one (default: %(default)s)"
    )
    command.add_argument(
        "--sweep",
        metavar="FILE",
        help="train several settings, one after the other, and compare them: YAML with a list of overrides for each",
    )
    command.add_argument("--keep-stack", action="store_true", help="leave the S3 and MLflow servers up at the end")
    command.add_argument("--fresh", action="store_true", help="start a new run even if this one is finished")

    steps: dict[str, tuple[Any, str]] = {
        "resolve-config": (resolve_config, "Validate a configuration, check what it needs, and create its MLflow run."),
        "prepare-data": (prepare_data, "Turn images into verified shards in S3."),
        "train": (train, "Train, or go on from the newest checkpoint; without --run alone on this machine."),
        "export": (export, "Export the chosen checkpoint to S3."),
        "evaluate": (evaluate, "Probe the exported encoder beside its baselines."),
        "register": (register, "Register the model and decide on the champion."),
    }
    for name, (function, help) in steps.items():
        command = add(name, function, help)
        _add_config(command)
        _add_home(command)
        if name != "resolve-config":
            command.add_argument(
                "--run-uri", metavar="URI", help="s3://BUCKET/PREFIX/runs/NAME of a run that was resolved elsewhere"
            )
        if name == "train":
            command.add_argument("--resume", default="auto", help="a checkpoint's path, or auto (the default)")
            command.add_argument("--device", help="cpu, cuda, cuda:1; the default is training.device")

    command = add("plan", plan, "Show what a training run will cost and draw its schedules, without starting it.")
    _add_settings(command)
    command.add_argument("--images", type=int, help="images of the training split, where it is not known yet")
    command.add_argument("--ranks", type=int, default=1, help="GPUs that share the batch (default: %(default)s)")
    command.add_argument("--picture", type=Path, help="also draw schedules and mask audit to this PNG")

    command = add("replay", replay, "Play a skipped step again and say where its numbers stopped being finite.")
    command.add_argument("incident", type=Path, help="the folder that training named when it skipped the step")
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 (default: %(default)s)")

    command = add("doctor", doctor, "Check S3, MLflow, disk, devices and the data source, without starting anything.")
    _add_config(command)
    _add_home(command)
    command.add_argument("--servers", action="store_true", help="check S3 and MLflow alone")
    command.add_argument("--cluster", action="store_true", help="check the cluster of the kubeconfig instead")
    command.add_argument("--pod", action="store_true", help="with --cluster: look at S3 and MLflow from a pod there")
    command.add_argument("--endpoint", help="with --cluster: KFP server; the default is KF_PIPELINES_ENDPOINT")

    command = add("config", show_config, "Validate a configuration and print it in full.")
    _add_config(command)

    stack = commands.add_parser("stack", help="The S3 and MLflow servers on this machine.")
    actions = stack.add_subparsers(title="actions", metavar="ACTION", required=True)
    servers: tuple[tuple[str, Any, str], ...] = (
        ("up", stack_up, "Start the servers and leave them up."),
        ("status", stack_status, "Show whether they run and where."),
        ("env", stack_env, 'Print the variables that point a shell\'s programs at them: eval "$(hjepa stack env)".'),
        ("down", stack_down, "Stop the servers; their data stays."),
    )
    for name, function, help in servers:
        _add_home(add(name, function, help, into=actions))

    pipeline = commands.add_parser("pipeline", help="The pipeline on a Kubeflow Pipelines server.")
    actions = pipeline.add_subparsers(title="actions", metavar="ACTION", required=True)
    command = add("compile", pipeline_compile, "Compile pipelines/pretrain.py (in a checkout).", into=actions)
    command.add_argument("--output", type=Path, help="the YAML to write; by default the committed ones are")
    _add_pipeline(command)
    command = add("upload", pipeline_upload, "Upload the compiled pipeline, or a new version of it.", into=actions)
    _add_server(command)
    command = add("run", pipeline_run, "Upload where needed, start a run and follow it to its end.", into=actions)
    _add_server(command)
    command.add_argument("--experiment", default="hjepa", help="KFP experiment (default: %(default)s)")
    command.add_argument("--no-follow", action="store_true", help="return once the run has started")
    command.add_argument("--sweep", metavar="FILE", help=f"the branches of --pipeline {SWEEP}, as for hjepa run")
    command.add_argument(
        "parameters", nargs="*", metavar="NAME=VALUE", help="pipeline parameters, such as config=default gpus=4"
    )

    cli_models.add_parser(commands)
    cli_data.add_parser(commands, _add_store, _store)

    job = commands.add_parser("job", help="Training as a job of a Kubernetes cluster: PyTorchJob or TrainJob.")
    actions = job.add_subparsers(title="actions", metavar="ACTION", required=True)
    jobs: tuple[tuple[str, Any, str], ...] = (
        ("render", job_render, "Print the job's manifests, for kubectl apply -f -."),
        ("submit", job_submit, "Start the job, or find it running, and follow it to its end."),
        ("logs", job_logs, "Print the log of the job's first pod."),
        ("cancel", job_cancel, "Stop the job; its pods save their state first."),
    )
    for name, function, help in jobs:
        command = add(name, function, help, into=actions)
        _add_config(command)
        _add_home(command)
        command.add_argument("--run-uri", metavar="URI", help="s3://BUCKET/PREFIX/runs/NAME of a resolved run")
        command.add_argument("--backend", choices=("auto", "pytorchjob", "trainjob", "local"), help="cluster.backend")
        if name == "logs":
            command.add_argument("--follow", "-f", action="store_true", help="go on as the log grows")

    command = add("sync", sync, "Send the metrics of a journal that did not reach MLflow.")
    command.add_argument("journal", type=Path)
    command.add_argument("--run-id", required=True, help="MLflow run id")
    command.add_argument("--uri", help="MLflow server; the default is MLFLOW_TRACKING_URI")
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    _add_settings(command)
    command.add_argument("--run", dest="run_name", metavar="NAME", help="name of the run; a used name goes on with it")


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", metavar="FILE", help="a cluster's profile: YAML with a section cluster alone")
    command.add_argument(
        "--config",
        action=_Given,
        default="default",
        help=f"a file, or one of: {', '.join(packaged_configs())} (default: %(default)s)",
    )
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, such as training.lr=3e-4; repeatable"
    )


class _Given(argparse.Action):
    """Notes that the option was given, which its default does not tell."""

    def __call__(self, parser: Any, options: argparse.Namespace, value: Any, name: str | None = None) -> None:
        setattr(options, self.dest, value)
        setattr(options, f"{self.dest}_given", True)


def _check_run_uri(options: argparse.Namespace) -> None:
    """Refuse what a run that is resolved already would ignore; its job alone takes other settings, of ``cluster``."""
    if not getattr(options, "run_uri", None):
        return
    of_job = "backend" in options
    given = ["--config"] if "config_given" in options else []
    given += ["--run"] if options.run_name else []
    given += ["--profile"] if options.profile and not of_job else []
    given += [f"--set {item}" for item in options.set if not (of_job and item.strip().startswith("cluster."))]
    if given:
        left = "; of its settings a job takes others of the section cluster alone" if of_job else ""
        raise UserError(
            f"{', '.join(given)} beside --run-uri: the run is resolved already, with its name and its settings{left}. "
            "Leave it out, or name the run by --config and --run instead of --run-uri"
        )


def _overrides(options: argparse.Namespace) -> list[str]:
    """The settings of the profile, then those of the command line, which outrank them."""
    if not options.profile:
        return list(options.set)
    from hjepa.steps import profile_settings

    return [*profile_settings(options.profile), *options.set]


def _config(options: argparse.Namespace) -> Config:
    return load_config(options.config, _overrides(options))


def _add_store(command: argparse.ArgumentParser) -> None:
    _add_settings(command)
    _add_home(command)


def _store(options: argparse.Namespace) -> Any:
    """The store of the configuration, on this home's servers if they run."""
    from hjepa.adapters.s3 import S3Store

    config = _config(options)
    _use_servers(options, config)
    return S3Store.from_config(config.storage)


def _default_home() -> Path:
    return Path(os.environ.get("HJEPA_HOME", ".hjepa"))


def _add_home(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--home",
        type=Path,
        default=_default_home(),
        help="folder of the servers' data and of the manifests and logs of runs; checkpoints lie where "
        "checkpoint.checkpoint_dir says (default: $HJEPA_HOME or .hjepa)",
    )


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pipeline", choices=PIPELINES, default=PIPELINES[0], help="which one (default: %(default)s)")
    command.add_argument(
        "--profile", type=Path, metavar="FILE", help="the cluster's profile, such as pipelines/profiles/gpu-node.yaml"
    )
    command.add_argument(
        "--images-claim",
        metavar="NAME",
        help="PersistentVolumeClaim that prepare_data mounts at /data (data_root=/data)",
    )


def _add_server(command: argparse.ArgumentParser) -> None:
    _add_pipeline(command)
    command.add_argument("--endpoint", help="KFP server; the default is KF_PIPELINES_ENDPOINT")
    command.add_argument("--namespace", help="KFP namespace, where the server serves many users")
    command.add_argument("--registry", help="HOST/NAMESPACE of the container images")
    command.add_argument("--pipeline-version", help="name of the version; the default is the digest of the YAML")


# -- the whole pipeline ----------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    try:
        from hjepa.adapters import local_pipeline
    except ImportError as error:
        raise UserError(f"hjepa run needs more packages ({error}): pip install 'hjepa[pipelines,stack]'") from None
    from hjepa.adapters.stack import Stack
    from hjepa.data.datasets import check_source, require_known
    from hjepa.summary import show, show_sweep

    config = _config(options)
    # Again in the first step, but a misspelt name should not have to wait for servers.
    if any(place is not None and place.startswith("s3://") for place in (config.data.root, config.data.image_root)):
        require_known(config.data.name)  # its server may be the one that is about to be started
    else:
        check_source(config.data)
    home: Path = options.home.expanduser().resolve()
    if home.exists() and not home.is_dir():
        raise UserError(f"--home {home} is a file; give a folder")
    sets = _sets(options)
    name = run_name(options, config, sets)
    branches = _planned(options, name, sets)
    with _only_user(home):
        if options.fresh:
            name = _unused(home / "runs", name)
            branches = _planned(options, name, sets)
        stack = Stack(home)
        keep = home / "keep-stack"
        if options.keep_stack:
            keep.touch()
        elif not stack.status().s3.running:
            keep.unlink(missing_ok=True)  # what an earlier command kept up is gone, by a reboot for instance
        try:
            environment = _servers(stack, config)
            say(f"sweep {name}, {len(branches)} branches" if sets else f"run {name}")
            arguments: dict[str, Any] = {
                "config": _portable(options.config),
                "overrides": _overrides(options),
                "run": name,
                "gpus": str(config.cluster.gpus_per_node),
            }
            if sets:
                arguments["sets"] = sets
            if options.pipeline != PIPELINES[0] and config.cluster.backend == "auto":
                arguments["backend"] = "local"  # all ranks on this machine
            try:
                finished = local_pipeline.run(
                    compiled_pipeline(SWEEP if sets else options.pipeline),
                    arguments,
                    workdir=home / "runs" / name,
                    environment=environment,
                    items=branches,
                )
            except KeyboardInterrupt:
                _close_rows(options, name, environment)
                raise
            if sets:
                show_sweep(_sweep_summary(finished, options, stack_stays=keep.exists()), Console())
            else:
                show(_summary(finished, options, stack_stays=keep.exists()), Console())
        finally:
            if not keep.exists():
                stack.down()
    return 0


def _close_rows(options: argparse.Namespace, name: str, environment: Mapping[str, str]) -> None:
    """A stopped run does not seem to run for ever."""
    from hjepa.steps import close_stopped

    os.environ.update(environment)
    try:
        close_stopped(options.config, _overrides(options), name)
    except HjepaError as error:  # that it was stopped is what the user is to hear
        warn(f"the run's row in MLflow still says that it runs: {error}")


def _sets(options: argparse.Namespace) -> list[Any]:
    """The override sets of ``--sweep``; empty without it."""
    if not options.sweep:
        return []
    from hjepa.sweep import read_sets

    if options.pipeline != PIPELINES[0]:
        raise UserError(f"--sweep trains each branch like --pipeline {PIPELINES[0]}; leave out --pipeline")
    return read_sets(options.sweep)


def _planned(options: argparse.Namespace, name: str, sets: Sequence[Any]) -> list[str]:
    """The names of the sweep's branches, whose settings are checked before any server starts."""
    from hjepa.steps import plan_sweep

    if not options.sweep:
        return []
    where = f"the sets in {options.sweep}"
    return [branch.name for branch in plan_sweep(name, options.config, _overrides(options), {}, sets, where=where)]


def _servers(stack: Any, config: Config) -> dict[str, str]:
    """Start the servers that the configuration does not name itself; the variables that lead to them."""
    if config.storage.endpoint_url and config.tracking.uri:
        return {}
    stack.up(report=say)
    return _variables(stack, config)


def _variables(stack: Any, config: Config) -> dict[str, str]:
    variables: dict[str, str] = stack.environment()
    if config.storage.endpoint_url is None:
        # A profile of the user's shell would outrank the keys of this server, and may not even exist.
        os.environ.pop("AWS_PROFILE", None)
    else:
        variables = {key: value for key, value in variables.items() if not key.startswith("AWS_")}
    if config.tracking.uri is not None:
        variables = {key: value for key, value in variables.items() if not key.startswith("MLFLOW_")}
    return variables


def run_name(options: argparse.Namespace, config: Config, sets: Sequence[Any] = ()) -> str:
    """The name given, or one that the same configuration, the same code and the same sweep always get."""
    from hjepa.steps import check_run_name, code_version

    if options.run_name:
        return check_run_name(options.run_name, "--run ")

    source, length = (options.sweep, 20) if sets else (options.config, 40)  # a branch's name is longer
    stem = re.sub(r"[^a-z0-9]+", "-", Path(source).stem.lower()).strip("-") or "run"
    of = [config.digest, code_version(), *([list(sets)] if sets else [])]
    return f"{stem[:length].strip('-')}-{sha256_json(of)[:8]}"


def _unused(runs: Path, name: str) -> str:
    number = 2
    while (runs / f"{name}-{number}").exists():
        number += 1
    return f"{name}-{number}" if (runs / name).exists() else name


def _portable(source: str) -> str:
    """A packaged configuration's name, or the text of a file, which only this machine has."""
    return source if source in packaged_configs() else read_source(source)[1]


@contextlib.contextmanager
def _only_user(home: Path) -> Iterator[None]:
    """Keep a second run from stopping the servers under the first."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "run.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise UserError(
                f"another run (process {holder}) uses {home}: wait for it, or pass another --home"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def compiled_pipeline(name: str = PIPELINES[0]) -> Path:
    """The compiled pipeline, from the installed package or the checkout."""
    package = Path(__file__).resolve().parent
    for path in (package / "pipelines" / f"{name}.yaml", package.parents[1] / f"pipelines/compiled/{name}.yaml"):
        if path.exists():
            return path
    raise HjepaError("the compiled pipeline is missing from this installation; install hjepa again")


def _read(finished: Any, step: str, output: str) -> Any:
    return json.loads(finished.artifact(step, output).read_text("utf-8"))


def _commands(options: argparse.Namespace, registration: Any, *, stack_stays: bool, again: list[str]) -> Any:
    """(What it does, command) to go on with.

    Args:
        again: What to add to the command that was given.
    """
    model_uri = f"models:/{registration['name']}/{registration['version']}"
    program, python = (os.path.relpath(path) for path in (sys.argv[0], sys.executable))
    home = [] if options.home == _default_home() else ["--home", str(options.home)]
    settings = [part for setting in options.set for part in ("--set", setting)]
    settings += ["--profile", options.profile] if options.profile else []
    repeated = shlex.join([program, "run", "--config", options.config, *home, *settings, *again])
    up = "" if stack_stays else shlex.join([program, "stack", "up", *home]) + " && "
    variables = shlex.join([program, "stack", "env", *home])
    use = f"import hjepa; print(hjepa.load_encoder('{model_uri}'))"
    page = registration.get("compare_url") if options.sweep else registration["mlflow_run_url"]
    return [
        ("train the best one for longer" if options.sweep else "change one setting and compare", repeated),
        ("look at the curves in MLflow", f"{up}{python} -m webbrowser '{page}'"),
        ("use the encoder", f'{up}eval "$({variables})" && {python} -c "{use}"'),
    ]


def _summary(finished: Any, options: argparse.Namespace, *, stack_stays: bool) -> Any:
    from hjepa.summary import Summary

    registration = _read(finished, "register-model", "registration")
    again = ["--set", "model.num_levels=1"]
    return Summary(
        dataset=_read(finished, "prepare-data", "dataset"),
        checkpoint=_read(finished, "train" if "train" in finished.steps else "launch-training", "checkpoint"),
        model=_read(finished, "export-checkpoint", "model"),
        evaluation=_read(finished, "evaluate", "evaluation"),
        registration=registration,
        step_seconds={name: step.seconds or 0.0 for name, step in finished.steps.items()},
        overhead_seconds=finished.overhead_seconds,
        commands=_commands(options, registration, stack_stays=stack_stays, again=again),
    )


def _sweep_summary(finished: Any, options: argparse.Namespace, *, stack_stays: bool) -> Any:
    from hjepa.summary import SweepSummary

    comparison = _read(finished, "compare-branches", "comparison")
    registration = _read(finished, "register-model", "registration") | {"compare_url": comparison["compare_url"]}
    planned = _read(finished, "resolve-sweep", "sweep")["branches"]
    best = next(branch for branch in planned if branch["name"] == comparison["best"])
    epochs = 2 * best["config"]["training"]["epochs"]
    again = [part for text in (*best["set"], f"training.epochs={epochs}") for part in ("--set", text)]
    return SweepSummary(
        comparison=comparison,
        registration=registration,
        step_seconds={name: step.seconds or 0.0 for name, step in finished.steps.items()},
        overhead_seconds=finished.overhead_seconds,
        commands=_commands(options, registration, stack_stays=stack_stays, again=again),
    )


# -- one step by hand ------------------------------------------------------------------------------------------------


def _use_servers(options: argparse.Namespace, config: Config) -> None:
    """Point clients at this home's servers if they run, except where the configuration names others."""
    from hjepa.adapters.stack import Stack

    stack = Stack(options.home)
    if "AWS_ENDPOINT_URL" in os.environ:
        return
    if stack.status().healthy:
        os.environ.update(_variables(stack, config))
    elif config.storage.endpoint_url is None and "AWS_ACCESS_KEY_ID" not in os.environ:
        say("note: S3 and MLflow of this machine are not running; start them with: hjepa stack up")


def _files(options: argparse.Namespace, *needed: str) -> dict[str, str]:
    """The manifests between the steps of a run, with the run itself resolved for this very configuration.

    Args:
        needed: Kinds that the step reads; what is not here is brought from S3, where another machine left it.
    """
    from hjepa import steps
    from hjepa.adapters.s3 import S3Store

    if getattr(options, "run_uri", None):
        return _files_of(options, needed)
    config = _config(options)
    _use_servers(options, config)
    name = run_name(options, config)
    files = _paths(options, name)
    store = S3Store.from_config(config.storage)
    path = Path(files["resolved"])
    if not path.exists():
        with contextlib.suppress(HjepaError):  # resolve_config says what is wrong with S3, and with the rest
            steps.fetch_manifests(store, name, {"resolved": str(path)})
    if not path.exists() or json.loads(path.read_text("utf-8"))["config"] != config.model_dump(mode="json"):
        steps.resolve_config(
            config=_portable(options.config),
            overrides=_overrides(options),
            settings={},
            run=name,
            resolved_path=str(path),
        )
    absent = {kind: files[kind] for kind in needed if not Path(files[kind]).exists()}
    steps.fetch_manifests(store, name, absent)
    return files


def _files_of(options: argparse.Namespace, needed: Sequence[str]) -> dict[str, str]:
    """The manifests of the run that ``--run-uri`` names, all as they are in S3 now."""
    from hjepa import steps

    _use_servers(options, load_config())
    store, name = steps.split_run_uri(options.run_uri)
    files = _paths(options, name)
    found = steps.fetch_manifests(store, name, {kind: files[kind] for kind in ("resolved", *needed)})
    if "resolved" not in found:
        raise UserError(
            f"{options.run_uri} is no resolved run: {store.uri(f'runs/{name}/manifests/resolved.json')} does not exist "
            f"at {store.endpoint}. Correct --run-uri, or run the pipeline or `hjepa resolve-config --run {name}` first"
        )
    return files


def _paths(options: argparse.Namespace, name: str) -> dict[str, str]:
    from hjepa.steps import MANIFESTS

    return {kind: str(options.home / "runs" / name / f"{kind}.json") for kind in MANIFESTS}


def resolve_config(options: argparse.Namespace) -> None:
    say(_files(options)["resolved"])


def prepare_data(options: argparse.Namespace) -> None:
    from hjepa import steps

    files = _files(options)
    steps.prepare_data(resolved_path=files["resolved"], dataset_path=files["dataset"])


def train(options: argparse.Namespace) -> None:
    """One step of a run, if that run has its data; else training on its own, without S3, MLflow or a pipeline."""
    if options.run_uri is None and options.run_name is None:
        config = _config(options)
        if not Path(_paths(options, run_name(options, config))["dataset"]).exists():
            from hjepa.training import train_alone

            train_alone(config, resume=options.resume, device=options.device)
            return
    from hjepa import steps

    files = _files(options, "dataset")
    steps.train(
        resolved_path=files["resolved"],
        dataset_path=files["dataset"],
        checkpoint_path=files["checkpoint"],
        resume=options.resume,
        device=options.device,
    )


def export(options: argparse.Namespace) -> None:
    from hjepa import steps

    files = _files(options, "dataset", "checkpoint")
    steps.export_checkpoint(
        resolved_path=files["resolved"],
        dataset_path=files["dataset"],
        checkpoint_path=files["checkpoint"],
        model_path=files["model"],
    )


def evaluate(options: argparse.Namespace) -> None:
    from hjepa import steps

    files = _files(options, "dataset", "model")
    result = steps.evaluate(
        resolved_path=files["resolved"],
        dataset_path=files["dataset"],
        model_path=files["model"],
        evaluation_path=files["evaluation"],
    )
    for name, value in sorted(result["metrics"].items()):
        say(f"{name} {value:.4f}")


def register(options: argparse.Namespace) -> None:
    from hjepa import steps

    files = _files(options, "model", "evaluation")
    steps.register_model(
        resolved_path=files["resolved"],
        model_path=files["model"],
        evaluation_path=files["evaluation"],
        registration_path=files["registration"],
    )


# -- the rest --------------------------------------------------------------------------------------------------------


def doctor(options: argparse.Namespace) -> int:
    from hjepa.adapters import preflight

    config = _config(options)
    if options.cluster:
        return _doctor_of_cluster(config, options)
    if given := [f"--{name}" for name in ("pod", "endpoint") if getattr(options, name)]:
        raise UserError(f"{' and '.join(given)}: this is a look at a cluster; add --cluster")
    _use_servers(options, config)
    embedded = config.storage.endpoint_url is None and "AWS_ENDPOINT_URL" not in os.environ
    alone = {"masks": False, "source": False, "trains_here": False} if options.servers else {}
    findings = preflight.check(config, servers=options.servers or not embedded, **alone)
    for finding in findings:
        say(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.name}: {finding.detail}")
        if not finding.ok and finding.remedy:
            say(f"      {finding.remedy}")
    return 0 if all(finding.ok for finding in findings) else UserError.exit_code


def _doctor_of_cluster(config: Config, options: argparse.Namespace) -> int:
    from hjepa.adapters.cluster import doctor as of_cluster

    def kfp() -> str:
        from hjepa.adapters import kfp_server

        return kfp_server.version(kfp_server.Server.from_environment(options.endpoint))

    asked = options.endpoint or "KF_PIPELINES_ENDPOINT" in os.environ
    if options.pod:
        say("starting a pod that looks at S3 and MLflow; its image may have to be pulled first ...")
    rows = of_cluster.check(config, pod=options.pod, kfp=kfp if asked else None)
    for line in of_cluster.render(rows):
        say(line)
    return UserError.exit_code if any(row.ok is False for row in rows) else 0


def plan(options: argparse.Namespace) -> None:
    from hjepa import plan as planning

    config = _config(options)
    found = planning.plan(config, num_samples=options.images, world_size=options.ranks, picture=options.picture)
    say(planning.render(found))


def replay(options: argparse.Namespace) -> None:
    from hjepa.trainers.incidents import replay as play_again

    for line in play_again(options.incident, options.device):
        say(line)


def show_config(options: argparse.Namespace) -> None:
    from hjepa.config import dump_yaml

    print(dump_yaml(_config(options)), end="")


def stack_up(options: argparse.Namespace) -> None:
    from hjepa.adapters.stack import Stack

    info = Stack(options.home).up(report=say)
    (info.home / "keep-stack").touch()
    say(f"MLflow: {info.mlflow_uri}/?workflowType=machine_learning#/experiments")
    say(f"S3: {info.s3_endpoint}, bucket {info.bucket}, keys in {info.home / 'stack.json'}")


def stack_status(options: argparse.Namespace) -> int:
    from hjepa.adapters.stack import Stack

    status = Stack(options.home).status()
    for server in (status.s3, status.mlflow):
        state = "healthy" if server.healthy else "running, not answering" if server.running else "stopped"
        where = f" at {server.url} (process {server.pid})" if server.running else ""
        say(f"{server.name}: {state}{where}")
    return 0 if status.healthy else 1


def stack_env(options: argparse.Namespace) -> None:
    from hjepa.adapters.stack import Stack

    stack = Stack(options.home)
    if not stack.status().healthy:
        print("note: these servers are not running; start them with: hjepa stack up", file=sys.stderr)
    for name, value in stack.environment().items():
        print(f"export {name}={shlex.quote(value)}")


def stack_down(options: argparse.Namespace) -> None:
    from hjepa.adapters.stack import Stack

    (options.home / "keep-stack").unlink(missing_ok=True)
    Stack(options.home).down()
    say("S3 and MLflow are stopped; their data stays")


def pipeline_compile(options: argparse.Namespace) -> None:
    if (options.profile or options.images_claim) and not options.output:
        raise UserError("--profile and --images-claim need --output: the committed pipelines belong to no cluster")
    output = [str(options.output.resolve())] if options.output else []
    _compile(output, options)
    say(output[0] if output else str(compiled_pipeline().parent))


def _compile(output: Sequence[str], options: argparse.Namespace) -> None:
    import subprocess

    root = Path(__file__).resolve().parents[2]
    if not (root / "pipelines" / "pretrain.py").exists():
        raise UserError(
            "compiling, and so --profile and --images-claim, needs a checkout of the repository; "
            "the installed package brings the compiled pipelines along"
        )
    profile = ["--profile", str(options.profile.expanduser().resolve())] if options.profile else []
    if options.profile:
        from hjepa.steps import profile_settings

        load_config("default", profile_settings(str(options.profile)))  # its mistakes, without a traceback
    claim = ["--images-claim", options.images_claim] if options.images_claim else []
    command = [sys.executable, "-m", "pipelines.pretrain", *output, "--pipeline", options.pipeline, *profile, *claim]
    done = subprocess.run(command, cwd=root, check=False, stderr=subprocess.PIPE, text=True)
    if done.returncode == UserError.exit_code:
        raise UserError(done.stderr.partition("error: ")[2].strip())
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if done.returncode:
        raise HjepaError(f"the pipeline did not compile (exit code {done.returncode})")


@contextlib.contextmanager
def _pipeline_file(options: argparse.Namespace) -> Iterator[Path]:
    """The compiled pipeline, for the cluster of ``--profile``; and its registry, unless another is given."""
    if not options.profile and not options.images_claim:
        yield compiled_pipeline(options.pipeline)
        return
    import tempfile

    if options.profile:
        from hjepa.steps import profile_settings

        cluster = load_config("default", profile_settings(str(options.profile))).cluster
        options.registry = options.registry or cluster.registry or None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{options.pipeline}.yaml"
        _compile([str(path)], options)
        yield path


def pipeline_upload(options: argparse.Namespace) -> None:
    from hjepa.adapters import kfp_server

    server = kfp_server.Server.from_environment(options.endpoint, namespace=options.namespace)
    with _pipeline_file(options) as compiled:
        kfp_server.upload(server, compiled, version=options.pipeline_version, registry=options.registry, report=say)


def pipeline_run(options: argparse.Namespace) -> None:
    from hjepa.adapters import kfp_server

    with _pipeline_file(options) as compiled:
        arguments = _arguments(options, compiled)
        server = kfp_server.Server.from_environment(options.endpoint, namespace=options.namespace)
        arguments.setdefault("pipeline_ui", server.url)
        submitted = kfp_server.run(
            server,
            compiled,
            arguments,
            experiment=options.experiment,
            version=options.pipeline_version,
            registry=options.registry,
            report=say,
        )
    if not options.no_follow:
        kfp_server.follow(server, submitted.run_id, report=say)


def _arguments(options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The pipeline's parameters, checked as far as this machine can: what is wrong is found here, not in a pod."""
    from hjepa.adapters import pipeline_spec
    from hjepa.steps import check_run_name, plan_sweep, profile_settings
    from hjepa.sweep import as_list, read_sets

    if options.sweep and options.pipeline != SWEEP:
        raise UserError(f"--sweep {options.sweep}: only --pipeline {SWEEP} takes one")
    compiled = pipeline_spec.load(path)
    types = {name: item["parameterType"] for name, item in compiled.parameters.items()}
    arguments: dict[str, Any] = {}
    where = "sets="
    for text in options.parameters:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r}: expected NAME=VALUE; the pipeline takes {', '.join(types)}")
        try:
            arguments[name] = value if types.get(name) == "STRING" else parse_yaml(value)
        except (yaml.YAMLError, ValueError):
            raise UserError(f"{text!r}: {value!r} is not a YAML value") from None
    if options.sweep:
        where = f"the sets in {options.sweep}"
        arguments["sets"] = read_sets(options.sweep)
    elif "sets" in types and "sets" in arguments:
        arguments["sets"] = as_list(arguments["sets"], where)
    compiled.check_arguments(arguments)
    if arguments.get("run"):  # an empty one takes the id of the KFP run
        check_run_name(arguments["run"], "run=")
    numbers = {"gpus": "cluster.gpus_per_node", "nodes": "cluster.nodes", "backend": "cluster.backend"}
    numbers |= {"champion_margin": "tracking.champion_margin"}
    plain = [f"{key}={arguments[name]}" for name, key in numbers.items() if arguments.get(name)]
    profile = profile_settings(arguments["profile"]) if arguments.get("profile") else []
    overrides = [*profile, *arguments.get("overrides", []), *plain]
    if "config" in arguments or overrides:
        load_config(arguments.get("config", "default"), overrides)
    if "sets" in types:
        if not arguments.get("sets"):
            raise UserError(
                f"pipeline {SWEEP} needs sets, one per branch: --sweep FILE, or for example "
                """'sets=[["training.lr=1e-3"],["training.lr=2e-3"]]'"""
            )
        # A run without a name gets the id of the KFP run, which is as long as this.
        run = arguments.get("run") or "x" * 36
        plan_sweep(run, arguments.get("config", "default"), overrides, {}, arguments["sets"], where=where)
    if "config" in arguments:
        arguments["config"] = _portable(arguments["config"])
    return arguments


# -- jobs ------------------------------------------------------------------------------------------------------------


def _backend(options: argparse.Namespace) -> list[str]:
    return [f"cluster.backend={options.backend}"] if options.backend else []


def _job_overrides(options: argparse.Namespace) -> list[str]:
    return [*_overrides(options), *_backend(options)]


def job_render(options: argparse.Namespace) -> None:
    """Asks no server unless ``--run-uri`` names a run: then the manifest belongs to that very run."""
    from hjepa import steps
    from hjepa.adapters.cluster import launcher, render

    if options.run_uri:
        run = steps.Run.read(_files_of(options, ())["resolved"])
        spec = steps.training_job(run, _job_overrides(options))
    else:
        config = load_config(options.config, _job_overrides(options))
        name = run_name(options, config)
        spec = steps.training_job(steps.Run(name, config, "", config.tracking.uri or ""))
    chosen = launcher.BACKENDS.get(spec.cluster.backend)
    if chosen is None:
        raise UserError(
            f"cluster.backend={spec.cluster.backend}: a manifest is of one kind; use --backend "
            f"{' or --backend '.join(launcher.BACKENDS)}"
        )
    print(render.to_yaml(chosen.module.render(spec)), end="")


def job_submit(options: argparse.Namespace) -> None:
    from hjepa import steps

    files = _files(options, "dataset")
    steps.launch_training(
        resolved_path=files["resolved"],
        dataset_path=files["dataset"],
        checkpoint_path=files["checkpoint"],
        # Without --run-uri the run was just resolved with the other settings.
        overrides=_job_overrides(options) if options.run_uri else _backend(options),
    )


def _job(options: argparse.Namespace) -> tuple[str, str, Config]:
    """(run, name of its job, configuration) that the options name, without asking a server."""
    from hjepa.adapters.cluster import spec
    from hjepa.steps import split_run_uri

    config = load_config(options.config, _job_overrides(options))
    name = split_run_uri(options.run_uri)[1] if options.run_uri else run_name(options, config)
    return name, spec.job_name(name), config


def job_logs(options: argparse.Namespace) -> None:
    from hjepa.adapters.cluster import jobs

    run, name, config = _job(options)
    backend, namespace = config.cluster.backend, config.cluster.namespace
    for line in jobs.log(name, run=run, backend=backend, namespace=namespace, follow=options.follow):
        print(line, flush=True)


def job_cancel(options: argparse.Namespace) -> None:
    from hjepa.adapters.cluster import launcher

    run, name, config = _job(options)
    namespace = config.cluster.namespace
    deleted = launcher.cancel(name, backend=config.cluster.backend, namespace=namespace)
    if not deleted:
        here = f"-n {namespace} " if namespace else ""
        raise UserError(
            f"there is no job {name} of run {run}; name the run with --config and --run. "
            f"`kubectl {here}get trainjobs,pytorchjobs -l app.kubernetes.io/name=hjepa` lists all"
        )
    for item in deleted:
        say(f"{item}: deleted; `hjepa job submit` goes on from the last checkpoint")


def sync(options: argparse.Namespace) -> None:
    from hjepa.adapters.tracking import replay, tracking_uri

    sent = replay(options.journal, tracking_uri(options.uri), options.run_id)
    say(f"{sent} metric records are in MLflow now")


if __name__ == "__main__":
    sys.exit(main())
