"""What a person is told who asks for help, or mistypes: in-process, without a run."""

import re
import subprocess
import sys

import pytest
from absl import flags

from lm_jax import config
from lm_jax.__main__ import COMMANDS, main
from lm_jax.config import Config, ConfigError
from lm_jax.config.flags import find_config, load_config, load_module, parse_flags
from lm_jax.config.manual import WIDEST, meanings, script_parser, shipped
from lm_jax.preflight import command
from tests.helpers import CONFIGS, ROOT

EXAMPLES = {
    "prepare": "data.prepare CONFIG --part=0/8",
    "train": "main configs/quickstart.py\n",
    "doctor": "doctor configs/quickstart.py --level=full\n",
    "evaluate": "evaluate runs/quickstart-0 --split=test\n",
    "generate": "generate runs/quickstart-0 --prompt=",
    "harness": "harness runs/quickstart-0 --tasks=",
    "compare": "compare runs/",
    "export": "export runs/quickstart-0 --to=",
    "report": "report runs/quickstart-0\n",
}


def shown(capsys, *arguments, run=main):
    """What a command prints and its exit code."""
    with pytest.raises(SystemExit) as stopped:
        run([*arguments])
    return *capsys.readouterr(), stopped.value.code or 0


@pytest.fixture
def parse():
    """A function from arguments to the flags of a command that takes a config."""

    def parsed(*arguments, subject=("config",)):
        given = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "Folder.", given)
        flags.DEFINE_bool("loud", False, "Noise.", given)
        parse_flags(given, ["main", *arguments], "About.", subject=subject)
        return given

    return parsed


def test_every_field_is_documented():
    found = meanings()
    assert sorted(found) == sorted(path for path, _ in config.named_fields(Config()))
    assert all(len(meaning) > 5 for meaning in found.values()), found
    assert found["data.seq_len"] == "T, tokens predicted per window"
    assert found["data.document"].startswith('corpus "text": what one document is: file | line')
    assert found["data.document"].endswith("a field within another is OUTER.INNER")
    assert found["attention.impl"].startswith("see `attend`")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_each_flag_its_default_and_an_example(name, capsys):
    out, err, code = shown(capsys, f"lm-jax {name}", "--help", run=lambda a: call(name, a))
    assert code == 0 and not err
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80 and "\x1b" not in out
    assert lines[0].startswith(f"usage: lm-jax {name} ")
    assert f"\n    python -m lm_jax.{EXAMPLES[name]}" in out
    if name in ("evaluate", "compare"):
        assert re.search(r"^  --split +test +<train\|valid\|test>: ", out, re.MULTILINE)


def call(name, argv):
    main(["lm-jax", name, *argv[1:]])


def test_help_of_training_lists_configs_and_fields(capsys):
    out, _, _ = shown(capsys, "lm-jax", "train", "--help")
    said = " ".join(out.split())
    for name in CONFIGS:
        first = (load_module(ROOT / "configs" / f"{name}.py").__doc__ or "").splitlines()[0]
        assert f" {name} {first}" in said
    for path, default in config.named_fields(Config()):
        name = path.rpartition(".")[2]
        assert re.search(rf"^  {name} +{re.escape(str(default))}", out, re.MULTILINE), path
    assert "rmsnorm | layernorm; before each branch" in said


