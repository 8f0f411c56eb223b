"""The generator keeps its promises: on a small tree of templates made here, and on the project's own."""

from __future__ import annotations

import ast
import difflib
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from jinja2 import Environment, nodes

import gen.build
import gen.render
from gen.__main__ import main
from gen.errors import GenError
from gen.expand import IndentedExpressions
from gen.family import FAMILIES, FORMS, LINEAR_ATTENTION, RETENTION
from gen.render import emissions, inputs, render_all, trace

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = ROOT / "templates"

SMALL_TREE = {
    "runtime/__init__.py.jinja": '''\
"""Operators."""
{% for family in families %}
from .{{ family.name }} import *
{% endfor %}
''',
    "runtime/launch.py.jinja": "LIMIT = 1\n",
    "decay/head.jinja": """\
{% macro parameters() %}
g_gamma,
{% endmacro %}
{% macro state(h) %}
b_d = tl.exp2(g_gamma)
{{ h }} *= b_d
{% endmacro %}
""",
    "decay/none.jinja": """\
{% macro parameters() %}{% endmacro %}
{% macro state(h) %}
{% endmacro %}
""",
    "forms/_sweep.jinja": """\
{% macro sweep(steps) %}
for _ in range({{ steps }}):
    {{ decay.state("b_h") }}
    b_h += 1
{% endmacro %}
""",
    "forms/chunk.py.jinja": '''\
{% import "forms/_sweep.jinja" as sweep with context %}
"""{{ form }} of {{ family.title }}, S_t = \u03b3 S_{t-1}."""

import triton.language as tl


def {{ family.function(form) }}(
    b_h,
    {{ decay.parameters() }}
):
    {{ sweep.sweep(3) }}
    return b_h
''',
    "forms/naive.py.jinja": """\
def {{ family.function(form) }}(b_h, {{ "b_o" }}):
    return b_h
""",
}
EMITTED = ["__init__.py", "launch.py", "retention/chunk.py", "retention/naive.py"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a small tree of templates; return its directory."""
    root = tmp_path / "templates"
    for name, text in SMALL_TREE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def out(tree: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """Build the small tree; return the output directory."""
    assert build(tree) == 0
    capsys.readouterr()
    return tree.parent / "out"


def build(tree: Path, *arguments: str) -> int:
    """Run `gen build` on a small tree, into the folder beside it."""
    return main(["build", "--templates", str(tree), "--out", str(tree.parent / "out"), *arguments])


def edit(tree: Path, name: str, old: str, new: str) -> None:
    """Replace text in a template."""
    text = (tree / name).read_text(encoding="utf-8")
    assert old in text
    (tree / name).write_text(text.replace(old, new), encoding="utf-8")


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Contents and times of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def expand(source: str, **context: object) -> str:
    """Render a template text with the generator's treatment of lone expressions."""
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[IndentedExpressions])  # noqa: S701
    return environment.from_string(source).render(**context)


# Building and checking


def test_build_then_check_passes_and_building_again_writes_nothing(out: Path, tree: Path) -> None:
    before = snapshot(out)
    assert sorted(before) == EMITTED
    assert build(tree, "--check") == 0
    assert build(tree) == 0
    assert snapshot(out) == before


