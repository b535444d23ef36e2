"""The command line: what it accepts, and that every mistake is one line on stderr and exit code 2."""

import json
import logging
import os
import subprocess
import sys
import types

import pytest

import kdsr_jax
from kdsr_jax import cli
from kdsr_jax.config import differing_keys, to_dict
from kdsr_jax.errors import UserError

PLANTED = "--config={}/configs/planted.py"


@pytest.fixture
def planted(repository):
    return PLANTED.format(repository)


@pytest.fixture
def mistake(command):
    """Run a command line that must fail; return its one line without the leading ``error:``."""

    def execute(*words):
        code, out, err = command(*words)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1
        return err.removeprefix("error: ").rstrip("\n")

    return execute


@pytest.fixture
def train(monkeypatch):
    """Stand in for kdsr_jax.train; records its calls."""
    stand_in = types.ModuleType("kdsr_jax.train")
    stand_in.calls = []
    for name in ("train_and_evaluate", "evaluate_workdir"):
        setattr(stand_in, name, lambda *arguments, name=name: stand_in.calls.append((name, *arguments)))
    monkeypatch.setitem(sys.modules, "kdsr_jax.train", stand_in)
    monkeypatch.setattr(kdsr_jax, "train", stand_in, raising=False)
    return stand_in


def python(code, cwd, **environment):
    """Run a program in a process of its own, without this one's path to the package."""
    completed = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_train_is_the_default_mode(command, planted, train, tmp_path):
    assert command(planted, f"--workdir={tmp_path}/run") == (0, "", "")
    [(name, config, workdir)] = train.calls
    assert (name, workdir) == ("train_and_evaluate", f"{tmp_path}/run")
    assert config.model.name == "sasrm" and config.is_locked
    assert not (tmp_path / "run").exists()


def test_evaluate_mode(command, planted, train, tmp_path):
    assert command("--mode=evaluate", planted + ":sasrec", f"--workdir={tmp_path}")[0] == 0
    [(name, config, _)] = train.calls
    assert (name, config.model.tables) == ("evaluate_workdir", "none")


def settings(planted, *words):
    """The fields that a command line changes in the planted config, by name."""
    before = to_dict(cli.load_config(planted.removeprefix("--config=")))
    after = to_dict(cli.parse([planted, "--mode=stats", *words]).config)
    return dict(line.split(": ", 1) for line in differing_keys(before, after))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config.train.epochs=3"], {"train.epochs": "40 -> 3"}),
        (["--config.train.epochs", "3"], {"train.epochs": "40 -> 3"}),
        (["-config.train.epochs=3"], {"train.epochs": "40 -> 3"}),
        (["--config.train.epochs=4", "--config.train.epochs=3"], {"train.epochs": "40 -> 3"}),
        (["--config.distill.temperature=2"], {"distill.temperature": "1.5 -> 2.0"}),
        (["--config.train.learning_rate=3e-4"], {"train.learning_rate": "0.001 -> 0.0003"}),
        (["--config.distill.enabled=false"], {"distill.enabled": "true -> false"}),
        (["--noconfig.distill.enabled"], {"distill.enabled": "true -> false"}),
        (["--config.eval.filter_seen", "--config.seed=1"], {"eval.filter_seen": "false -> true", "seed": "0 -> 1"}),
        (["--config.eval.topk=1,5"], {"eval.topk": "[5, 10, 20] -> [1, 5]"}),
        (["--config.eval.topk=(1, 5)"], {"eval.topk": "[5, 10, 20] -> [1, 5]"}),
        (["--config.eval.topk=7"], {"eval.topk": "[5, 10, 20] -> [7]"}),
        (
            ["--config.data.modalities=text-facets"],
            {"data.modalities": '["image-facets", "text-facets"] -> ["text-facets"]'},
        ),
        (
            ["--config.data.modalities=image-a-1,text-b"],
            {"data.modalities": '["image-facets", "text-facets"] -> ["image-a-1", "text-b"]'},
        ),
        (
            ["--config.data.modalities=('text-b',)"],
            {"data.modalities": '["image-facets", "text-facets"] -> ["text-b"]'},
        ),
        (
            ["--config.model.fusion=sum", "--config.model.dim=32"],
            {"model.fusion": '"gate" -> "sum"', "model.dim": "64 -> 32"},
        ),
    ],
)
def test_settings_keep_the_type_of_their_field(planted, words, expected):
    assert settings(planted, *words) == expected


