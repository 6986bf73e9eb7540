"""The parts of `python -m mlomae preflight`: bad input, what a host says, what is made of it."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mlomae.commands import preflight
from mlomae.commands.preflight import conversation, probe
from mlomae.commands.preflight.checks import Needs, find_problems
from mlomae.commands.preflight.conversation import (
    Conversation,
    HostError,
    HostFacts,
    HostGpu,
    LostHost,
)
from mlomae.commands.preflight.hosts import Host
from mlomae.commands.preflight.recipe import read_needs
from mlomae.commands.preflight.survey import HostReport
from tests.ranks import ROOT


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command, which must refuse before any host is asked; returns its sentence."""

    def never(*arguments: Any) -> None:
        raise AssertionError("a host was asked")

    monkeypatch.setattr("mlomae.commands.preflight.command.survey", never)

    def run(*arguments: str) -> str:
        code = preflight.main(arguments)
        output, errors = capsys.readouterr()
        assert (code, output) == (2, "")
        assert errors.startswith("error: ") and errors.count("\n") == 1
        return errors.removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is no file"),
        ("", "empty or not formatted correctly"),
        ("a slots=2\na slots=2\n", "multiple entries for a"),
        ("a slots=two\n", "bad entry: a slots=two"),
        ("a slots=0\n", "a has slots=0"),
        ("-oProxyCommand=id slots=1\n", "'-oProxyCommand=id' is no host name"),
        ("a;id slots=1\n", "'a;id' is no host name"),
        ("$(id) slots=1\n", "is no host name"),
        ("a@-b slots=1\n", "is no host name"),
        ("\xe9 slots=1\n", "is no host name"),
    ],
)
def test_a_bad_hostfile_is_refused(
    tmp_path: Path, refused: Any, text: str | None, words: str
) -> None:
    file = tmp_path / "hostfile"
    if text is not None:
        file.write_text(text)
    sentence = refused("--hostfile", str(file))
    assert sentence.startswith(f"hostfile {file}") and words in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--master_addr=-x"], "--master_addr '-x'"),
        (["--ssh_port", "70000"], "--ssh_port is 70000"),
        (["--recipe", "nothing"], "recipe nothing is no file"),
        (["--recipe", "knn_mae_ct"], "has no output_dir"),
        (["data.train=x"], "data.train=x is given without a recipe"),
        (["--deepspeed_config", "d.json"], "--deepspeed_config d.json is given without a recipe"),
        (["--recipe", "quickstart_mlo_mae", "epochs=x"], 'epochs is "x"'),
        (["--recipe", "quickstart_mlo_mae", "--deepspeed_config", "none.json"], "none.json"),
    ],
)
def test_bad_input_is_refused(refused: Any, arguments: list[str], words: str) -> None:
    assert words in refused(*arguments)


def test_batches_that_the_slots_do_not_divide_are_refused(tmp_path: Path, refused: Any) -> None:
    hosts, config = tmp_path / "hostfile", str(ROOT / "ds_configs/cpu_zero2_fp32.json")
    hosts.write_text("a slots=2\nb slots=2\nc slots=2\n")
    recipe = ("--recipe", "quickstart_mlo_mae", "--deepspeed_config", config)
    sentence = refused("--hostfile", str(hosts), *recipe)
    assert "pretrain.batch_size is 128" in sentence and "6" in sentence


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mlo_mae_vit_base_patch16_imagenet_ade20k", ["data.train", "downstream.train"]),
        ("finetune_vit_tiny_fashion_mnist", ["init_from", "data.train", "data.test"]),
        ("mae_ct_vit_tiny_fashion_mnist", ["data.train"]),
        ("upernet_vit_tiny_patch8_camvid", ["init_from", "data.train", "data.test"]),
    ],
)
def test_every_file_that_a_recipe_names_is_looked_at(name: str, keys: list[str]) -> None:
    overrides = ["init_from=[a.pth]"] if "init_from" in keys else []
    needs = read_needs(name, overrides, None, None, None, 29500)
    assert sorted(needs.data) == sorted(keys)
    assert all(path.is_absolute() for path in needs.data.values())
    assert (needs.checkpoint_bytes is not None) == name.startswith(("mlo_mae", "mae_ct"))


def test_kept_checkpoints_and_the_one_being_written_need_room() -> None:
    """The quickstart saves at 0.4, 0.8 and 1.2 epochs."""

    def space(*overrides: str) -> int:
        needs = read_needs("quickstart_mlo_mae", overrides, None, None, None, 29500)
        assert needs.checkpoint_bytes is not None
        return needs.checkpoint_bytes

    one = space("checkpoint.keep=2") - space("checkpoint.keep=1")
    assert space("checkpoint.keep=1") == 2 * one
    assert space("checkpoint.keep=1", "epochs=4", "checkpoint.keep_every=3") == (2 + 3) * one


# --- what no stand-in can have -------------------------------------------------------------------


