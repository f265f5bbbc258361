"""patches/apply.py on a made-up package in a real virtual environment, and the stand-ins of patches/cpu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.apply_patches import ROOT, apply

ONE = "def one():\n    first = 1\n    second = 2\n    return first\n"
TWO = "a\nb\nc\nd\ne\nf\ng\nh\n"
DIFF_ONE = """Why      it is wrong.

--- a/made_up/one.py
+++ b/made_up/one.py
@@ -1,4 +1,5 @@
 def one():
     first = 1
     second = 2
-    return first
+    # Both count.
+    return first + second
"""
DIFF_TWO = """--- a/made_up/two.txt
+++ b/made_up/two.txt
@@ -1,3 +1,2 @@
 a
-b
 c
@@ -6,3 +5,5 @@
 f
+f1
+f2
 g
 h
"""
PATCHED = {"one.py": ONE.replace("return first", "# Both count.\n    return first + second")}
PATCHED["two.txt"] = "a\nc\nd\ne\nf\nf1\nf2\ng\nh\n"


class Target:
    """A virtual environment with package made_up 1.0, hard-linked from a cache, and patches for it."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        self.python = str(folder / "venv/bin/python")
        site_packages = next((folder / "venv/lib").glob("python*/site-packages"))
        self.package, self.cache = site_packages / "made_up", folder / "cache"
        self.metadata = site_packages / "made_up-1.0.dist-info" / "METADATA"
        self.patches = folder / "patches"
        for made in (self.package, self.cache, self.metadata.parent, self.patches / "made_up-1.0"):
            made.mkdir(parents=True)
        self.metadata.write_text("Metadata-Version: 2.1\nName: made_up\nVersion: 1.0\n")
        for name, text in (("one.py", ONE), ("two.txt", TWO)):
            (self.cache / name).write_text(text)
            os.link(self.cache / name, self.package / name)
        self.add_diff("0001-one.diff", DIFF_ONE)
        self.add_diff("0002-two.diff", DIFF_TWO)

    def add_diff(self, name: str, text: str) -> None:
        (self.patches / "made_up-1.0" / name).write_text(text)

    def run(self, action: str) -> int:
        return apply.main([action, "--python", self.python, "--patches", str(self.patches)])

    def texts(self) -> dict[str, str]:
        return {name: (self.package / name).read_text() for name in PATCHED}


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(tmp_path)