@pytest.mark.parametrize("empty", ["--config.data.modalities=", "--config.data.modalities=()"])
def test_a_list_can_be_empty(repository, empty):
    config = cli.parse([PLANTED.format(repository) + ":sasrec", "--mode=stats", empty]).config
    assert config.data.modalities == ()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "--config is missing; give a config file"),
        (["--config"], "Missing value for flag --config"),
        (["--cofnig={planted}"], "unknown flag; did you mean --config?"),
        (["{config}"], "--workdir is missing"),
        (["{config}", "--workdir="], "--workdir is missing"),
        (["{config}", "--workdr=x"], "--workdr=x: unknown flag; did you mean --workdir?"),
        (["{config}", "--verbose"], "--verbose: unknown flag; see --help"),
        (
            ["{config}", "--workdir=x", "--mode=trian"],
            "--mode=trian: must be one of train, stats, evaluate; did you mean train?",
        ),
        (["{config}", "--workdir=x", "runs"], "unexpected argument 'runs'"),
        (["{config}", "--workdir=x", "--config.distill.enabled", "false"], "unexpected argument 'false'"),
        (["--config.train.epochs=3", "{config}"], "--config.train.epochs=3: comes before --config=FILE"),
        (["{config}", "--config.seed=3", "{config}"], "--config.seed=3: comes before --config=FILE"),
        (["{config}:gru"], "--config=FILE:gru: the variant must be one of gru4rec, sasrec, srgnn"),
        (["{config}:kdsr-sasrek"], "did you mean kdsr-sasrec?"),
        (
            ["{config}", "--config.train.lerning_rate=1"],
            "unknown config field; did you mean --config.train.learning_rate?",
        ),
        (
            ["{config}", "--config.epochs=1"],
            "--config.epochs: unknown config field; did you mean --config.train.epochs?",
        ),
        (["{config}", "--config.seed.x=1"], "--config.seed.x: unknown config field"),
        (["{config}", "--config.seed.=1"], "--config.seed.: unknown config field"),
        (["{config}", "--config..seed=1"], "--config..seed: unknown config field"),
        (
            ["{config}", "--config.data.columns.timestamp=item_id"],
            "--config.data.columns: user_id, item_id and timestamp must be three columns, not user_id, item_id, item_id",
        ),
        (["{config}", "--config.train={{}}"], "--config.train: is a group of fields"),
        (["{config}", "--config.train.epochs=5.5"], "--config.train.epochs=5.5: must be a whole number"),
        (["{config}", "--config.train.epochs=1e3"], "--config.train.epochs=1e3: must be a whole number"),
        (["{config}", "--config.train.epochs="], "--config.train.epochs=: must be a whole number"),
        (["{config}", "--config.train.epochs"], "--config.train.epochs: the value is missing"),
        (["{config}", "--noconfig.train.epochs"], "only switches can be set with --no"),
        (["{config}", "--config.distill.temperature=warm"], "--config.distill.temperature=warm: must be a number"),
        (["{config}", "--config.distill.enabled=maybe"], "--config.distill.enabled=maybe: must be true or false"),
        (["{config}", "--config.eval.topk=5,a"], "--config.eval.topk=5,a: must be rising whole numbers"),
        (["{config}", "--config.distill.temperature", "-1"], "--config.distill.temperature=-1.0: must be"),
        (["{config}", "--config.teacher.num_splits=7"], "--config.teacher.num_splits=7: must divide"),
        (["{config}", "--config.seed=99999999999999"], "must be a whole number from 0 to 2147483647"),
        (["{config}", "--config.model.tables=frozen"], "--config.distill.enabled=false or FILE:sasrm"),
        (["{config}", "--config.data.modalities="], "item ids alone are FILE:sasrec"),
        (["{config}", "--workdir=x", "--undefok=oops", "--oops=1"], "--undefok=oops: unknown flag"),
        (["{config}", "--workdir=x", "--undefok", "config.seed", "--config.seed=1"], "--undefok: unknown flag"),
        (["{config}", "--workdir=a\0b"], r"--workdir='a\x00b': not the path of a folder (embedded null byte)"),
        (["{config}", "--workdir=" + 300 * "x"], "not the path of a folder (File name too long)"),
        (["--config=" + 300 * "x"], "no such config file"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(mistake, planted, words, expected):
    assert expected in mistake(*(word.format(config=planted, planted=planted) for word in words))


def test_a_flagfile_is_read_and_its_mistakes_are_one_line_too(command, mistake, planted, train, tmp_path):
    assert mistake("--flagfile=absent.flags").startswith("Unable to open flagfile: ")
    path = tmp_path / "my.flags"
    path.write_text(f"{planted}\n--config.train.epochs=3\n--workdir={tmp_path}/run\n")
    assert command(f"--flagfile={path}")[0] == 0
    [(_, config, _)] = train.calls
    assert config.train.epochs == 3
    path.write_text("--undefok=oops\n")
    assert "--undefok=oops: unknown flag" in mistake(f"--flagfile={path}", planted, "--workdir=x", "--oops=1")


def test_a_missing_config_file_is_named_with_the_nearest(mistake, repository):
    absent = repository / "configs" / "ml2m.py"
    message = mistake(f"--config={absent}")
    assert message.startswith(f"--config={absent}: no such config file; did you mean") and "ml1m.py" in message
    assert "no such config file" in mistake(f"--config={repository}/configs")
    assert "FILE.py" in mistake(f"--config={repository}/setup.cfg")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def get_config(:\n", "line 1 of"),
        ("import no_such_module\n", "fails with ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1\n", "has no attribute 'get_config'"),
        ("def get_config(): return None\n", "the config file fails with AttributeError"),
        ("def get_config(): raise ValueError('two\\nlines')\n", "fails with ValueError: two lines"),
        ("from configs import default\ndef get_config():\n    c = default.get_config()\n    c.train.epoch = 1\n    return c\n",
         "--config.train.epoch: unknown config field; did you mean --config.train.epochs?"),
        ("from configs import default\ndef get_config():\n    c = default.get_config()\n    c.train.epochs = 'x'\n    return c\n",
         "fails with TypeError"),
    ],
)  # fmt: skip
def test_a_broken_config_file_is_one_line(mistake, tmp_path, source, expected):
    path = tmp_path / "mine.py"
    path.write_text(source)
    message = mistake(f"--config={path}", "--workdir=x")
    assert expected in message


