"""Configurations: the right rule for a shape, and for every broken one a clear warning and the default."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import timeit
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import generated
from generated import configuration
from generated.configuration import ActiveRule, ConfigurationError, ConfigurationWarning, Gpu, parse_file, select_config
from generated.configuration_file import optional_knob
from generated.retention.fused_chunk import FusedChunkConfig

ROOT = Path(generated.__file__).resolve().parent.parent
H100 = Gpu("NVIDIA H100 80GB HBM3", "sm90")
H200 = Gpu("NVIDIA H200", "sm90")
A100 = Gpu("NVIDIA A100-SXM4-80GB", "sm80")
KERNEL, OTHER = "sample_fwd", "sample_dq"
SOURCE = "3f2a90c1d7e54b68"
COMMAND = "python -m tuning run"
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SHAPE = {"K": 256, "V": 512, "BH": 64, "T": 2048}
WHEN = "{dtype: bfloat16, K: [129, 256], V: [257, 512], BH: [32, 128], T: [1024, 4096]}"
MEASURED = "measured: {ms: 0.430, default_ms: 0.604, error: 0.0026, spills: 0, trials: 172}"
MODELLED = "modelled: {ms: 0.4, occupancy: 0.5, bound: memory}"


@dataclass(frozen=True)
class Knobs:
    """The knobs of the sample kernels."""

    BT: int
    BV: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        if self.BT > 512:
            raise ValueError("BT is over 512, which no GPU can hold")


DEFAULT = Knobs(BT=16, BV=16, num_warps=4, num_stages=1)


def use_of(BT: int) -> str:
    """The knobs of a rule; tests tell rules apart by BT."""
    return f"{{BT: {BT}, BV: 32, num_warps: 4, num_stages: 3}}"


def rule(BT: int, proof: str = MEASURED, when: str = WHEN) -> str:
    return f"      - when: {when}\n        use: {use_of(BT)}\n        {proof}\n"


def kernel(*rules: str, name: str = KERNEL, source: str = SOURCE) -> str:
    return f"  {name}:\n    source: {source}\n    rules:\n" + "".join(rules)


def document(*kernels: str, gpu: Gpu = H100, named: bool = True) -> str:
    name = f"name: {gpu.name}, " if named else ""
    return (
        "format: 1\n"
        f"device: {{{name}arch: {gpu.arch}, sms: 132, memory_gb: 80}}\n"
        "software: {triton: 3.6.0, torch: 2.11.0, driver: 580.159.04}\n"
        "tuned: 2026-11-23\n"
        "kernels:\n" + "".join(kernels)
    )


GOOD = document(kernel(rule(64)))


@dataclass(frozen=True)
class Directories:
    """The three places where files may lie, all empty at first."""

    named: Path
    user: Path
    packaged: Path


@pytest.fixture
def directories(tmp_path: Path) -> Iterator[Directories]:
    """A GPU that claims to be an H100, two kernels, and directories of the test's own."""
    made = Directories(tmp_path / "named", tmp_path / "config" / "retgen", tmp_path / "packaged")
    for path in (made.named, made.user, made.packaged):
        path.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETGEN_CONFIG_DIR", str(made.named))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        patch.setattr(configuration, "packaged_directory", lambda: made.packaged)
        patch.setattr(configuration, "identify", lambda device: H100)
        patch.setattr(configuration, "TRITON", "3.6.0")
        patch.setattr(configuration, "_registry", {})
        for name in (KERNEL, OTHER):
            configuration.register_kernel(name, Knobs, SOURCE)
        yield made
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configuration.reload()


def select(
    device: torch.device = CUDA, dtype: torch.dtype = torch.bfloat16, kernel: str = KERNEL, **shape: int
) -> Knobs:
    return select_config(kernel, Knobs, lambda *_: DEFAULT, device=device, dtype=dtype, **{**SHAPE, **shape})