@pytest.mark.parametrize("name", EMITTED)
def test_an_absent_file_fails_the_check(out: Path, tree: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (out / name).unlink()
    assert build(tree, "--check") == 1
    assert f"missing: {name}" in capsys.readouterr().out
    assert not (out / name).exists()
    assert build(tree) == 0
    assert build(tree, "--check") == 0


def test_an_absent_directory_fails_the_check_and_is_not_made(tree: Path) -> None:
    assert build(tree, "--check") == 1
    assert not (tree.parent / "out").exists()


@pytest.mark.parametrize(
    ("template", "old", "new", "line"),
    [
        ("forms/chunk.py.jinja", "sweep(3)", "sweep(4)", "+    for _ in range(4):"),
        ("forms/_sweep.jinja", "b_h += 1", "b_h += 2", "+        b_h += 2"),
        ("decay/head.jinja", "tl.exp2", "tl.exp", "+        b_d = tl.exp(g_gamma)"),
        ("runtime/launch.py.jinja", "1", "2", "+LIMIT = 2"),
    ],
)
def test_a_changed_template_fails_the_check_with_a_diff(
    out: Path, tree: Path, template: str, old: str, new: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(out)
    edit(tree, template, old, new)
    assert build(tree, "--check") == 1
    shown = capsys.readouterr().out
    assert line in shown.splitlines()
    assert "@@" in shown
    assert "Legitimate causes" in shown
    assert f"python -m gen build --out {out} --templates {tree}\n" in shown
    assert snapshot(out) == before


def test_a_template_change_without_effect_still_changes_the_provenance(out: Path, tree: Path) -> None:
    edit(tree, "forms/_sweep.jinja", "{% macro", "{# a reason #}\n{% macro")
    assert build(tree, "--check") == 1


def test_only_files_that_differ_are_written(out: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(out)
    edit(tree, "decay/head.jinja", "tl.exp2", "tl.exp")
    assert build(tree) == 0
    after = snapshot(out)
    assert {name for name in after if after[name] != before[name]} == {"retention/chunk.py", "retention/naive.py"}
    assert capsys.readouterr().out.count("wrote ") == 2


def test_a_hand_edit_fails_the_check_and_is_undone_by_build(
    out: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = (out / "retention/chunk.py").read_bytes()
    (out / "retention/chunk.py").write_bytes(original.replace(b"b_h += 1", b"b_h += 3"))
    assert build(tree, "--check") == 1
    assert "-        b_h += 3\n+        b_h += 1\n" in capsys.readouterr().out
    assert build(tree) == 0
    assert (out / "retention/chunk.py").read_bytes() == original


@pytest.mark.parametrize("change", [lambda text: text.replace(b"\n", b"\r\n"), lambda text: text[:-1], lambda _: b""])
def test_bytes_are_compared_not_lines(out: Path, tree: Path, change: object) -> None:
    path = out / "launch.py"
    path.write_bytes(change(path.read_bytes()))  # type: ignore[operator]
    assert build(tree, "--check") == 1


@pytest.mark.parametrize("name", ["extra.py", "retention/extra.py", "old_family/chunk.py"])
def test_a_stale_file_fails_the_check_and_build_removes_it(
    out: Path, tree: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("x = 1\n")
    assert build(tree, "--check") == 1
    assert f"stale: {name}" in capsys.readouterr().out
    assert (out / name).exists()
    assert build(tree) == 0
    assert sorted(snapshot(out)) == EMITTED


def test_a_family_that_is_gone_leaves_no_importable_folder(out: Path, tree: Path) -> None:
    (out / "old_family/__pycache__").mkdir(parents=True)
    (out / "old_family/__pycache__/chunk.cpython-310.pyc").write_bytes(b"")
    (out / "old_family/chunk.py").write_text("x = 1\n")
    assert build(tree) == 0
    assert not (out / "old_family").exists()


def test_caches_are_neither_stale_nor_removed(out: Path, tree: Path) -> None:
    (out / "__pycache__").mkdir()
    (out / "__pycache__/leftover.py").write_text("x = 1\n")
    assert build(tree, "--check") == 0
    assert build(tree) == 0
    assert (out / "__pycache__/leftover.py").exists()


def test_configs_are_never_touched(out: Path, tree: Path) -> None:
    configs = out / "configs"
    configs.mkdir()
    (configs / "nvidia_h100.yaml").write_bytes(b"format: 1\r\n\xff")
    (configs / "not_generated.py").write_text("x = 1\n")
    os.utime(configs / "nvidia_h100.yaml", ns=(1, 1))
    before, folder_time = snapshot(configs), configs.stat().st_mtime_ns
    assert build(tree, "--check") == 0
    edit(tree, "decay/head.jinja", "tl.exp2", "tl.exp")
    assert build(tree, "--check") == 1
    assert build(tree) == 0
    assert snapshot(configs) == before
    assert configs.stat().st_mtime_ns == folder_time


def test_configs_are_never_read(out: Path, tree: Path) -> None:
    (out / "configs").mkdir()
    os.mkfifo(out / "configs/pipe.py")  # opening it would wait for ever
    assert build(tree, "--check") == 0
    assert build(tree) == 0


def test_files_of_somebody_else_are_not_overwritten(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tree.parent / "out/__init__.py"
    mine.parent.mkdir()
    mine.write_text("precious = 1\n")
    assert build(tree) == 1
    assert "not generated, such as __init__.py" in capsys.readouterr().err
    assert list(snapshot(mine.parent)) == ["__init__.py"]
    assert mine.read_text() == "precious = 1\n"


# What is emitted


def test_every_file_starts_with_its_provenance(out: Path) -> None:
    first, second, *_ = (out / "retention/chunk.py").read_text(encoding="utf-8").splitlines()
    assert first.startswith(
        '# Generated by "python -m gen build" from templates/forms/chunk.py.jinja and templates/decay/'
    )
    assert second.endswith("Do not edit; change the template.")
    for name in EMITTED:
        text = (out / name).read_text(encoding="utf-8")
        assert text.startswith('# Generated by "python -m gen build" from templates/')
        assert "head.jinja" in text if name.startswith("retention/") else "decay" not in text


def test_the_provenance_covers_every_input(tree: Path) -> None:
    chunk, naive = (file for file in emissions(tree, FAMILIES) if file.family)
    assert inputs(tree, chunk) == ["decay/head.jinja", "forms/_sweep.jinja", "forms/chunk.py.jinja"]
    assert inputs(tree, naive) == ["decay/head.jinja", "forms/naive.py.jinja"]


def test_output_is_formatted(out: Path) -> None:
    for name in EMITTED:
        text = (out / name).read_text(encoding="utf-8")
        assert gen.render.format_python(text, name) == text


def test_another_decay_kind_is_built_elsewhere(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(tree, "--family", "linear_attention") == 0
    out = tree.parent / "out"
    assert sorted(snapshot(out)) == [name.replace("retention", "linear_attention") for name in EMITTED]
    assert "from .linear_attention import *" in (out / "__init__.py").read_text(encoding="utf-8")
    chunk = (out / "linear_attention/chunk.py").read_text(encoding="utf-8")
    assert "def chunk_linear_attention(\n    b_h,\n):\n    for _ in range(3):\n        b_h += 1\n" in chunk
    capsys.readouterr()
    assert main(["build", "--family", "linear_attention", "--templates", str(tree)]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "surroundings",
    [
        {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "UTC"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "POSIX", "TZ": "Pacific/Kiritimati", "PYTHONUTF8": "0"},
        {"PYTHONHASHSEED": "3", "LC_ALL": "tr_TR.UTF-8", "TZ": "America/New_York", "COLUMNS": "40"},
    ],
)
def test_output_depends_on_the_templates_alone(out: Path, tree: Path, surroundings: dict[str, str]) -> None:
    elsewhere = tree.parent / surroundings["PYTHONHASHSEED"]
    elsewhere.mkdir()
    (elsewhere / "pyproject.toml").write_text("[tool.ruff]\nline-length = 40\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **surroundings}
    command = [sys.executable, "-m", "gen"]
    where = ["--templates", os.path.relpath(tree, elsewhere)]
    subprocess.run([*command, "build", "--out", "built", *where], cwd=elsewhere, env=environment, check=True)
    shown = subprocess.run(
        [*command, "show", "chunk", *where], cwd=elsewhere, env=environment, check=True, capture_output=True
    )
    assert {name: text for name, (text, _) in snapshot(elsewhere / "built").items()} == {
        name: text for name, (text, _) in snapshot(out).items()
    }
    assert shown.stdout == (out / "retention/chunk.py").read_bytes()


def test_an_installed_generator_has_its_templates_with_it(out: Path, tree: Path) -> None:
    site = tree.parent / "site"
    shutil.copytree(ROOT / "gen", site / "gen", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(tree, site / "gen/templates")
    shutil.copytree(out, site / "generated")
    (site / "templates").mkdir()  # somebody else's package
    command = [sys.executable, "-m", "gen", "build", "--check"]
    done = subprocess.run(command, cwd=site, env={**os.environ, "PYTHONPATH": str(site)}, check=False)
    assert done.returncode == 0


# The command line


def test_show_prints_the_emitted_module(out: Path, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "chunk", "--templates", str(tree)]) == 0
    assert capsys.readouterr().out == (out / "retention/chunk.py").read_text(encoding="utf-8")


def test_show_of_an_unknown_form_names_the_forms(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "chnk", "--templates", str(tree)]) == 2
    assert "no form 'chnk'; the forms are naive, chunk" in capsys.readouterr().err


def test_list_names_every_emitted_file(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--templates", str(tree)]) == 0
    heading, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert heading == ["OUTPUT", "TEMPLATE", "DECAY", "FORM"]
    assert [row[0] for row in rows] == EMITTED
    assert rows[2] == ["retention/chunk.py", "forms/chunk.py.jinja", "decay/head.jinja", "chunk"]


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["show", "--help"]])
def test_help_has_examples(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0
    assert "python -m gen build --check" in capsys.readouterr().out


def test_missing_ruff_is_an_error_that_names_the_fix(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_module(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(gen.render, "import_module", no_module)
    assert build(tree) == 1
    assert "run: python -m pip install" in capsys.readouterr().err


def test_a_tree_without_templates_is_an_error_not_an_empty_package(
    out: Path, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tree / "forms")
    before = snapshot(out)
    assert build(tree) == 1
    assert "forms has no *.py.jinja" in capsys.readouterr().err
    assert snapshot(out) == before


# Faults in templates


@pytest.mark.parametrize(
    ("template", "old", "new", "shown"),
    [
        (
            "forms/chunk.py.jinja",
            "return b_h",
            "return {{ b_x }}",
            "templates/forms/chunk.py.jinja:12: 'b_x' is undefined",
        ),
        (
            "forms/chunk.py.jinja",
            "sweep(3)",
            "swep(3)",
            "templates/forms/chunk.py.jinja:11: forms/_sweep.jinja has no macro",
        ),
        ("forms/chunk.py.jinja", "sweep(3)", "sweep(3, 4)", "templates/forms/chunk.py.jinja:11: macro 'sweep' takes"),
        (
            "forms/chunk.py.jinja",
            "{{ sweep.sweep(3) }}",
            "{% if %}",
            "templates/forms/chunk.py.jinja:11: Expected an expr",
        ),
        (
            "forms/chunk.py.jinja",
            "forms/_sweep",
            "forms/_swep",
            "chunk.py.jinja:1: templates/forms/_swep.jinja does not",
        ),
        ("forms/_sweep.jinja", "decay.state", "decay.stat", "_sweep.jinja:3: decay/head.jinja has no macro 'stat'"),
        ("forms/_sweep.jinja", "{{ steps }}", "{{ steps / 0 }}", "templates/forms/_sweep.jinja:2: division by zero"),
        ("decay/head.jinja", "{{ h }}", "{{ hh }}", "templates/decay/head.jinja:6: 'hh' is undefined"),
        ("decay/head.jinja", "{% macro state", "{{ 1 / 0 }}\n{% macro state", "decay/head.jinja:4: division by zero"),
        ("decay/head.jinja", "{{ h }} *=", "{{ h }} *= =", "decay/head.jinja:6: the emitted text is not valid Python"),
        ("forms/_sweep.jinja", "{{ steps }}):", "{{ steps }}:", "_sweep.jinja:2: the emitted text is not valid Python"),
    ],
)
def test_a_fault_shows_the_template_its_line_and_the_lines_around_it(
    out: Path, tree: Path, template: str, old: str, new: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(out)
    edit(tree, template, old, new)
    edit(tree, "runtime/launch.py.jinja", "1", "2")
    assert build(tree) == 1
    message = capsys.readouterr().err
    assert shown in message
    assert "Traceback" not in message
    line = shown.split(":")[1]
    marked = [text for text in message.splitlines() if text.startswith("  > ")]
    assert marked[0].split("|")[0].split() == [">", line]
    assert marked[0].split("| ")[1] in (tree / template).read_text(encoding="utf-8").splitlines()
    assert snapshot(out) == before, "nothing is written when a template has a fault"


def test_a_fault_in_a_macro_shows_who_called_it(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(tree, "decay/head.jinja", "{{ h }}", "{{ hh }}")
    assert build(tree) == 1
    message = capsys.readouterr().err
    first, second = (
        message.index(f"reached from templates/forms/{name}") for name in ("_sweep.jinja:3", "chunk.py.jinja:11")
    )
    assert first < second


def test_an_import_by_a_computed_name_is_refused(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(tree, "forms/chunk.py.jinja", '"forms/_sweep.jinja"', '"forms/_" ~ "sweep.jinja"')
    assert build(tree) == 1
    assert "templates/forms/chunk.py.jinja imports a template by a computed name" in capsys.readouterr().err


def test_rendering_raises_gen_errors_alone(tree: Path) -> None:
    (tree / "decay/head.jinja").unlink()
    with pytest.raises(GenError, match=r"templates/decay/head\.jinja does not exist"):
        render_all(tree, FAMILIES)


# Expressions alone on a line


def test_a_lone_expression_expands_at_its_indent() -> None:
    assert expand("a\n    {{ x }}\nb", x="1\n  2\n\n3\n") == "a\n    1\n      2\n\n    3\nb"


def test_the_indent_of_the_result_itself_does_not_add_up() -> None:
    assert expand("a\n  {{ x }}\nb", x="\n    1\n      2\n") == "a\n  1\n    2\nb"


@pytest.mark.parametrize("empty", ["", "\n", "   \n\n"])
def test_an_empty_result_removes_the_line(empty: str) -> None:
    assert expand("a\n    {{ x }}\nb\n    {{ x }}", x=empty) == "a\nb\n"


def test_macros_that_call_macros_expand_at_the_sum_of_the_indents() -> None:
    macros = "{% macro outer() %}\nif c:\n  {{ inner() }}\n{% endmacro %}{% macro inner() %}\n1\n2\n{% endmacro %}"
    assert expand(macros + "a\n    {{ outer() }}\nb") == "a\n    if c:\n      1\n      2\nb"


def test_an_expression_within_a_line_is_ordinary_jinja() -> None:
    assert (
        expand("  x = {{ x }}\n  {{ x }} = y\n  {{ x }} {{ x }}\n", x="1\n2") == "  x = 1\n2\n  1\n2 = y\n  1\n2 1\n2"
    )


def test_an_expression_with_an_operator_or_a_filter_expands_as_a_whole() -> None:
    assert expand("  {{ x ~ y | upper }}\n", x="a\n", y="b") == "  a\n  B\n"


def test_whitespace_control_keeps_its_meaning() -> None:
    assert expand("{% macro f(x) -%}\n{{ x }}\n{%- endmacro %}y = {{ f(1) }} + 1") == "y = 1 + 1"
    assert expand("a\n    {{- x }}\nb", x="1") == "a1\nb"


def test_comments_and_raw_text_are_left_alone() -> None:
    assert expand("{#\n  {{ x }}\n#}a\n{% raw %}\n  {{ x }}\n{% endraw %}\nb") == "a\n\n  {{ x }}\nb"


# The project's own templates


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    """Every file that the project's templates give."""
    return render_all(TEMPLATES, FAMILIES)


def test_the_committed_output_equals_the_templates() -> None:
    assert main(["build", "--check", "--templates", str(TEMPLATES), "--out", str(ROOT / "generated")]) == 0


def test_every_form_is_emitted(rendered: dict[str, str]) -> None:
    assert {f"{family.name}/{form}.py" for family in FAMILIES for form in FORMS} <= set(rendered)


def test_the_templates_give_the_same_text_under_another_hash_seed(rendered: dict[str, str], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Kathmandu"}
    command = [sys.executable, "-m", "gen", "build", "--templates", str(TEMPLATES), "--out", "out"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert {name: text.decode() for name, (text, _) in snapshot(tmp_path / "out").items()} == rendered


def test_generated_modules_import_each_other_relatively(rendered: dict[str, str]) -> None:
    for name, text in rendered.items():
        for node in ast.walk(ast.parse(text)):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.append(str(node.module))
            assert not any(module.split(".")[0] == "generated" for module in imported), name


def test_the_decay_kind_none_is_generated(tmp_path: Path) -> None:
    out = tmp_path / "linear"
    assert main(["build", "--templates", str(TEMPLATES), "--family", "linear_attention", "--out", str(out)]) == 0
    assert {f"linear_attention/{form}.py" for form in FORMS} <= set(snapshot(out))


LINEAR = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from importlib import import_module
import linear

module = import_module("linear.linear_attention.{form}")
q, k, v = (torch.randn(2, 70, 3, width, dtype=torch.float64) for width in (16, 16, 8))
heads = [x.transpose(1, 2) for x in (q, k, v)]
wanted = ((heads[0] @ heads[1].mT).tril() @ heads[2]).transpose(1, 2) / 4
o, _ = linear.{form}_linear_attention(q, k, v)
torch.testing.assert_close(o, wanted)
tail = dict(initial_state=None, final_state=None, cu_seqlens=None, reverse=False, adjoint=False, chunk_size=None)
o = module.{form}_sweep(q.float(), k.float(), v.float(), 0.25, **tail)
torch.testing.assert_close(o, wanted.float(), rtol=1e-4, atol=1e-4)
"""


LINEAR_STEP = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from linear import linear_attention_step, naive_linear_attention
from linear.linear_attention.step import step_update

q, k, v = (torch.randn(2, 7, 3, width) for width in (16, 16, 8))
wanted, final = naive_linear_attention(q, k, v, output_final_state=True)
run = [lambda state, o: linear_attention_step(q, k, v, state, out=o)]
run.append(lambda state, o: step_update(q, k, v, None, state, None, None, None, o))
for step in run:
    state, o = torch.zeros(2, 3, 16, 8), torch.empty(2, 7, 3, 8)
    step(state, o)
    torch.testing.assert_close(o, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)
"""
LINEAR_STEP_BUFFERED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from linear import linear_attention_step_buffered, linear_attention_step_flush, naive_linear_attention
from linear.linear_attention.step_buffered import step_buffered_update

q, k, v = (torch.randn(2, 7, 3, width) for width in (16, 16, 8))
wanted, final = naive_linear_attention(q, k, v, output_final_state=True)
for kernel in (False, True):
    state, o = torch.zeros(2, 3, 16, 8), torch.empty(2, 1, 3, 8)
    buffers, counts = (torch.empty(2, 8, 3, 16), torch.empty(2, 8, 3, 8)), [torch.tensor([0, 5]) for _ in range(2)]
    for t in range(7):
        token = [x[:, t : t + 1].contiguous() for x in (q, k, v)]
        if kernel:
            step_buffered_update(*token, None, state, *buffers, *counts, None, None, o)
        else:
            linear_attention_step_buffered(*token, state, *buffers, *counts, out=o)
        torch.testing.assert_close(o[:, 0], wanted[:, t], rtol=1e-4, atol=1e-4)
        counts[1].copy_(counts[0] if t == 4 else counts[1])
        counts[0] += 1
    if kernel:
        step_buffered_update(*(x[:, :0] for x in token), None, state, *buffers, *counts, None, None, o[:, :0])
    else:
        linear_attention_step_flush(state, *buffers, *counts)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("form", [*FORMS, "step", "step_buffered"])
def test_the_decay_kind_none_is_linear_attention(tmp_path: Path, form: str) -> None:
    out = tmp_path / "linear"
    assert main(["build", "--templates", str(TEMPLATES), "--family", "linear_attention", "--out", str(out)]) == 0
    steps = {"step": LINEAR_STEP, "step_buffered": LINEAR_STEP_BUFFERED}
    program = steps.get(form) or LINEAR.format(form=form)
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("form", [*FORMS, "step", "step_kernel", "step_buffered", "step_buffered_kernel"])
def test_two_decay_kinds_differ_in_the_lines_of_the_decay_alone(form: str) -> None:
    head, none = (
        decay_trace(form, replace(RETENTION, decay=decay)) for decay in (RETENTION.decay, LINEAR_ATTENTION.decay)
    )
    matcher = difflib.SequenceMatcher(None, head[0], none[0], autojunk=False)
    changes = [opcode for opcode in matcher.get_opcodes() if opcode[0] != "equal"]
    assert changes, "the decay makes no difference"
    for _, first, last, other_first, other_last in changes:
        for about_decay, line in (*head[1][first:last], *none[1][other_first:other_last]):
            assert about_decay, f"{form}: this line depends on the decay, but does not come from it: {line}"


def decay_trace(form: str, family: gen.family.Family) -> tuple[list[str], list[tuple[bool, str]]]:
    """Expand a form; return its lines, and for each whether it comes from the decay's file or a line that calls it."""
    emission = next(file for file in emissions(TEMPLATES, [family]) if file.family and file.form == form)
    text, origins = trace(TEMPLATES, emission, [family])
    lines = text.split("\n")
    return lines, [(_is_about_decay(origin), line) for origin, line in zip(origins, lines, strict=True)]


def _is_about_decay(origin: tuple[str, int] | None) -> bool:
    if origin is None:
        return False
    name, number = origin
    return (
        name.startswith("decay/") or "decay." in (TEMPLATES / name).read_text(encoding="utf-8").split("\n")[number - 1]
    )


def test_no_form_has_a_condition_on_the_decay() -> None:
    for path in sorted((TEMPLATES / "forms").glob("*.jinja")):
        tree = Environment(extensions=[IndentedExpressions]).parse(path.read_text(encoding="utf-8"))  # noqa: S701
        for condition in tree.find_all((nodes.If, nodes.CondExpr)):
            test: nodes.Node = condition.test  # type: ignore[attr-defined]
            names = {name.name for name in (test, *test.find_all(nodes.Name)) if isinstance(name, nodes.Name)}
            assert not names & {"decay", "family"}, f"{path.name}:{condition.lineno} has a condition on the decay"


def test_decay_kinds_have_one_protocol() -> None:
    kinds = {path.name: macros_of(path) for path in sorted((TEMPLATES / "decay").glob("*.jinja"))}
    assert {"head.jinja", "none.jinja"} <= set(kinds)
    for name, macros in kinds.items():
        assert macros == kinds["head.jinja"], f"{name} has other macros, or other arguments, than head.jinja"


def macros_of(path: Path) -> dict[str, list[str]]:
    """Names and arguments of the public macros of a file."""
    tree = Environment(extensions=[IndentedExpressions]).parse(path.read_text(encoding="utf-8"))  # noqa: S701
    found = [macro for macro in tree.find_all(nodes.Macro) if not macro.name.startswith("_")]
    return {macro.name: [argument.name for argument in macro.args] for macro in found}


def test_every_familys_text_uses_what_it_defines(tmp_path: Path) -> None:
    for family in ("retention", "linear_attention"):
        out = tmp_path / family
        assert main(["build", "--family", family, "--out", str(out)]) == 0
        command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