def facts(**more: Any) -> HostFacts:
    gpu = HostGpu(name="A100", memory=80 * 2**30, used=0)
    values = {"folder": True, "python": "3.11.7", "code": "1"}
    values |= {
        "packages": dict.fromkeys(
            ("mlomae", "torch", "deepspeed", "timm", "torchvision", "numpy", "safetensors"), "1"
        )
    }
    values |= {"memory": 2**36, "shm": 2**33, "address": "10.0.0.1", "gpus": [gpu] * 8}
    values |= {"driver": "1", "torch_error": None, "num_gpus": 8, "cuda": "12", "nccl": "2"}
    return HostFacts(**(values | more))  # fmt: skip


@pytest.mark.parametrize(
    ("more", "column", "cell"),
    [
        ({"num_gpus": 0, "cuda": None, "nccl": None}, "GPUs", "torch sees 0"),
        ({"gpus": [HostGpu(name="A100", memory=80 * 2**30, used=2**34)] * 8}, "GPUs", "in use"),
        ({"memory": 2**32}, "memory", "4.00 GiB"),
        ({"shm": 2**26}, "memory", "/dev/shm"),
        ({"torch_error": "ImportError: libcudart.so"}, "packages", "torch"),
        ({"python": "3.10.1"}, "python", "3.10.1"),
        ({}, None, None),
    ],
)
def test_a_machine_that_launches_badly(more: Any, column: str | None, cell: str | None) -> None:
    reports = [
        HostReport(Host("a", 8), facts=facts()),
        HostReport(Host("b", 8), facts=facts(**more)),
    ]
    first, second = find_problems(reports, Needs({}, None, None, 29500))
    assert first == []
    assert {(p.check, p.cell) for p in second if p.check != "CUDA"} == (
        {(column, cell)} - {(None, None)}
    )


@pytest.mark.parametrize(
    ("clock", "is_wrong"),
    [((1.9, 0.1), False), ((2.2, 0.1), True), ((-2.2, 0.1), True), ((4.0, 3.0), False)],
)
def test_a_slow_way_to_a_host_is_not_taken_for_its_clock(clock: Any, is_wrong: bool) -> None:
    (problems,) = find_problems([HostReport(Host("a", 1), clock=clock)], Needs({}, None, None, 1))
    assert bool(problems) == is_wrong


def test_a_host_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask(command: str) -> None:
        talk = await Conversation.start(["bash", "-c", command])
        try:
            await talk.ask("clock", seconds=0.2)
        finally:
            await talk.end()

    monkeypatch.setattr(conversation, "END_SECONDS", 0.1)
    greeting = "echo; echo mlomae preflight probe;"
    with pytest.raises(LostHost, match=r"no answer about its clock for 0\.2 s"):
        asyncio.run(ask(f"{greeting} exec sleep 60"))
    for answer in ('{"answer": NaN}', '{"answer": "1"}', "[]", "3", '{"answer": [[[', "{}"):
        with pytest.raises(LostHost, match="makes no sense"):
            asyncio.run(ask(f"{greeting} head -c 1 >/dev/null; echo '{answer}'"))
    with pytest.raises(HostError, match="busy"):
        asyncio.run(ask(f"""{greeting} echo '{{"error": "busy"}}'"""))
    monkeypatch.setattr(conversation, "START_SECONDS", 0.2)
    with pytest.raises(LostHost, match="ssh started no Python there"):
        asyncio.run(ask("exec sleep 60"))


def test_a_large_file_is_compared_at_its_ends_and_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In small: ends of 1000 bytes, and 64 blocks of 10 which begin 20 bytes apart."""
    monkeypatch.setattr(probe, "END_BYTES", 1000)
    monkeypatch.setattr(probe, "BLOCK_BYTES", 10)
    file, content = tmp_path / "large.beton", bytearray(2000 + 64 * 20)

    def digest(full: bool) -> str:
        file.write_bytes(content)
        (contents,) = probe.ask_data([str(file)], full)
        assert contents["num_bytes_read"] == (len(content) if full else 2000 + 640)
        assert (contents["size"], contents["num_files"]) == (len(content), 1)
        return contents["digest"]

    sampled, whole = digest(full=False), digest(full=True)
    in_block, in_gap = 1000 + 17 * 20 + 9, 1000 + 17 * 20 + 10
    for position in (0, 999, 1000, in_block, len(content) - 1000, len(content) - 1, in_gap):
        content[position] = 1
        assert (digest(full=False) == sampled) == (position == in_gap)
        assert digest(full=True) != whole
        content[position] = 0


def test_a_folder_is_compared_by_names_and_sizes_or_in_full(tmp_path: Path) -> None:
    digests = []
    for folder, name, text in (("a", "1.png", "x"), ("b", "1.png", "x"), ("c", "1.png", "y"),
                               ("d", "1.png", "xx"), ("e", "2.png", "x")):  # fmt: skip
        (tmp_path / folder / "cats").mkdir(parents=True)
        (tmp_path / folder / "cats" / name).write_text(text)
        results = [probe.ask_data([str(tmp_path / folder)], full)[0] for full in (False, True)]
        assert [result["num_bytes_read"] for result in results] == [0, len(text)]
        digests.append([result["digest"] for result in results])
    names, full = zip(*digests, strict=True)
    assert names[0] == names[1] == names[2] and len({names[0], names[3], names[4]}) == 3
    assert full[0] == full[1] and len(set(full)) == 4