def test_a_terminal_is_used_to_its_width_and_in_colour(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    out, _, _ = shown(capsys, "lm-jax", "train", "--help")
    widths = [len(line.rstrip()) for line in re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()]
    assert "\x1b[" in out and 80 < max(widths) <= WIDEST


def test_help_needs_no_jax():
    code = (
        "import sys, lm_jax.__main__ as m\n"
        "try: m.main(['lm-jax', 'train', '--help'])\n"
        "finally: assert not {'jax', 'flax', 'optax'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", COMMANDS)
def test_without_arguments_the_usage_is_told(name, capsys):
    out, err, code = shown(capsys, "lm-jax", name)
    assert code == 2 and not out
    assert re.fullmatch(rf"usage: lm-jax {name} (CONFIG|RUN).*; --help tells more\n", err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs/phase1.py:emb25", "--config.seed=3"],
        ["phase1:emb25", "--config.seed", "3"],
        ["--config.seed=3", "--config.data.document_mask", "phase1:emb25"],
        ["--loud", "phase1:emb25", "-config.seed", "3"],
        ["--config.seed=3", "--config", "phase1:emb25"],
    ],
)
def test_a_config_needs_no_flag(parse, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = parse(*arguments)
    assert given.config.seed == 3 and given.config.data.corpus == "wikitext2"
    assert given["config"].config_filename == "configs/phase1.py:emb25"


def test_a_shipped_config_is_found_from_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flops = f"{ROOT / 'configs' / 'musota.py'}:flops"
    assert find_config("musota:flops") == find_config("configs/musota.py:flops") == flops
    assert list(shipped()) == CONFIGS
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").touch()
    assert find_config("mine") == "configs/mine.py"
    assert find_config("musota:flops") == flops
    (tmp_path / "configs" / "musota.py").touch()
    assert find_config("musota:flops") == "configs/musota.py:flops"
    for spec in ("mien", "configs/mien.py:arm"):
        with pytest.raises(FileNotFoundError, match=r"no such config; did you mean mine\?"):
            find_config(spec)


def test_a_run_needs_no_flag(parse):
    assert parse("runs/x", "--loud", subject=["workdir"]).workdir == "runs/x"


def test_the_doctor_looks_at_what_is_there(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    (tmp_path / "other").mkdir()
    names = ("quickstart", "my.py:arm", tmp_path / "run", tmp_path / "other", "log.txt")
    found = [command._which(str(name)) for name in names]
    assert found == ["config", "config", "workdir", "log", "log"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quikstart"], "quikstart: no such config; did you mean quickstart?"),
        (["xyz.py"], "xyz.py: no such config; choose from distill, ensemble"),
        (["phase1:emb9"], "emb9: no such arm; use one of"),
        (["a", "b"], "give exactly one CONFIG; see --help."),
        (["--loud"], "give exactly one CONFIG; see --help."),
        (
            ["quickstart", "--worksdir=x"],
            "--worksdir: there is no such flag; did you mean --workdir?",
        ),
        (["quickstart", "--zzz=x"], "--zzz: there is no such flag; choose from --workdir, --loud"),
        (["quickstart", "--workdir", "--loud"], "--workdir: has no value; write --workdir=VALUE."),
        (["quickstart", "--steps=5"], "did you mean --config.train.steps or "),
        (["quickstart", "--loud=maybe"], "--loud: 'maybe' is no bool; give one."),
        (["quickstart:a"], "quickstart.py: has no arms; leave out :a."),
        (["quickstart", "--config.peak_lr=1"], "did you mean config.optim.peak_lr?"),
        (["quickstart", "--config.peek_lr=1"], "did you mean config.optim.peak_lr?"),
        (
            ["quickstart", "--config.optim.lr", "1"],
            "did you mean config.optim.peak_lr or config.optim.end_lr?",
        ),
        (["quickstart", "--config.mesh.zzz=1"], "no such field; config.mesh has fsdp, tensor."),
        (["quickstart", "--config.zzz=1"], "no such field; config has seed, doctor, data"),
        (["quickstart", "--config.seed.x=1"], "config.seed has no fields; give --config.seed."),
        (["quickstart", "--config.optim=1"], "give one of its fields, as config.optim.name."),
        (["quickstart", "--config.model.layers=four"], "config.model.layers: 'four' is no int"),
        (["quickstart", "--config.train.steps=soon"], "config.train.steps: 'soon' is no duration"),
    ],
)
def test_a_mistake_is_one_sentence(parse, arguments, said, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, err, code = shown(capsys, *arguments, run=lambda a: parse(*a))
    assert code == 2 and said in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def get_config(:", ", line 1: SyntaxError: invalid syntax."),
        ("import nowhere_at_all", ", line 1: ModuleNotFoundError: No module named"),
        ("get = 1", ": has no function get_config, which returns the config."),
        ("def get_config():\n    return {}['x']", ", line 2: KeyError: 'x'."),
        ("def get_config():\n    pass", ": get_config returns a NoneType; return a Config."),
        ("def get_config(arm):\n    pass", ": has arms; name one, {}:ARM."),
    ],
)
def test_a_config_that_fails_is_one_sentence(body, said, tmp_path):
    (path := tmp_path / "own.py").write_text(body)
    with pytest.raises(ConfigError) as raised:
        load_config(str(path))
    assert str(raised.value).startswith(f"{path}{said.format(path)}")


def test_assignment_in_a_config_file_names_the_field():
    with pytest.raises(ConfigError, match=r"config\.peak_lr: .* mean config\.optim\.peak_lr\?"):
        Config().peak_lr = 1
    with pytest.raises(ConfigError, match=r"config\.optim\.layers: .* config\.model\.layers or "):
        Config().optim.layers = 3


def test_scripts_tell_defaults_and_their_example():
    parser = script_parser("What.\n\n    python scripts/x.py\n\nMore.")
    parser.add_argument("--turns", default=9, help="of each")
    parser.add_argument("--out", help="file")
    said = parser.format_help()
    assert "What.\n\n    python scripts/x.py\n\noptions" in said
    assert "of each (default: 9)" in said and "file\n" in said