def read_and_select() -> tuple[Knobs, list[str]]:
    """Read the directories as an import does, select once a kernel, and return the choice and all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        configuration.reload()
        chosen = select()
        select(kernel=OTHER)
        select(T=3000)
    assert all(warning.category is ConfigurationWarning for warning in caught)
    return chosen, [str(warning.message) for warning in caught]


# Which rule


def test_rule_of_this_gpu_is_used_without_a_word(directories: Directories) -> None:
    (directories.packaged / "h100.yaml").write_text(GOOD)
    assert read_and_select() == (Knobs(BT=64, BV=32, num_warps=4, num_stages=3), [])


LEVELS = [
    ("named", H100, 512),
    ("named", H200, 256),
    ("user", H100, 128),
    ("user", H200, 16),
    ("packaged", H100, 64),
    ("packaged", H200, 32),
]


@pytest.mark.parametrize("first", range(len(LEVELS)))
def test_named_beats_user_beats_packaged_and_gpu_beats_architecture(directories: Directories, first: int) -> None:
    for directory, gpu, BT in LEVELS[first:]:
        text = document(kernel(rule(BT)), gpu=gpu)
        (getattr(directories, directory) / f"{configuration.slug(gpu.name)}.yaml").write_text(text)
    _, _, expected = LEVELS[first]
    assert expected == read_and_select()[0].BT


@pytest.mark.parametrize("directory", ["named", "user", "packaged"])
def test_measured_rule_of_any_level_beats_modelled_rules(directories: Directories, directory: str) -> None:
    for level in ("named", "user", "packaged"):
        (getattr(directories, level) / "a.yaml").write_text(document(kernel(rule(128, MODELLED))))
    (getattr(directories, directory) / "b.yaml").write_text(document(kernel(rule(64)), gpu=H200))
    assert read_and_select()[0].BT == 64


def test_modelled_rule_beats_the_default(directories: Directories) -> None:
    (directories.user / "sm90.yaml").write_text(document(kernel(rule(128, MODELLED)), named=False))
    assert read_and_select()[0].BT == 128


def test_measured_rule_that_does_not_match_leaves_the_shape_to_the_model(directories: Directories) -> None:
    elsewhere = WHEN.replace("[1024, 4096]", "[1, 1023]")
    (directories.named / "a.yaml").write_text(document(kernel(rule(64, when=elsewhere), rule(128, MODELLED))))
    assert read_and_select()[0].BT == 128


def test_first_matching_rule_of_a_file_wins(directories: Directories) -> None:
    (directories.named / "a.yaml").write_text(document(kernel(rule(64), rule(128))))
    assert read_and_select()[0].BT == 64


@pytest.mark.parametrize(
    ("shape", "inside"),
    [
        ({"K": 129}, True),
        ({"K": 128}, False),
        ({"K": 257}, False),
        ({"V": 257}, True),
        ({"V": 256}, False),
        ({"V": 513}, False),
        ({"BH": 32}, True),
        ({"BH": 128}, True),
        ({"BH": 31}, False),
        ({"BH": 129}, False),
        ({"T": 1024}, True),
        ({"T": 4096}, True),
        ({"T": 1023}, False),
        ({"T": 4097}, False),
    ],
)
def test_rule_holds_up_to_its_bounds_and_never_beyond(
    directories: Directories, shape: dict[str, int], inside: bool
) -> None:
    (directories.named / "a.yaml").write_text(GOOD)
    configuration.reload()
    expected = 64 if inside else DEFAULT.BT
    assert expected == select(**shape).BT


def test_rule_holds_for_its_dtype_and_float16_goes_by_bfloat16s_without_its_own(directories: Directories) -> None:
    file = directories.named / "a.yaml"
    file.write_text(GOOD)
    configuration.reload()
    assert (select(dtype=torch.float16).BT, select(dtype=torch.float32)) == (64, DEFAULT)
    file.write_text(document(kernel(rule(64), rule(32, when=WHEN.replace("bfloat16", "float16")))))
    configuration.reload()
    assert (select(dtype=torch.float16).BT, select(dtype=torch.bfloat16).BT) == (32, 64)
    file.write_text(document(kernel(rule(32, when=WHEN.replace("bfloat16", "float16")))))
    configuration.reload()
    assert select(dtype=torch.bfloat16) == DEFAULT


def test_bfloat16_rule_that_was_measured_here_beats_float16_rules_of_models_and_other_gpus(
    directories: Directories,
) -> None:
    half = WHEN.replace("bfloat16", "float16")
    (directories.named / "a.yaml").write_text(document(kernel(rule(32, MODELLED, half), rule(64))))
    (directories.named / "b.yaml").write_text(document(kernel(rule(128, when=half)), gpu=H200))
    configuration.reload()
    assert select(dtype=torch.float16).BT == 64


def test_shape_outside_all_rules_is_only_logged(directories: Directories, caplog: pytest.LogCaptureFixture) -> None:
    (directories.named / "a.yaml").write_text(GOOD)
    configuration.reload()
    with caplog.at_level(logging.DEBUG, logger="retgen"):
        assert select(T=7) == DEFAULT
    assert "sample_fwd: no rule for bfloat16, (K, V, BH, T) = (256, 512, 64, 7)" in caplog.text


def test_knob_that_has_a_default_may_be_left_out(directories: Directories) -> None:
    @dataclass(frozen=True)
    class Limited(Knobs):
        maxnreg: int = optional_knob(255, zero="no limit")
        descriptors: int = optional_knob(1, zero="by pointers")

    configuration.register_kernel(KERNEL, Limited, SOURCE)
    for knob, expected in (("", 0), (", maxnreg: 0", 0), (", maxnreg: 168", 168), (", maxnreg: 256", None)):
        (directories.named / "a.yaml").write_text(GOOD.replace("num_stages: 3", f"num_stages: 3{knob}"))
        entry = parse_file(directories.named / "a.yaml").kernels[KERNEL]
        problem = configuration.kernel_problem(KERNEL, entry)
        if expected is None:
            assert "maxnreg is 256; allowed: an integer from 0, no limit, to 255" in str(problem)
        else:
            assert problem is None
            assert Limited(**entry.rules[0].use).maxnreg == expected
    for value, allowed in (("0", True), ("1", True), ("2", False), ("true", False)):
        (directories.named / "a.yaml").write_text(GOOD.replace("num_stages: 3", f"num_stages: 3, descriptors: {value}"))
        problem = configuration.kernel_problem(KERNEL, parse_file(directories.named / "a.yaml").kernels[KERNEL])
        assert (problem is None) is allowed
        said = f"descriptors is {value.capitalize()}; allowed: an integer from 0, by pointers, to 1"
        assert allowed or said in str(problem)


def test_text_knob_is_possible_and_its_type_decides(directories: Directories) -> None:
    @dataclass(frozen=True)
    class Form:
        form: str

        def __post_init__(self) -> None:
            if self.form not in ("chunk", "parallel"):
                raise ValueError(f"form is {self.form!r}; it must be chunk or parallel")

    configuration.register_kernel(KERNEL, Form, SOURCE)
    for text, expected in (("parallel", "parallel"), ("diagonal", "chunk")):
        (directories.named / "a.yaml").write_text(GOOD.replace(use_of(64), f"{{form: {text}}}"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            configuration.reload()
            chosen = select_config(KERNEL, Form, Form("chunk"), device=CUDA, dtype=torch.bfloat16, **SHAPE)
        assert chosen.form == expected
        assert [str(w.message).count("form is 'diagonal'; it must be") for w in caught] == [1] * (text == "diagonal")


# Devices


def test_cpu_gets_the_default_and_no_gpu_is_asked_for(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identify(device: torch.device) -> Gpu:
        raise AssertionError("the CPU needs no GPU's name")

    (directories.named / "a.yaml").write_text(GOOD)
    monkeypatch.setattr(configuration, "identify", identify)
    configuration.reload()
    assert select(device=CPU) == DEFAULT


def test_two_gpus_of_one_process_have_their_own_rules(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directories.named / "h100.yaml").write_text(document(kernel(rule(64))))
    (directories.named / "a100.yaml").write_text(document(kernel(rule(128)), gpu=A100))
    monkeypatch.setattr(configuration, "identify", lambda device: (H100, A100)[device.index])
    configuration.reload()
    assert [select(device=torch.device("cuda", index)).BT for index in (0, 1, 0, 1)] == [64, 128, 64, 128]


def test_device_without_an_index_is_asked_for_each_time(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directories.named / "h100.yaml").write_text(document(kernel(rule(64))))
    (directories.named / "a100.yaml").write_text(document(kernel(rule(128)), gpu=A100))
    configuration.reload()
    assert select(device=torch.device("cuda")).BT == 64
    monkeypatch.setattr(configuration, "identify", lambda device: A100)
    assert select(device=torch.device("cuda")).BT == 128


# What stands in for an unseen GPU's own file

UNSEEN = Gpu("NVIDIA Unseen", "sm90", sms=120, bandwidth_gbs=4000)


@pytest.fixture
def unseen(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> Directories:
    """A GPU that no file is of."""
    monkeypatch.setattr(configuration, "identify", lambda device: UNSEEN)
    return directories


def write_relatives(directory: Path, **relatives: tuple[int, float | None, int]) -> None:
    """A file for each GPU of the architecture: its multiprocessors, bandwidth, and the BT of its rule."""
    for name, (sms, bandwidth, BT) in relatives.items():
        text = document(kernel(rule(BT)), gpu=Gpu(name, "sm90"))
        speed = f"memory_gb: 80, bandwidth_gbs: {bandwidth}" if bandwidth else "memory_gb: 80"
        (directory / f"{name}.yaml").write_text(text.replace("sms: 132", f"sms: {sms}").replace("memory_gb: 80", speed))


@pytest.mark.parametrize(
    ("relatives", "nearest"),
    [
        ({"a": (60, 4000, 16), "b": (121, 1000, 32), "c": (132, 4000, 64)}, 32),
        ({"a": (60, 4000, 16), "b": (240, 4000, 32), "c": (110, 100, 64)}, 64),
        ({"a": (120, 2000, 16), "b": (120, 5000, 32), "c": (120, None, 64)}, 32),
        ({"a": (120, None, 16), "b": (121, 4000, 32)}, 16),
    ],
    ids=["multiprocessors first", "by their ratio", "then bandwidth", "also where that is unknown"],
)
def test_unseen_gpu_goes_by_the_nearest_of_its_architecture(
    unseen: Directories, relatives: dict[str, tuple[int, float | None, int]], nearest: int
) -> None:
    write_relatives(unseen.packaged, **relatives)
    assert nearest == read_and_select()[0].BT


def test_unseen_gpu_goes_by_the_next_nearest_for_a_kernel_that_the_nearest_has_not(unseen: Directories) -> None:
    write_relatives(unseen.packaged, near=(120, 4000, 16), far=(60, 4000, 64))
    path = unseen.packaged / "near.yaml"
    path.write_text(path.read_text().replace(f"  {KERNEL}:", f"  {OTHER}:"))
    chosen, messages = read_and_select()
    assert (chosen.BT, select(kernel=OTHER).BT) == (64, 16)
    assert len(messages) == 1
    assert messages[0].index(str(path)) < messages[0].index(str(unseen.packaged / "far.yaml"))


def test_unseen_gpu_goes_by_a_model_only_where_no_relative_was_measured(unseen: Directories) -> None:
    (unseen.packaged / "sm90.yaml").write_text(document(kernel(rule(128, MODELLED)), named=False))
    chosen, (message,) = read_and_select()
    assert chosen.BT == 128
    assert "rules of its architecture sm90, modelled and not measured" in message
    assert "predicted loss against rules tuned here: some, about 11 % (a rough estimate)" in message
    write_relatives(unseen.packaged, far=(10, 100, 64))
    chosen, (message,) = read_and_select()
    assert chosen.BT == 64
    assert "the nearest GPU, far" in message


def test_gpu_without_a_file_warns_once_and_says_what_stands_in_and_the_loss(unseen: Directories) -> None:
    write_relatives(unseen.packaged, relative=(132, 3352, 64))
    chosen, messages = read_and_select()
    assert chosen.BT == 64
    gain = 0.604 / 0.430 - 1
    loss = (1 - 120 / 132 * 3352 / 4000) * gain
    parts = ("rules of its architecture sm90, those of the nearest GPU, relative", "132 multiprocessors, here 120")
    parts += ("3352 GB/s, here 4000", f"some, about {100 * loss:.0f} % (a rough estimate)", COMMAND, UNSEEN.name)
    parts += (str(unseen.packaged / "relative.yaml"),)
    assert len(messages) == 1
    assert all(part in messages[0] for part in parts), messages[0]


def test_gpu_without_any_rule_warns_once_and_uses_the_default(directories: Directories) -> None:
    (directories.packaged / "a100.yaml").write_text(document(kernel(rule(64)), gpu=A100))
    chosen, messages = read_and_select()
    assert chosen == DEFAULT
    assert len(messages) == 1
    assert all(part in messages[0] for part in (H100.name, "each kernel's default", "much, about 40 %", COMMAND))


def test_loss_is_said_to_be_unknown_where_nothing_was_ever_measured(directories: Directories) -> None:
    _, (message,) = read_and_select()
    assert "each kernel's default; predicted loss against rules tuned here: unknown" in message


@pytest.mark.parametrize(
    ("sms", "bandwidth", "loss"),
    [(132, 80, 0.0), (66, 80, 0.5), (132, 160, 0.5), (66, 40, 0.75), (None, 80, 0.5), (None, None, 0.75)],
)
def test_predicted_loss_is_the_share_of_the_gain_by_which_the_gpus_differ(
    tmp_path: Path, sms: int | None, bandwidth: float | None, loss: float
) -> None:
    path = tmp_path / "a.yaml"
    text = GOOD.replace("ms: 0.430, default_ms: 0.604", "ms: 1.0, default_ms: 2.0")
    path.write_text(text.replace("memory_gb: 80", "bandwidth_gbs: 80"))
    found = configuration.predicted_loss(Gpu("Unseen", "sm90", sms, bandwidth), parse_file(path))
    assert found == pytest.approx(loss)


@pytest.mark.parametrize(
    ("speed", "bandwidth"), [({"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}, 3352), ({}, None)]
)
def test_gpu_is_identified_by_what_torch_tells(
    monkeypatch: pytest.MonkeyPatch, speed: dict[str, int], bandwidth: int | None
) -> None:
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, multi_processor_count=132, **speed)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert configuration.identify(CUDA) == Gpu("A GPU", "sm90", 132, bandwidth)


def test_kernel_that_is_not_registered_is_a_mistake_of_the_caller(directories: Directories) -> None:
    with pytest.raises(ValueError, match=r"'sample_dv' is not registered .* register_kernel"):
        select(kernel="sample_dv", device=CPU)


# What changes while it is used


def test_without_rules_every_kernel_has_its_default_and_nothing_is_warned_of_or_lost(directories: Directories) -> None:
    (directories.packaged / "h100.yaml").write_text(GOOD)
    configuration.reload()
    with configuration.defaults_only():
        assert select() == DEFAULT
        configuration.reload()
        with configuration.defaults_only():
            pass
        assert select() == DEFAULT
    assert select().BT == 64
    assert len(configuration.active_rules(H100.name, H100.arch)) == 1


def test_answer_from_before_a_reload_is_not_remembered_after_it(directories: Directories) -> None:
    asked, reloaded = threading.Event(), threading.Event()

    def default(*_: object) -> Knobs:
        asked.set()
        reloaded.wait(0.2)  # the other thread does not come so far before this one is done
        return DEFAULT

    def reload() -> None:
        asked.wait(9)
        (directories.packaged / "h100.yaml").write_text(GOOD)
        configuration.reload()
        reloaded.set()

    (directories.packaged / "h100.yaml").write_text(document(kernel(rule(64), name=OTHER)))
    configuration.reload()
    thread = threading.Thread(target=reload)
    thread.start()
    select_config(KERNEL, Knobs, default, device=CUDA, dtype=torch.bfloat16, **SHAPE)
    thread.join()
    assert select().BT == 64


# What is not used


def ignored_with(directories: Directories, text: str | bytes) -> str:
    """Write the file that would be used; return its one warning, having seen that the default is used instead."""
    (directories.packaged / "h100.yaml").write_text(document(kernel(rule(64), name=OTHER)))  # no fallback's warning
    path = directories.named / "mine.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    chosen, messages = read_and_select()
    assert chosen == DEFAULT
    assert len(messages) == 1, messages
    assert messages[0].startswith(f"{path}: ")
    assert COMMAND in messages[0]
    return messages[0]


RULE = f"kernels.{KERNEL}.rules[0]"
VIOLATIONS = {
    "format unknown": ("format: 1", "format: 2", ["format is 2; allowed: 1"]),
    "format as text": ("format: 1", "format: '1'", ["format is '1'"]),
    "format a bool": ("format: 1", "format: true", ["format is True"]),
    "format missing": ("format: 1\n", "", ["the file: missing key format"]),
    "top key unknown": ("tuned:", "author: me\ntuned:", ["unknown key 'author'", "format, device, software"]),
    "top key not text": ("tuned:", "1: me\ntuned:", ["the file: unknown key 1"]),
    "device a text": (GOOD.splitlines()[1], "device: H100", ["device is 'H100'; allowed: a mapping"]),
    "device key unknown": ("sms:", "sm_count:", ["device: unknown key 'sm_count'", "arch, name, sms, memory_gb"]),
    "arch missing": ("arch: sm90, ", "", ["device: missing key arch"]),
    "arch not sm": ("arch: sm90", "arch: hopper", ["device.arch is 'hopper'", "sm90"]),
    "name a number": ("name: NVIDIA H100 80GB HBM3", "name: 4090", ["device.name is 4090", "quote"]),
    "no bandwidth": ("memory_gb: 80", "bandwidth_gbs: 0", ["device.bandwidth_gbs is 0; allowed: a number over 0"]),
    "points no list": (MEASURED, f"{MEASURED}\n        also: 3", [f"{RULE}.also is 3; allowed: a list of the figures"]),
    "no other point": (MEASURED, f"{MEASURED}\n        also: []", [f"{RULE}.also is []"]),
    "point without figures": (MEASURED, f"{MEASURED}\n        also: [{{ms: 1}}]", [f"{RULE}.also[0]: missing key"]),
    "best a text": ("ms: 0.430,", "ms: 0.430, best_ms: x,", [f"{RULE}.measured.best_ms is 'x'"]),
    "modelled in words": (MEASURED, "modelled: {ms: fast}", [f"{RULE}.modelled.ms is 'fast'", "a finite number"]),
    "registers in words": ("spills: 0", "spills: 0, registers: few", [f"{RULE}.measured.registers is 'few'"]),
    "half a batch": ("spills: 0", "spills: 0, B: 0.5", [f"{RULE}.measured.B is 0.5"]),
    "origin a number": ("spills: 0", "spills: 0, triton: 3.5", [f"{RULE}.measured.triton is 3.5", "quote"]),
    "sms a float": ("sms: 132", "sms: 132.0", ["device.sms is 132.0"]),
    "memory text": ("memory_gb: 80", "memory_gb: 80GB", ["device.memory_gb is '80GB'"]),
    "software missing": ("triton: 3.6.0, ", "", ["software: missing key triton"]),
    "software unknown": ("triton: 3.6.0", "cuda: 13, triton: 3.6.0", ["software: unknown key 'cuda'"]),
    "version a float": ("triton: 3.6.0", "triton: 3.6", ["software.triton is 3.6", "quote"]),
    "tuned a number": ("tuned: 2026-11-23", "tuned: 2026", ["tuned is 2026", "a date"]),
    "tuned no date": ("tuned: 2026-11-23", "tuned: 2026-13-45", ["line 4: '2026-13-45' has no meaning", "month"]),
    "kernels a list": ("kernels:", "kernels: []\nx:", ["unknown key 'x'"]),
    "kernel empty": (kernel(rule(64)), f"  {KERNEL}:\n", [f"kernels.{KERNEL} is None; allowed: a mapping"]),
    "kernel key": ("    rules:", "    note: fast\n    rules:", [f"kernels.{KERNEL}: unknown key 'note'"]),
    "source missing": (f"    source: {SOURCE}\n", "", [f"kernels.{KERNEL}: missing key source"]),
    "source a number": (SOURCE, "1234567890123456", [f"kernels.{KERNEL}.source is 1234567890123456", "quote"]),
    "rules a mapping": ("      - when:", "        when:", [f"kernels.{KERNEL}.rules is {{", "a list of rules"]),
    "rule key": ("        use:", "        why: x\n        use:", [f"{RULE}: unknown key 'why'", "when, use"]),
    "use missing": (f"        use: {use_of(64)}\n", "", [f"{RULE}: missing key use"]),
    "when missing": (f"when: {WHEN}\n        use", "use", [f"{RULE}: missing key when"]),
    "no proof": (f"        {MEASURED}\n", "", [f"{RULE} is", "exactly one of measured and modelled"]),
    "both proofs": (MEASURED, f"{MEASURED}\n        {MODELLED}", [f"{RULE} is", "exactly one of"]),
    "when key": ("BH: [32", "H: [1, 2], BH: [32", [f"{RULE}.when: unknown key 'H'", "dtype, K, V, BH, T"]),
    "when key missing": (", T: [1024, 4096]", "", [f"{RULE}.when: missing key T"]),
    "dtype unknown": ("dtype: bfloat16", "dtype: bf16", [f"{RULE}.when.dtype is 'bf16'", "bfloat16, float16, float32"]),
    "dtype a list": ("dtype: bfloat16", "dtype: [float16]", [f"{RULE}.when.dtype is ['float16']"]),
    "interval reversed": ("K: [129, 256]", "K: [256, 129]", [f"{RULE}.when.K is [256, 129]", "low <= high"]),
    "interval a point": ("K: [129, 256]", "K: 256", [f"{RULE}.when.K is 256", "[low, high]"]),
    "interval of three": ("K: [129, 256]", "K: [1, 2, 3]", [f"{RULE}.when.K is [1, 2, 3]"]),
    "interval from zero": ("K: [129, 256]", "K: [0, 256]", [f"{RULE}.when.K is [0, 256]"]),
    "interval of bools": ("K: [129, 256]", "K: [yes, 256]", [f"{RULE}.when.K is [True, 256]"]),
    "interval of floats": ("K: [129, 256]", "K: [129, .inf]", [f"{RULE}.when.K is [129, inf]"]),
    "use a list": (use_of(64), "[64, 32]", [f"{RULE}.use is [64, 32]; allowed: a mapping"]),
    "measured a number": (MEASURED, "measured: 0.43", [f"{RULE}.measured is 0.43; allowed: a mapping"]),
    "measured key missing": ("default_ms: 0.604, ", "", [f"{RULE}.measured: missing key default_ms"]),
    "not a number": ("ms: 0.430", "ms: .nan", [f"{RULE}.measured.ms is nan", "finite"]),
    "infinite": ("ms: 0.430", "ms: .inf", [f"{RULE}.measured.ms is inf", "finite"]),
    "negative": ("ms: 0.430", "ms: -0.4", [f"{RULE}.measured.ms is -0.4"]),
    "number that YAML takes for text": ("error: 0.0026", "error: 1e-3", [f"{RULE}.measured.error is '1e-3'", "1.0e-3"]),
    "number a bool": ("error: 0.0026", "error: no", [f"{RULE}.measured.error is False"]),
    "spills a float": ("spills: 0", "spills: 0.0", [f"{RULE}.measured.spills is 0.0", "an integer"]),
    "trials a bool": ("trials: 172", "trials: true", [f"{RULE}.measured.trials is True"]),
    "extra a list": ("trials: 172", "trials: 172, runs: [1]", [f"{RULE}.measured.runs is [1]"]),
    "duplicate section": ("tuned:", "format: 1\ntuned:", ["line 4: duplicate key 'format'"]),
    "duplicate knob": ("BV: 32", "BT: 32", ["line 10: duplicate key 'BT'"]),
    "duplicate kernel": (
        kernel(rule(64)),
        kernel(rule(64)) + kernel(rule(32)),
        ["line 12: duplicate key 'sample_fwd'"],
    ),
    "alias": ("dtype: bfloat16", "dtype: *d", ["line 9: anchors, aliases and tags are not allowed"]),
    "anchor": ("dtype: bfloat16", "dtype: &d bfloat16", ["line 9: anchors, aliases"]),
    "tag": ("tuned: 2026", "tuned: !!python/object/apply:os.getcwd []\nx: 2", ["line 4: anchors, aliases and tags"]),
    "merge": ("name: NVIDIA", "<<: {arch: sm80}, name: NVIDIA", ["line 2: '<<' has no meaning"]),
    "key a list": ("format: 1", "? [1]\n: 1", ["line 1: key [1]"]),
    "two documents": ("format: 1", "a: 1\n---\nformat: 1", ["more than one YAML document"]),
    "tabs": ("    rules:", "\trules:", ["line 7"]),
    "open bracket": ("K: [129, 256]", "K: [129, 256", ["line 9"]),
}


@pytest.mark.parametrize(("old", "new", "parts"), VIOLATIONS.values(), ids=VIOLATIONS)
def test_file_that_breaks_the_schema_is_ignored_with_one_warning_that_names_the_place(
    directories: Directories, old: str, new: str, parts: list[str]
) -> None:
    assert GOOD.count(old) == 1, "the sample has what this case replaces"
    message = ignored_with(directories, GOOD.replace(old, new))
    assert all(part in message for part in parts), message
    assert "The whole file is ignored" in message
    assert "\n" not in message
    with pytest.raises(ConfigurationError) as caught:
        parse_file(directories.named / "mine.yaml")
    assert message.startswith(str(caught.value))


DAMAGES = {
    "empty": (b"", "the file is None; allowed: a mapping"),
    "a list": (b"- 1\n- 2\n", "the file is [1, 2]"),
    "a word": (b"hello", "the file is 'hello'"),
    "binary": (b"\x00\x01\x02\xff\xfe", "mine.yaml"),
    "not UTF-8": (GOOD.encode().replace(b"NVIDIA", b"NVIDIA\xe9"), "mine.yaml"),
    "ten thousand brackets": (b"[" * 10_000, "mine.yaml"),
    "a number of ten thousand digits": (GOOD.replace("sms: 132", f"sms: 1{'0' * 10_000}").encode(), "line 2"),
    "a long text": (GOOD.replace("arch: sm90", f"arch: {'x' * 10_000}").encode(), "device.arch is 'xxx"),
}


@pytest.mark.parametrize(("content", "part"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_file_is_ignored_with_one_short_warning(directories: Directories, content: bytes, part: str) -> None:
    message = ignored_with(directories, content)
    assert part in message
    assert len(message) < 1000


def test_truncated_file_never_raises_and_never_yields_half_a_rule(directories: Directories) -> None:
    for length in range(0, len(GOOD), 7):
        (directories.named / "mine.yaml").write_text(GOOD[:length])
        chosen, messages = read_and_select()
        assert chosen == DEFAULT, GOOD[:length]
        assert messages, GOOD[:length]


KNOBS = {
    "knob unknown": (
        "BV: 32",
        "BK: 32, BV: 32",
        f"{RULE}.use: unknown key 'BK'; allowed: BT, BV, num_warps, num_stages",
    ),
    "knob missing": (", num_stages: 3", "", f"{RULE}.use: missing key num_stages"),
    "no power of two": ("BT: 64", "BT: 48", f"{RULE}.use.BT is 48; allowed: a power of two"),
    "zero": ("BT: 64", "BT: 0", f"{RULE}.use.BT is 0"),
    "negative": ("BT: 64", "BT: -64", f"{RULE}.use.BT is -64"),
    "float": ("BT: 64", "BT: 64.0", f"{RULE}.use.BT is 64.0"),
    "bool": ("BT: 64", "BT: true", f"{RULE}.use.BT is True"),
    "text": ("BT: 64", "BT: '64'", f"{RULE}.use.BT is '64'"),
    "null": ("BT: 64", "BT: ", f"{RULE}.use.BT is None"),
    "warps three": ("num_warps: 4", "num_warps: 3", f"{RULE}.use.num_warps is 3; allowed: a power of two from 1 to 32"),
    "warps sixty-four": ("num_warps: 4", "num_warps: 64", f"{RULE}.use.num_warps is 64"),
    "stages nine": ("num_stages: 3", "num_stages: 9", f"{RULE}.use.num_stages is 9; allowed: an integer from 1 to 8"),
    "refused by the knobs' own class": ("BT: 64", "BT: 1024", "BT is over 512, which no GPU can hold"),
    "stale": (SOURCE, "0123abcd", f"stale: kernels.{KERNEL}.source is '0123abcd', but the kernel is now {SOURCE!r}"),
}


@pytest.mark.parametrize(("old", "new", "part"), KNOBS.values(), ids=KNOBS)
def test_kernel_with_bad_knobs_or_another_source_is_ignored_with_one_warning(
    directories: Directories, old: str, new: str, part: str
) -> None:
    assert part in ignored_with(directories, GOOD.replace(old, new))


def test_one_bad_kernel_leaves_the_others_of_its_file(directories: Directories) -> None:
    bad = kernel(rule(64), rule(48))
    (directories.named / "a.yaml").write_text(document(bad, kernel(rule(128), name=OTHER)))
    chosen, messages = read_and_select()
    assert chosen == DEFAULT
    assert select(kernel=OTHER).BT == 128
    assert len(messages) == 1
    assert f"kernels.{KERNEL}.rules[1].use.BT is 48" in messages[0]


def test_all_stale_kernels_of_a_file_share_one_warning(directories: Directories) -> None:
    kernels = [kernel(rule(64), rule(32), name=name, source="old") for name in (KERNEL, OTHER)]
    (directories.named / "a.yaml").write_text(document(*kernels))
    _, messages = read_and_select()
    assert len(messages) == 1
    assert messages[0].count("stale: ") == 2


def test_bad_file_falls_through_to_the_next_level(directories: Directories) -> None:
    (directories.named / "a.yaml").write_text(GOOD.replace("format: 1", "format: 9"))
    (directories.user / "a.yaml").write_text(GOOD.replace(SOURCE, "old"))
    (directories.packaged / "a.yaml").write_text(GOOD.replace("BT: 64", "BT: 128"))
    chosen, messages = read_and_select()
    assert chosen.BT == 128
    assert len(messages) == 2


def test_misspelt_kernel_is_reported(directories: Directories) -> None:
    assert "kernels.sample_fwdd is no kernel" in ignored_with(directories, GOOD.replace(KERNEL, "sample_fwdd"))


def test_kernels_of_another_package_in_a_shared_directory_are_no_fault(directories: Directories) -> None:
    (directories.user / "a.yaml").write_text(document(kernel(rule(64)), kernel(rule(32), name="elsewhere_fwd")))
    assert read_and_select()[1] == []


def test_stale_file_of_another_gpu_is_no_concern(directories: Directories) -> None:
    (directories.packaged / "a100.yaml").write_text(document(kernel(rule(32), source="old"), gpu=A100))
    (directories.packaged / "h100.yaml").write_text(GOOD)
    assert read_and_select()[1] == []


@pytest.mark.parametrize(
    ("installed", "own", "said"),
    [
        ("3.6.1", "3.6.0", None),
        ("3.7.1", "3.6.0", "proven with Triton 3.6.0, not with 3.7.1"),
        ("3.60.0", "3.6.0", "proven with Triton 3.6.0, not with 3.60.0"),
        ("3.6.0", "3.5.1", "proven with Triton 3.5.1, not with 3.6.0"),
    ],
)
def test_rules_that_were_proven_with_another_triton_are_used_and_said_so_once_a_file(
    directories: Directories, monkeypatch: pytest.MonkeyPatch, installed: str, own: str, said: str | None
) -> None:
    monkeypatch.setattr(configuration, "TRITON", installed)
    measured = MEASURED if own == "3.6.0" else MEASURED.replace("spills", f"triton: {own}, spills")
    path = directories.named / "a.yaml"
    path.write_text(document(kernel(rule(64, measured), rule(32, measured)), kernel(rule(128, measured), name=OTHER)))
    (directories.named / "a100.yaml").write_text(document(kernel(rule(32)), gpu=A100))
    (directories.user / "sm90.yaml").write_text(document(kernel(rule(32, MODELLED)), named=False))
    chosen, messages = read_and_select()
    assert chosen.BT == 64
    assert len(messages) == (said is not None)
    for message in messages:
        assert message.startswith(f"{path}: ")
        assert all(part in message for part in (str(said), "`python -m tuning verify`", f"`{COMMAND}`"))


def test_stale_rules_of_another_triton_are_only_said_to_be_stale(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configuration, "TRITON", "3.7.1")
    (directories.named / "a.yaml").write_text(GOOD.replace(SOURCE, "old"))
    _, (message,) = read_and_select()
    assert "rules not used: stale: " in message


# Directories


def test_absent_user_directory_is_normal(directories: Directories) -> None:
    directories.user.rmdir()
    (directories.named / "a.yaml").write_text(GOOD)
    assert read_and_select()[1] == []


@pytest.mark.parametrize("kind", ["absent", "a file"])
def test_named_directory_that_is_none_is_reported(directories: Directories, kind: str) -> None:
    directories.named.rmdir()
    if kind == "a file":
        directories.named.write_text(GOOD)
    (directories.packaged / "h100.yaml").write_text(GOOD)
    chosen, messages = read_and_select()
    assert chosen.BT == 64
    assert len(messages) == 1
    assert str(directories.named) in messages[0]
    assert "RETGEN_CONFIG_DIR" in messages[0]


@pytest.mark.parametrize("directory", ["named", "user", "packaged"])
def test_unreadable_directory_is_reported(
    directories: Directories, directory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, real = getattr(directories, directory), Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for path in (directories.named, directories.user):
        (path / "h100.yaml").write_text(GOOD)
    chosen, messages = read_and_select()
    assert chosen.BT == 64
    assert len(messages) == 1
    assert f"{closed}: cannot be read" in messages[0]


def deny(path: Path) -> None:
    path.write_text(GOOD)
    path.chmod(0)


@pytest.mark.parametrize(
    "spoil", [deny, Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["denied", "directory", "dangling link"]
)
def test_unreadable_file_is_reported(directories: Directories, spoil: Callable[[Path], None]) -> None:
    path = directories.named / "a.yaml"
    spoil(path)
    if spoil is deny and os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    (directories.packaged / "h100.yaml").write_text(GOOD)
    chosen, messages = read_and_select()
    assert chosen.BT == 64
    assert len(messages) == 1
    assert messages[0].startswith(f"{path}: ")


def test_hidden_and_other_files_are_left_alone(directories: Directories) -> None:
    (directories.packaged / "h100.yaml").write_text(GOOD)
    for name in (".h100.yaml.tmp", ".hidden.yaml", "README.md", "h100.yaml.bak"):
        (directories.named / name).write_text("no configuration")
    assert read_and_select()[1] == []


def test_directories_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("RETGEN_CONFIG_DIR", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    packaged = configuration.packaged_directory()
    assert configuration.config_directories() == [Path("/home/someone/.config/retgen"), packaged]
    monkeypatch.setenv("XDG_CONFIG_HOME", "/settings")
    monkeypatch.setenv("RETGEN_CONFIG_DIR", "~/mine")
    expected = [Path("/home/someone/mine"), Path("/settings/retgen"), packaged]
    assert configuration.config_directories() == expected
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # to be ignored, says the specification
    monkeypatch.setenv("RETGEN_CONFIG_DIR", "")
    assert configuration.config_directories() == [Path("/home/someone/.config/retgen"), packaged]


# For tools


def test_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(GOOD)
    file = parse_file(path)
    assert (file.path, file.tuned, file.device.name, file.device.sms) == (path, "2026-11-23", H100.name, 132)
    assert file.software == {"triton": "3.6.0", "torch": "2.11.0", "driver": "580.159.04"}
    entry = file.kernels[KERNEL]
    assert entry.source == SOURCE
    assert entry.rules[0].when.BH == (32, 128)
    assert entry.rules[0].use == {"BT": 64, "BV": 32, "num_warps": 4, "num_stages": 3}
    assert entry.rules[0].figures == {"ms": 0.43, "default_ms": 0.604, "error": 0.0026, "spills": 0, "trials": 172}


def test_block_style_comments_and_quotes_read_the_same(tmp_path: Path) -> None:
    block = GOOD.replace(
        use_of(64), "\n          BT: 64  # tokens\n          'BV': 32\n          num_warps: 4\n          num_stages: 3"
    )
    for name, text in (("flow", GOOD), ("block", block)):
        (tmp_path / name).write_text(text)
    assert parse_file(tmp_path / "flow").kernels == parse_file(tmp_path / "block").kernels


def test_packaged_files_keep_the_schema() -> None:
    for path in configuration.packaged_directory().glob("*.yaml"):
        parse_file(path)


def test_active_rules_come_in_the_order_of_precedence_with_their_status(directories: Directories) -> None:
    (directories.named / "a.yaml").write_text(document(kernel(rule(256, MODELLED))))
    (directories.user / "b.yaml").write_text(document(kernel(rule(256), source="old"), gpu=H200))
    (directories.packaged / "c.yaml").write_text(GOOD)
    configuration.reload()

    def brief(rules: list[ActiveRule]) -> list[tuple[str, int, str, str]]:
        return [(r.path.name, r.use["BT"], r.proof, r.status.partition(":")[0]) for r in rules]

    stale, own, model = (
        ("b.yaml", 256, "measured", "stale"),
        ("c.yaml", 64, "measured", "active"),
        ("a.yaml", 256, "modelled", "active"),
    )
    assert brief(configuration.active_rules(H100.name, "sm90")) == [stale, own, model]
    assert brief(configuration.active_rules(H200.name, "sm90")) == [stale, own, model]
    assert brief(configuration.active_rules(None, "sm90")) == [stale, own, model]
    assert configuration.active_rules(None, None) == []
    assert configuration.active_rules(A100.name, A100.arch) == []


def test_ignored_files_are_listed(directories: Directories) -> None:
    ignored_with(directories, "format: 1")
    assert [message.split(":")[0] for message in configuration.ignored_files()] == [
        str(directories.named / "mine.yaml")
    ]


def test_slug_is_a_file_name() -> None:
    assert configuration.slug(H100.name) == "nvidia_h100_80gb_hbm3"
    assert configuration.slug("NVIDIA GeForce RTX 4090 (D)") == "nvidia_geforce_rtx_4090_d"


def test_source_hash_is_of_the_kernels_texts_and_their_order() -> None:
    one, other = (SimpleNamespace(src=text) for text in ("def one(): ...", "def other(): ..."))
    hashes = {configuration.source_hash(*kernels) for kernels in ([one], [other], [one, other], [other, one])}
    assert len(hashes) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", text) for text in hashes)
    assert configuration.source_hash(one) == configuration.source_hash(SimpleNamespace(src=one.src))
    assert configuration.source_hash(one, SimpleNamespace()) == "interpreted"


def test_every_registered_kernel_names_its_source() -> None:
    registry = configuration.kernel_registry()
    assert "retention_fused_chunk" in registry
    assert all(len(kernel.source) == 16 for kernel in registry.values())


# Speed


def test_second_look_up_takes_under_5_microseconds(directories: Directories) -> None:
    (directories.named / "a.yaml").write_text(GOOD)
    configuration.reload()

    def look_up() -> None:
        select_config(KERNEL, Knobs, DEFAULT, device=CUDA, dtype=torch.bfloat16, K=256, V=512, BH=64, T=2048)

    assert min(timeit.repeat(look_up, number=2000, repeat=10)) / 2000 < 5e-6


def test_what_was_chosen_is_forgotten_before_it_fills_the_memory(
    directories: Directories, monkeypatch: pytest.MonkeyPatch
) -> None:
    (directories.named / "a.yaml").write_text(GOOD)
    monkeypatch.setattr(configuration, "CACHE_LIMIT", 100)
    configuration.reload()
    assert [select(T=T).BT for T in range(1000, 2000)] == [16] * 24 + [64] * 976
    assert len(configuration._chosen) <= 100


def test_150_rules_are_read_in_under_60_ms(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(document(*(kernel(*(rule(64) for _ in range(15)), name=f"sample_{i}") for i in range(10))))
    assert min(timeit.repeat(lambda: parse_file(path), number=1, repeat=7)) < 0.060  # 11 where nothing else runs


# In a new process

PRETEND = f"""
import sys, torch
import generated, generated.configuration as configuration
from generated.retention import fused_chunk
assert not torch.cuda.is_initialized()
configuration.identify = lambda device: configuration.Gpu({H100.name!r}, "sm90")
configuration.TRITON = "3.6.0"
shape = dict(K=256, V=512, BH=64, T=2048)
for _ in range(2):
    print(configuration.select_config("retention_fused_chunk", fused_chunk.FusedChunkConfig,
        fused_chunk.default_config, device=torch.device("cuda", 0), dtype=torch.bfloat16, **shape))