def test_apply_check_revert(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    assert target.run("check") == 1
    assert capsys.readouterr().out == "not applied: made_up 1.0 0001-one\nnot applied: made_up 1.0 0002-two\n"
    (target.package / "one.py").chmod(0o640)
    for _ in range(2):  # the second time changes nothing
        assert target.run("apply") == 0
        assert target.texts() == PATCHED
    assert (target.package / "one.py").stat().st_mode & 0o777 == 0o640
    assert target.run("check") == 0
    for _ in range(2):
        assert target.run("revert") == 0
        assert target.texts() == {"one.py": ONE, "two.txt": TWO}
    assert target.run("check") == 1


def test_other_hard_links_keep_the_original(target: Target) -> None:
    assert (target.package / "one.py").samefile(target.cache / "one.py")
    assert target.run("apply") == 0
    assert (target.cache / "one.py").read_text() == ONE
    assert (target.cache / "two.txt").read_text() == TWO
    assert (target.package / "one.py").stat().st_nlink == 1
    assert sorted(path.name for path in target.package.iterdir()) == ["one.py", "two.txt"]


def test_killed_half_way(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def die_at_the_second_file(source: Path, destination: Path) -> None:
        if Path(destination).name == "two.txt":
            raise KeyboardInterrupt
        replace(source, destination)

    with monkeypatch.context() as patching:
        patching.setattr(os, "replace", die_at_the_second_file)
        with pytest.raises(KeyboardInterrupt):
            target.run("apply")
    assert target.texts() == {"one.py": PATCHED["one.py"], "two.txt": TWO}
    assert target.run("check") == 1
    assert target.run("apply") == 0
    assert target.texts() == PATCHED


def test_wrong_version_is_named(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    target.metadata.write_text(target.metadata.read_text().replace("1.0", "1.1"))
    target.metadata.parent.rename(target.metadata.parent.with_name("made_up-1.1.dist-info"))
    assert target.run("apply") == 1
    error = capsys.readouterr().err
    assert "made_up 1.1 is installed" in error and "the patches are for made_up 1.0" in error
    assert target.texts() == {"one.py": ONE, "two.txt": TWO}


def test_missing_package_and_interpreter_are_named(
    target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    target.metadata.unlink()
    target.metadata.parent.rmdir()
    assert target.run("check") == 1
    assert f"made_up is not installed for {target.python}" in capsys.readouterr().err
    target.python = "/nowhere/python"
    assert target.run("check") == 1
    assert "cannot run /nowhere/python" in capsys.readouterr().err


def test_changed_file_is_refused(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    changed = ONE.replace("second = 2", "second = 3")
    (target.package / "one.py").unlink()
    (target.package / "one.py").write_text(changed)
    for action in ("apply", "check", "revert"):
        assert target.run(action) == 1
        assert "one.py is neither the original nor the patched file" in capsys.readouterr().err
    assert (target.package / "one.py").read_text() == changed


def test_two_diffs_of_one_file_are_refused(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    target.add_diff("0003-again.diff", DIFF_ONE)
    assert target.run("apply") == 1
    assert "two diffs change one file" in capsys.readouterr().err
    assert target.texts() == {"one.py": ONE, "two.txt": TWO}


@pytest.mark.parametrize("diff", sorted((ROOT / "patches").glob("*/*.diff")), ids=lambda diff: diff.stem)
def test_shipped_diff(diff: Path) -> None:
    """It says why it exists, it is applied, and reverting and applying it are exact inverses."""
    prose = diff.read_text().split("--- a/")[0]
    for heading in ("Why  ", "Affects  ", "Drop  "):
        assert f"\n{heading}" in prose, f"{diff.name} lacks {heading.strip()}"
    for patch in apply.parse_diff(diff):
        installed = (Path(torch.__file__).parents[1] / patch.target).read_text()
        original = apply.convert(patch, installed, revert=True)
        assert original is not None, f"{diff.name} is not applied: bash patches/cpu/setup_env.sh"
        assert original != installed
        assert apply.convert(patch, original, revert=False) == installed


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 of whole 4-byte words, on Python integers."""
    state = 0
    for start in range(0, len(data), 4):
        word = int.from_bytes(data[start : start + 4], "little") * 0xCC9E2D51 % 2**32
        state ^= (word << 15 | word >> 17) % 2**32 * 0x1B873593 % 2**32
        state = ((state << 13 | state >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        state = (state ^ state >> shift) * factor % 2**32
    return state ^ state >> 16


def test_murmur_hash() -> None:
    import sgl_kernel  # noqa: F401  registers the operator

    assert murmur3(bytes(4)) == 0x2362F9DE and murmur3(b"\x21\x43\x65\x87") == 0xF55B516B  # published vectors
    seeds, positions, columns = [0, 7, 2**40 + 3, 2**63 - 1], [0, 5, 1023, 2**31 - 1], [0, 1, 151_935]
    hashed = torch.ops.sgl_kernel.murmur_hash32_cpu(
        torch.tensor(seeds), torch.tensor(positions), torch.tensor(columns, dtype=torch.int32)
    )
    expected = [
        [
            murmur3(
                seed.to_bytes(8, "little") + position.to_bytes(4, "little") + column.to_bytes(4, "little")
            )
            for column in columns
        ]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert hashed.dtype == torch.uint32 and hashed.tolist() == expected


def test_token_pool_rows() -> None:
    import sgl_kernel

    req_to_token = torch.zeros(3, 5, dtype=torch.int32)
    rows, starts, ends = torch.tensor([2, 0]), torch.tensor([1, 0]), torch.tensor([3, 1])
    sgl_kernel.assign_req_to_token_pool_cpu(rows, req_to_token, starts, ends, torch.tensor([7, 8, 9]), 5)
    assert req_to_token.tolist() == [[9, 0, 0, 0, 0], [0] * 5, [0, 7, 8, 0, 0]]


def test_absent_kernels_fail_when_called() -> None:
    import sgl_kernel

    with pytest.raises(NotImplementedError, match="sgl_kernel.shared_expert_cpu has no stand-in"):
        sgl_kernel.shared_expert_cpu(1)
    with pytest.raises(AttributeError, match="flash_mla"):
        _ = sgl_kernel.flash_mla


def test_expert_parallel_shares_add_up() -> None:
    """Two ranks with two experts each give together what a loop over tokens and experts gives."""
    from megatron_vespo_cpu.swiglu_experts import local_experts_forward

    torch.manual_seed(0)
    x, w13, w2 = torch.randn(5, 4), torch.randn(4, 6, 4), torch.randn(4, 4, 3)
    weights, ids = torch.rand(5, 2), torch.tensor([[0, 3], [1, 2], [2, 3], [0, 1], [3, 0]])
    expected = torch.zeros(5, 4)
    for token in range(5):
        for slot in range(2):
            expert = ids[token, slot]
            gate, up = (w13[expert] @ x[token]).chunk(2)
            expected[token] += weights[token, slot] * (w2[expert] @ (gate * torch.sigmoid(gate) * up))
    shares = []
    for first in (0, 2):
        local = torch.where((ids >= first) & (ids < first + 2), ids - first, -1)
        shares.append(local_experts_forward(x, weights, local, w13[first : first + 2], w2[first : first + 2]))
    torch.testing.assert_close(shares[0] + shares[1], expected)
    assert not torch.allclose(shares[0], expected)


def test_environment_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_vespo_cpu import environment

    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "3", "PATH": "/bin"})
    environment.set_defaults()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["SGLANG_USE_CPU_ENGINE"] == "1" and os.environ["CUDA_VISIBLE_DEVICES"] == ""
    disabled = os.environ["SGLANG_DISABLED_MODEL_ARCHS"].split(",")
    assert {"llama4", "deepseek_v2", "qwen2_moe"} < set(disabled)
    assert not {"qwen3_moe", "qwen3", "llama"} & set(disabled)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for machines without CUDA")
def test_torch_cuda_stand_ins() -> None:
    """In a process of its own: torch must stay as it is in this one."""
    script = """
import os
os.environ["OMP_NUM_THREADS"] = "1"
import torch
from megatron_vespo_cpu import torch_cuda
torch_cuda.install()
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.empty(2, device=torch.device("cuda", 0), pin_memory=True).device.type == "cpu"
assert torch.ones(2, device=torch.cuda.current_device()).cuda().device.type == "cpu"
assert torch.ones(1, device="meta").is_meta
with torch.device("meta"):
    assert torch.empty(1).is_meta and torch.nn.Linear(2, 2).weight.is_meta
assert torch.ones(1).type() == "torch.cuda.FloatTensor"
assert torch.ones(1).type(torch.float64).dtype == torch.float64
torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
first = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(5)))
with torch.cuda.stream(torch.cuda.Stream()) as _:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    assert event.query() and torch.cuda.current_stream().record_event().query()
assert not torch.cuda.is_available() and torch.get_num_threads() == 1
print("all checked")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.stdout == "all checked\n", result.stderr


def test_replace_refuses_what_is_gone() -> None:
    from megatron_vespo_cpu.replace import replace

    module = ModuleType("made_up")
    module.present = 1
    assert replace(module, "present", 2) == 1 and module.present == 2
    with pytest.raises(AttributeError, match="absent"):
        replace(module, "absent", 2)
