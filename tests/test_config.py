"""Reading, overriding and refusing configurations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hjepa.config import (
    Config,
    ConfigError,
    all_keys,
    dump_yaml,
    flatten,
    load_config,
    packaged_configs,
    parse_yaml,
    sha256_json,
    validate,
)
from hjepa.errors import UserError

FOUR_MISTAKES = """\
training:
  epochs: ten
  warmup_epoch: 5
model:
  embed_dim: 100
  num_heads: 12
checkpoint:
  mode: maximum
"""


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(text, overrides)
    return caught.value.problems


# -- what is accepted ------------------------------------------------------------------------------------------------


def test_defaults__are_a_valid_configuration() -> None:
    assert validate({}) == Config()
    assert load_config("") == Config()


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged__loads_by_name(name: str) -> None:
    assert isinstance(load_config(name), Config)


def test_packaged__default_and_demo_are_there() -> None:
    assert {"default", "demo"} <= set(packaged_configs())


def test_dump__reads_back_to_an_equal_tree() -> None:
    config = load_config("demo", ["training.lr=3e-4", "loss.level_weights=[1, 0.5]", "training.clip_grad=null"])
    assert load_config(dump_yaml(config)) == config


def test_dump__digest_follows_the_values_and_not_the_spelling() -> None:
    spelt, short = load_config("training: {lr: 0.0005}\nseed: 0"), load_config("", ["training.lr=5e-4"])
    assert spelt.digest == short.digest != Config().digest


def test_sha256_json__known_value() -> None:
    # printf '{"a":1}' | sha256sum
    assert sha256_json({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


def test_flatten__has_every_key() -> None:
    assert list(flatten(Config())) == all_keys()


def test_config__cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().training.lr = 1.0  # type: ignore[misc]


def test_config__needs_no_torch() -> None:
    code = "import sys, hjepa.config; hjepa.config.load_config('demo'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E-3", 1e-3),
        ("1.5e3", 1500.0),
        ("-2e+2", -200.0),
        (".5e1", 5.0),
        ("1.e2", 100.0),
        ("+1e2", 100.0),
        ("1", 1),
        ("1.0", 1.0),
        ("e-3", "e-3"),
        ("1e", "1e"),
        ("1e-3x", "1e-3x"),
        ("null", None),
        ("true", True),
        ("[1e-3, 2]", [1e-3, 2]),
    ],
)
def test_yaml__numbers(text: str, value: object) -> None:
    parsed = parse_yaml(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_file__is_read_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("training:\n  lr: 1e-3\n  epochs: 60\n", "utf-8")
    assert load_config(str(path)).training.lr == 1e-3


def test_cache__needs_room_for_some_blocks() -> None:
    assert problems("data: {cache_gb: 0.1}") == [
        "data.cache_gb and data.block_mb: a cache of 0.1 GB holds 12 blocks of 8 MB, and needs 16"
    ]
    assert load_config("data: {cache_gb: 0.1, block_mb: 6}").data.block_mb == 6


# -- overrides -------------------------------------------------------------------------------------------------------


def test_override__later_ones_win() -> None:
    assert load_config("demo", ["training.lr=1e-2", "training.lr=3e-4"]).training.lr == 3e-4


def test_override__reaches_nested_sections_and_null() -> None:
    config = load_config("demo", ["model.ema.momentum=0.9", "training.clip_grad=null", "data.root=/a=b"])
    assert (config.model.ema.momentum, config.training.clip_grad, config.data.root) == (0.9, None, "/a=b")


def test_override__leaves_the_rest_of_its_section() -> None:
    before, after = load_config("demo"), load_config("demo", ["training.lr=5e-4"])
    assert after.training == before.training.model_copy(update={"lr": 5e-4})


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.lr", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("training..lr=3", "expected section.key=value"),
        ("seed.x=3", "seed is a value, not a section"),
        ("training.betas=[0.9", "is not a YAML value"),
        ("trainig.lr=1", "Did you mean training"),
    ],
)
def test_override__says_what_is_wrong(override: str, said: str) -> None:
    text = "seed: 1\n"
    found = problems(text, override)
    assert len(found) == 1
    assert said in found[0]


def test_override__mistakes_are_listed_with_those_of_the_file() -> None:
    found = problems("training:\n  epochs: ten\n", "training.lr", "data.channels=2")
    assert len(found) == 3


# -- what is refused -------------------------------------------------------------------------------------------------


def test_mistakes__are_reported_all_at_once() -> None:
    found = problems(FOUR_MISTAKES)
    assert len(found) == 4
    together = "\n".join(found)
    assert "training.epochs: got the text 'ten', expected a whole number." in found
    assert "training.warmup_epoch: unknown key." in together
    assert "checkpoint.mode: got the text 'maximum', expected one of min, max." in together
    assert "model.embed_dim and model.num_heads: a width of 100 does not divide into 12 heads" in found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training: {lr: fast}", "training.lr: got the text 'fast', expected a number"),
        ("training: {lr: '0.001'}", "training.lr: got the text '0.001', expected a number"),
        ("training: {lr: .nan}", "training.lr: "),
        ("training: {lr: .inf}", "training.lr: "),
        ("training: {epochs: 2.5}", "training.epochs: got 2.5, expected a whole number"),
        ("training: {epochs: true}", "training.epochs: got true, expected a whole number"),
        ("training: {epochs: 0}", "training.epochs: got 0, expected a number >= 1"),
        ("training: {use_amp: 1}", "training.use_amp: got 1, expected true or false"),
        ("training: {use_amp: 'yes'}", "training.use_amp: got the text 'yes', expected true or false"),
        ("training: {betas: [0.9]}", "training.betas"),
        ("training: {betas: [0.9, 0.95, 0.99]}", "training.betas: got [0.9, 0.95, 0.99], expected at most 2 items"),
        ("training: {betas: [0.9, high]}", "training.betas.1: got the text 'high', expected a number"),
        ("training: 5", "training: got 5, expected a section with keys"),
        ("data: {channels: 2}", "data.channels: got 2, expected one of 1 or 3"),
        ("data: {name: null}", "data.name: got null, expected a text"),
        ("seed: -1", "seed: got -1, expected a number >= 0"),
        ("traning: {epochs: 3}", "traning: unknown key. Did you mean training?"),
        ("training: {epoch: 3}", "training.epoch: unknown key. Did you mean training.epochs?"),
        ("model: {momentum: 0.9}", "model.momentum: unknown key. Did you mean model.ema.momentum?"),
        ("model: {ema: {momentun: 0.9}}", "model.ema.momentun: unknown key. Did you mean model.ema.momentum?"),
        ("training: {optimizer: adamww}", "Did you mean adamw?"),
    ],
)
def test_mistake__is_named(text: str, said: str) -> None:
    found = problems(text + "\n")
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("overrides", "keys", "said"),
    [
        (["data.image_size=100"], ["data.image_size", "model.patch_size"], "use data.image_size=96"),
        (["model.num_levels=3", "data.image_size=64"], ["model.num_levels"], "one single cell"),
        (["model.num_levels=4", "data.image_size=64"], ["model.num_levels"], "cannot be merged 8x8"),
        (["model.num_heads=5"], ["model.embed_dim", "model.num_heads"], "does not divide into 5 heads"),
        (["model.embed_dim=42", "model.num_heads=6"], ["model.embed_dim"], "multiple of 4"),
        (["model.predictor.num_heads=5"], ["model.predictor.num_heads"], "does not divide into 5 heads"),
        (["training.warmup_epochs=300"], ["training.warmup_epochs", "training.epochs"], "warm-up"),
        (["model.ema.momentum_warmup_epochs=300"], ["training.epochs"], "momentum would stay flat"),
        (["model.ema.momentum_end=0.5"], ["model.ema.momentum"], "must not fall"),
        (["training.min_lr=0.1"], ["training.min_lr", "training.lr"], "above the largest"),
        (["training.accumulation_steps=4096"], ["training.batch_size"], "no image for each of 4096 micro-batches"),
        (["loss.level_weights=[1]"], ["loss.level_weights", "model.num_levels"], "one weight per level"),
        (["loss.level_weights=[0, 0]"], ["loss.level_weights"], "a weight above 0"),
        (["masking.target_scale=[0.3, 0.2]"], ["masking.target_scale"], "expected (low, high)"),
        (["masking.target_aspect=[2, 1]"], ["masking.target_aspect"], "expected (low, high)"),
        (["masking.context_scale=[0.9, 1.1]"], ["masking.context_scale"], "above 1"),
        (["data.crop_scale=[0.9, 0.3]"], ["data.crop_scale"], "expected (low, high)"),
        (
            ["data.remove_leaks=true", "data.find_duplicates=false"],
            ["data.remove_leaks", "data.find_duplicates"],
            "set data.find_duplicates=true",
        ),
        (["data.root=' '"], ["data.root"], "an empty text"),
        (["data.shard_mb=5001"], ["data.shard_mb"], "at most 5000"),
        (["masking.min_context=196"], ["masking.min_context"], "leave nothing to predict in a grid of 196"),
        (["storage.uri=hjepa"], ["storage.uri"], "expected s3://bucket"),
    ],
)
def test_contradiction__is_named(overrides: list[str], keys: list[str], said: str) -> None:
    found = problems("", *overrides)
    assert len(found) == 1
    assert said in found[0]
    assert all(key in found[0] for key in keys)


def test_contradiction__of_a_refused_value_is_not_reported_too() -> None:
    # image_size is already refused for its type; its default must not be blamed for the patch size.
    found = problems("data: {image_size: big}\nmodel: {patch_size: 15}\n")
    assert found == ["data.image_size: got the text 'big', expected a whole number."]


def test_yaml__repeated_key_is_refused() -> None:
    with pytest.raises(UserError, match="'lr' is written 2 times"):
        load_config("training:\n  lr: 1.0\n  epochs: 50\n  lr: 2.0\n")


def test_yaml__broken_file_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("training:\n  lr: [1\nmodel:\n", "utf-8")
    with pytest.raises(UserError, match=r"broken\.yaml is not valid YAML: (.|\n)*line 3"):
        load_config(str(path))


def test_yaml__executes_nothing() -> None:
    with pytest.raises(UserError, match="not valid YAML"):
        load_config("seed: !!python/object/apply:os.getpid []\n")


def test_yaml__must_be_a_mapping() -> None:
    with pytest.raises(UserError, match="expected a mapping of sections, got list"):
        load_config("- 1\n- 2: 3\n")


def test_source__unknown_name_suggests_a_packaged_one() -> None:
    with pytest.raises(UserError, match="Did you mean demo"):
        load_config("dmo")


def test_source__missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"cannot read the configuration nowhere\.yaml"):
        load_config("nowhere.yaml")


# -- the command -----------------------------------------------------------------------------------------------------


def hjepa(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hjepa.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("command", ["config", "run", "train", "doctor"])
def test_command__four_mistakes_are_one_message_and_exit_code_2(command: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(FOUR_MISTAKES, "utf-8")
    done = hjepa(command, "--config", str(path), cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stdout + done.stderr
    expected = f"""\
        error: {path}: 4 mistakes in the configuration
          1. training.epochs: got the text 'ten', expected a whole number.
          2. training.warmup_epoch: unknown key.
          3. checkpoint.mode: got the text 'maximum', expected one of min, max.
          4. model.embed_dim and model.num_heads: a width of 100 does not divide into 12 heads
        """
    said = done.stderr.splitlines()
    for line, start in zip(said, textwrap.dedent(expected).splitlines(), strict=True):
        assert line.startswith(start)
    assert "Did you mean training.warmup_epochs?" in said[2]


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        "MLFLOW_TRACKING_USERNAME",
        "WANDB_API_KEY",
        "HF_TOKEN",
        "db_password",
    ],
)
def test_env__holds_no_credential_and_its_value_is_not_told(name: str) -> None:
    (problem,) = problems(f"cluster: {{env: {{{name}: verysecret, NCCL_DEBUG: INFO}}}}")
    assert problem.startswith(f"cluster.env: the job's variables hold {name}: a manifest is readable by everybody")
    assert "cluster.s3_secret" in problem
    assert "verysecret" not in problem


def test_env__starts_no_torchrun_and_is_judged_beside_the_other_mistakes() -> None:
    first, second = problems("", "cluster.env={PET_NNODES: '7'}", "cluster.nodes=0")
    assert first == "cluster.nodes: got 0, expected a number >= 1."
    assert "PET_NNODES" in second
    assert "cluster.processes_per_node" in second


def test_env__names_that_only_look_like_it_pass() -> None:
    env = {"AWS_WEB_IDENTITY_TOKEN_FILE": "a", "TOKENIZERS_PARALLELISM": "b", "AWS_REGION": "c", "PETALS": "d"}
    assert load_config("", [f"cluster.env={json.dumps(env)}"]).cluster.env == env


@pytest.mark.parametrize("text", ["cluster: {env: {2024-01-01: a}}", "cluster: {? [1] : 2}"])
def test_yaml__a_key_that_is_no_text_is_said(text: str) -> None:
    with pytest.raises(UserError, match="is no text; write it in quotes"):
        load_config(text)


def test_command__needs_no_torch_to_start() -> None:
    code = "import sys; from hjepa.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_command__says_what_it_resolved(tmp_path: Path) -> None:
    done = hjepa("config", "--config", "demo", "--set", "training.lr=5e-4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_config(done.stdout) == load_config("demo", ["training.lr=5e-4"])
    assert json.dumps(parse_yaml(done.stdout)["training"]["lr"]) == "0.0005"
    assert list(tmp_path.iterdir()) == []