q, v = torch.randn(1, 9, 2, 4), torch.randn(1, 9, 2, 3)
same = generated.fused_chunk_retention(q, q, v)[0], generated.naive_retention(q, q, v)[0]
assert torch.allclose(*same, atol=1e-5)
"""


def run_new_process(script: str, directory: Path) -> tuple[list[str], str]:
    """Run a script in a new process whose only configurations of the user's are in a directory."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RETGEN_CONFIG_DIR": str(directory),
        "XDG_CONFIG_HOME": str(directory / "none"),
    }
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=directory, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def real_document(BT: int) -> str:
    """The sample's document for a kernel that the package has."""
    name = "retention_fused_chunk"
    return document(kernel(rule(BT), name=name, source=f"'{configuration.kernel_registry()[name].source}'"))


def test_rule_that_is_written_is_used_by_the_next_process(tmp_path: Path) -> None:
    for BT in (32, 128):
        (tmp_path / "mine.yaml").write_text(real_document(BT))
        lines, errors = run_new_process(PRETEND, tmp_path)
        assert "mine.yaml" not in errors
        assert lines == [str(FusedChunkConfig(BT=BT, BV=32, num_warps=4, num_stages=3))] * 2


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ("format: 1", "format: 1\nfromat: 1", "unknown key 'fromat'"),
        ("source: '", "source: 'x", "stale: kernels.retention_fused_chunk.source"),
        ("BT: 256", "BT: 250", "rules[0].use.BT is 250"),
        ("tuned:", "tuned: [", "mine.yaml"),
    ],
    ids=["unknown key", "stale", "bad knob", "broken"],
)
def test_file_that_cannot_be_used_costs_the_next_process_one_warning(
    tmp_path: Path, old: str, new: str, part: str
) -> None:
    (tmp_path / "mine.yaml").write_text(real_document(256).replace(old, new))
    lines, errors = run_new_process(PRETEND, tmp_path)
    assert len(lines) == 2
    assert "BT=256" not in lines[0]
    about_it = [line for line in errors.splitlines() if "ConfigurationWarning: " in line and "mine.yaml" in line]
    assert len(about_it) == 1, errors
    assert part in about_it[0]
    assert COMMAND in about_it[0]