def test_a_variant_of_a_config_file_without_variants(mistake, tmp_path):
    (tmp_path / "mine.py").write_text("def get_config(): return 1\n")
    assert "takes 0 positional arguments" in mistake(f"--config={tmp_path}/mine.py:sasrec")


def test_a_workdir_that_cannot_be_written(mistake, planted, tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert mistake(planted, f"--workdir={workdir}").startswith(f"--workdir={workdir}: {tmp_path}/file is not")


def test_help_explains_modes_and_variants(command):
    code, out, err = command("--help", "--nonsense")
    assert (code, err) == (0, "")
    for word in ("--workdir", "--mode", "--config.FIELD", "kdsr-NAME", "sasrec"):
        assert word in out


def test_an_error_of_the_run_is_one_line(mistake, planted, train, monkeypatch):
    def fail(*_):
        raise UserError("two\n  lines")

    monkeypatch.setattr(train, "train_and_evaluate", fail)
    assert mistake(planted, "--workdir=x") == "two lines"


def test_an_interrupt_is_one_line_and_130(command, planted, train, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_and_evaluate", interrupt)
    code, out, err = command(planted, "--workdir=x")
    assert (code, out, err.count("\n")) == (130, "", 1)


@pytest.mark.parametrize("error", [MemoryError("Unable to allocate\n9 TiB"), RuntimeError("RESOURCE_EXHAUSTED: 9 TiB")])
def test_too_little_memory_is_one_line(mistake, planted, train, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "train_and_evaluate", fail)
    assert mistake(planted, "--workdir=x").startswith("out of memory (")


def test_a_fault_of_the_program_keeps_its_traceback(command, planted, train, monkeypatch):
    monkeypatch.setattr(train, "train_and_evaluate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(planted, "--workdir=x")


def test_warnings_of_the_package_are_plain_lines_on_stderr(command, planted, train, monkeypatch):
    def warn(*_):
        logging.getLogger("kdsr_jax.data").warning("3 duplicates are kept")
        logging.getLogger("kdsr_jax.data").info("not this")

    monkeypatch.setattr(train, "train_and_evaluate", warn)
    assert command(planted, "--workdir=x") == (0, "", "warning: 3 duplicates are kept\n")


def test_stats_prints_one_line_of_json(command, planted):
    code, out, _ = command(planted, "--mode=stats", "--config.data.planted.num_users=300")
    assert code == 0 and out.count("\n") == 1
    line = json.loads(out)
    assert set(line) == {
        *("users", "items", "interactions", "average_length", "sparsity", "train_instances", "test_instances"),
        *("modalities", "oracle_hr@20", "popularity_hr@20"),
    }
    assert set(line["modalities"]) == {"image", "text"}
    assert line["popularity_hr@20"] < line["oracle_hr@20"]


def test_a_config_file_finds_the_default_beside_it_from_any_folder(repository, tmp_path):
    """Neither the working directory nor an installed package knows configs/; the file's own place does."""
    (tmp_path / "copy" / "configs").mkdir(parents=True)
    text = (repository / "configs" / "default.py").read_text()
    (tmp_path / "copy" / "configs" / "default.py").write_text(text.replace("config.seed = 0", "config.seed = 7"))
    mine = "from configs import default\ndef get_config(): return default.get_config()\n"
    (tmp_path / "copy" / "configs" / "mine.py").write_text(mine)
    (tmp_path / "alone.py").write_text(mine)
    code = (
        f"import sys; sys.path.insert(0, {str(repository)!r}); import kdsr_jax.cli as cli; del sys.path[0]\n"
        "before = list(sys.path); print(cli.load_config(sys.argv[1]).seed, before == sys.path)"
    )
    for file, seed in {"copy/configs/mine.py": 7, "alone.py": 0}.items():
        program = code.replace("sys.argv[1]", repr(file))
        assert python(program, tmp_path, PYTHONPATH="") == f"{seed} True\n"
