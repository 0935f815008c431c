"""The machine code inside the binary, read with cuobjdump: targets, and what kernels need of them.

Skipped only where the build has no CUDA. No GPU is needed.
"""

from __future__ import annotations

import functools
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import fastprune as fp

SHIPPED = ("sm_80", "sm_90", "sm_90a", "compute_90")
_inside: tuple[str, ...] = tuple(fp.build_info()["cuda_architectures"])
pytestmark = pytest.mark.skipif(not _inside, reason="a build without CUDA")


class Kernel(NamedTuple):
    """One kernel for one target, bytes per thread (``shared``: static, per block)."""

    name: str
    target: str
    registers: int
    stack: int
    local: int
    shared: int


def cuobjdump() -> str:
    """The program: on the path, in the toolkit, or from the package nvidia-cuda-cuobjdump."""
    folders = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    if nvcc := shutil.which("nvcc"):
        folders.append(str(Path(nvcc).resolve().parent))
    for entry in sys.path:
        folders += [str(path) for path in Path(entry).glob("nvidia/*/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    found = shutil.which("cuobjdump", path=path)
    assert found, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump"
    return found


def dump(*options: str) -> str:
    command = [cuobjdump(), *options, fp._C.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


_RESOURCES = re.compile(r"^\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) ")


def parse(text: str) -> list[Kernel]:
    """The kernels in the output of ``--dump-resource-usage``."""
    kernels, target, name = [], "", ""
    for line in text.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := _RESOURCES.match(line):
            registers, stack, shared, local = map(int, found.groups())
            kernels.append(Kernel(name, target, registers, stack, local, shared))
    return kernels


@functools.cache
def kernels() -> list[Kernel]:
    return parse(dump("--dump-resource-usage"))


def test_every_target_is_inside() -> None:
    elf = set(re.findall(r"\.(sm_\w+)\.cubin", dump("--list-elf")))
    ptx = set(re.findall(r"\.sm_(\w+)\.ptx", dump("--list-ptx")))
    assert elf == {target for target in _inside if target.startswith("sm_")}
    assert ptx == {target.removeprefix("compute_") for target in _inside if "compute" in target}
    # gpu-check builds for the GPU that is there only, and says so.
    if os.environ.get("FASTPRUNE_CUDA_ARCHS", ",".join(SHIPPED)) == ",".join(SHIPPED):
        assert set(_inside) == set(SHIPPED)


def test_every_kernel_is_there_for_every_target() -> None:
    names = {
        target: {
            re.sub(r"_[0-9a-f]{8}(?=_|\w)", "", k.name) for k in kernels() if k.target == target
        }
        for target in _inside
        if target.startswith("sm_")
    }
    first = next(iter(names.values()))
    assert first
    for target, found in names.items():
        assert len(found) == len(first), target


def test_no_kernel_touches_local_memory() -> None:
    """No stack frame, so no spilled register and no array that is indexed at run time."""
    bad = [k for k in kernels() if k.stack or k.local]
    assert not bad, "\n".join(map(str, bad))


def test_no_kernel_needs_more_than_a_block_has() -> None:
    for kernel in kernels():
        assert 0 < kernel.registers <= 255, kernel
        assert kernel.shared <= 48 << 10, kernel


def test_what_is_read_is_what_cuobjdump_prints() -> None:
    text = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function _Z4probev:
  REG:4 STACK:8 SHARED:16 LOCAL:24 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    assert parse(text) == [Kernel("_Z4probev", "sm_90a", 4, 8, 24, 16)]


def test_build_time_is_shared_out() -> None:
    """Two CUDA sources side by side, one beside another source; then a build after a change."""
    path = Path(__file__).resolve().parent.parent / "cmake/cuda_build_time.py"
    if not path.is_file():
        pytest.skip("sources are not beside the tests")
    shares = runpy.run_path(str(path))["shares"]
    cuda = "CMakeFiles/fastprune_cuda_kernels.dir/csrc/kernels/cuda/"
    log = f"""# ninja log v7
0\t1000\t1\t{cuda}a.cu.o\tx
0\t3000\t1\t{cuda}b.cu.o\tx
1000\t5000\t1\tCMakeFiles/other.cpp.o\tx
"""
    assert shares(log) == {f"{cuda}a.cu.o": 0.5, f"{cuda}b.cu.o": 1.5}
    assert shares(f"{log}10\t2010\t1\t{cuda}a.cu.o\ty\n")[f"{cuda}a.cu.o"] == 2.0