LAUNCHED = """
import torch, generated
from generated.retention import fused_chunk
prepare, run = fused_chunk.output_launches, fused_chunk.run_output
configs = {}  # of what is prepared, the gradients too, of which nothing runs
def output_launches(q, v, scale, config, **options):
    launches = prepare(q, v, scale, config, **options)
    configs[launches] = config
    return launches
def run_output(launches, *arguments, **options):
    print(configs[launches])
    return run(launches, *arguments, **options)
fused_chunk.output_launches, fused_chunk.run_output = output_launches, run_output
torch.manual_seed(0)
q, k, v = (torch.randn(8, 2048, 8, D, device="cuda", dtype=torch.bfloat16) for D in (256, 256, 512))
o = generated.fused_chunk_retention(q, k, v)[0].float()
reference = generated.naive_retention(q.float(), k.float(), v.float())[0]
assert (o - reference).norm() < 0.01 * reference.norm()
"""


@pytest.mark.gpu
def test_operator_launches_with_the_rule_that_was_written(tmp_path: Path) -> None:
    properties = torch.cuda.get_device_properties(0)
    gpu = Gpu(properties.name, f"sm{properties.major}{properties.minor}")
    (tmp_path / "mine.yaml").write_text(real_document(32).replace(H100.name, gpu.name).replace("sm90", gpu.arch))
    lines, _ = run_new_process(LAUNCHED, tmp_path)
    assert lines == [
        "FusedChunkConfig(BT=32, BV=32, num_warps=4, num_stages=3, maxnreg=0, descriptors=0, transposed=0, scores=0)"
    ]


@pytest.mark.gpu
def test_gpu_is_identified_by_the_name_that_torch_gives() -> None:
    gpu = configuration.identify(torch.device("cuda", 0))
    assert gpu.name == torch.cuda.get_device_name(0)
    assert gpu.arch == "sm{}{}".format(*torch.cuda.get_device_capability(0))
