"""The command gpu-check without a GPU: its stages, its arithmetic, its clock on a mock device."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import fastprune

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "bench/cuda").is_dir():
    pytest.skip("sources are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from bench.cuda import clock  # noqa: E402
from bench.cuda.__main__ import SECTIONS  # noqa: E402

from fastprune.cli import gpu_check, gpu_check_build, gpu_check_stages, main  # noqa: E402
from fastprune.cli.gpu_check_analysis import analyse, losses, rules, sampled  # noqa: E402
from fastprune.cli.gpu_check_build import build  # noqa: E402

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@needs_no_gpu
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-check", "--out", str(tmp_path / "out"), "--source", str(ROOT)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no GPU: torch sees no CUDA device" in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stages", "build,rest"], "unknown rest; known: build"),
        (["--seconds", "0"], "--seconds"),
        (["--source", "/dev"], "not fastprune's source tree"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu-check", "--source", str(ROOT), *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_dry_run_measures_every_section(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    arguments = ["--dry-run", "--stages", "bench", "--out", str(out), "--source", str(ROOT)]
    assert main(["gpu-check", *arguments]) == 0, (out / "gpu-check.md").read_text()
    document = json.loads((out / "gpu-check.json").read_text())
    assert document["dry_run"]
    assert document["stages"]["tests"]["status"] == "left out"
    stage = document["stages"]["bench"]
    assert stage["status"] == "ok"
    assert {name for name, s in stage["sections"].items() if s["error"] is None} == set(SECTIONS)
    assert {row["section"] for row in stage["rows"]} == set(SECTIONS)
    assert len(stage["rows"]) > 80
    for row in stage["rows"]:
        assert "error" not in row, row
        assert "wrong" not in row, row
        assert not row["aims"], "a dry run promises nothing"
        assert row["ours"] in row["times"], row
    assert document["dispatch"]
    assert len(document["sampled"]) == 1
    text = (out / "gpu-check.md").read_text()
    printed = capsys.readouterr().out
    for shown in (text, printed):
        assert "DRY RUN" in shown
        assert "Strict float32" in shown
        assert "Fastest form" in shown
        assert "better sampled up to" in shown
    assert "bench/results" not in printed


def test_sanitizer_script_tries_itself() -> None:
    environment = {**os.environ, "FASTPRUNE_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / gpu_check_stages.SANITIZED)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "selection: " in done.stdout


PYTHON = sys.executable


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!{PYTHON}\n{body}")
    path.chmod(0o755)
    return path


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    body = """
import signal, subprocess, sys, time
print("begun", flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    program = script(tmp_path / "hang", body)
    process = gpu_check_stages.Process([str(program)], tmp_path / "log", tmp_path, {})
    patience = time.monotonic() + 60
    while (tmp_path / "log").read_text().count("\n") < 2 and time.monotonic() < patience:
        time.sleep(0.05)
    began = time.monotonic()
    run = process.finish(began + 0.1)
    assert run["status"] == "out of time"
    assert time.monotonic() - began < 30
    child = int(run["text"].splitlines()[1])
    time.sleep(0.5)
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        state = Path(f"/proc/{child}/stat").read_text().split()[2] if child else ""
        assert state in ("Z", "X")
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("== 3 failed, 120 passed, 2 skipped in 10.02s ==", [3, 120, 2]),
        ("5 passed in 0.10s", [0, 5, 0]),
        ("== 1 failed, 4 passed, 1 warning, 2 errors in 61.00s (0:01:01) ==", [1, 4, 0]),
        ("nothing", [0, 0, 0]),
    ],
)
def test_counts_of_tests(text: str, expected: list[int]) -> None:
    found = gpu_check_stages.counts(f"first line\n{text}\n")
    assert [found.get(word, 0) for word in ("failed", "passed", "skipped")] == expected


SANITIZER = """
import sys
tool = sys.argv[sys.argv.index("--tool") + 1]
filtered = "--kernel-regex" in sys.argv
assert filtered == (tool != "initcheck"), "initcheck has to see every kernel's writes"
if tool == "racecheck":
    print("========= Error: Race reported between Write access and Read access")
    print("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)")
    sys.exit(77)
if tool == "synccheck":
    print("Unknown option")
    sys.exit(1)
print("========= ERROR SUMMARY: 0 errors")
"""


def test_sanitizers_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(tmp_path / "compute-sanitizer", SANITIZER)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = gpu_check_stages.sanitizer(ROOT, tmp_path, {}, time.monotonic() + 60, dry=False)
    runs = result["runs"]
    assert result["status"] == "failed"
    assert runs["memcheck"]["status"] == runs["initcheck"]["status"] == "ok"
    assert runs["memcheck"]["summary"] == ["ERROR SUMMARY: 0 errors"]
    assert runs["racecheck"]["status"] == "failed"
    assert "Race reported" in runs["racecheck"]["found"][0]
    assert runs["synccheck"]["tail"] == ["Unknown option"]


def fake_bench(path: Path, body: str) -> Path:
    """A source tree whose ``python -m bench.cuda`` is ``body``."""
    (path / "bench/cuda").mkdir(parents=True)
    (path / "bench/__init__.py").touch()
    (path / "bench/cuda/__init__.py").touch()
    (path / "bench/cuda/__main__.py").write_text(body)
    return path


CRASHING = """
import json, os, sys
out = open(sys.argv[sys.argv.index("--out") + 1], "a")
given = sys.argv[sys.argv.index("--seconds") + 2:]
chosen = given or ["one", "two", "three"]
def emit(line):
    out.write(json.dumps(line) + "\\n")
    out.flush()
emit({"sections": chosen})
for name in chosen:
    emit({"begin": name})
    emit({"section": name, "case": "c", "times": {}, "ours": "x"})
    if name == "two":
        print("illegal memory access", flush=True)
        os._exit(3)
    emit({"end": name, "error": None, "seconds": 1.0})
"""


def test_a_section_that_ends_the_process_is_left_out(tmp_path: Path) -> None:
    source = fake_bench(tmp_path / "source", CRASHING)
    result = gpu_check_stages.bench(source, tmp_path, {}, time.monotonic() + 60, dry=False)
    assert result["status"] == "failed"
    assert [run["status"] for run in result["runs"]] == ["failed", "ok"]
    errors = {name: section["error"] for name, section in result["sections"].items()}
    assert errors["one"] is None
    assert errors["three"] is None
    assert "illegal memory access" in errors["two"]
    assert [row["section"] for row in result["rows"]] == ["one", "two", "three"]


def timed(**medians: float) -> dict[str, Any]:
    return {
        n: {"median": m, "low": m, "high": m, "runs": 5, "how": "graph"} for n, m in medians.items()
    }


def test_speedups_rooflines_and_aims() -> None:
    copy = {"section": "roofline", "case": "copy", "times": timed(copy=1.0), "ours": "copy"}
    rate = {"section": "roofline", "case": "mm", "times": timed(dense=2.0), "ours": "dense"}
    row = {
        "section": "batch_1",
        "case": "w",
        "sparsity": 0.9,
        "dtype": "bfloat16",
        "times": {**timed(fastprune=2.0, dense=5.0), "dense channels_last": timed(t=4.0)["t"]},
        "ours": "fastprune",
        "bytes": 100.0,
        "flops": 10.0,
        "rate": "bfloat16",
        "aims": [
            {"over": "dense", "at_least": 2.0},
            {"over": "dense", "at_least": 2.1},
            {"over": "torch CSR", "at_least": 2.0},
            {"at_most_seconds": 1.9},
            {"at_most_floor": 2.0},
        ],
    }
    slow = {**row, "times": timed(fastprune=5.0, dense=4.0), "aims": []}
    rows = [copy | {"bytes": 100.0}, rate | {"flops": 20.0, "rate": "bfloat16"}, row, slow]
    done = analyse(rows, claims=True)
    assert done[2]["over_dense"] == 2.0
    assert done[2]["speedup"] == {"dense": 2.5, "dense channels_last": 2.0}
    assert done[2]["roofline"] == 0.5
    assert done[2]["gbytes_per_second"] == pytest.approx(50e-9)
    assert [aim["met"] for aim in done[2]["aims"]] == [True, False, None, False, True]
    assert losses(done) == ["0.80x: batch_1, w, 90 %, bfloat16"]
    assert all(not row["aims"] and "roofline" not in row for row in analyse(rows, claims=False))
    text = "\n".join(
        table.markdown()
        for table in gpu_check.gpu_check_report.tables(
            {"stages": {"bench": {"status": "ok", "rows": done}}, "dry_run": False}
        )
    )
    assert "| w | 90 % | bfloat16 | 2.1x over dense | 2.00x | NO |" in text
    assert "Slower than the best dense form: 1 rows" in text


def test_winners_become_a_dispatch_table() -> None:
    won = {
        1: {0.1: "deltas", 0.4: "bitmap", 0.5: "bitmap"},
        2: {0.1: "deltas", 0.4: "bitmap", 0.5: "bitmap"},
        8: {0.1: "bitmap", 0.4: "bitmap", 0.5: "dense"},
        64: {0.1: "dense", 0.4: "dense", 0.5: "dense"},
    }
    rows = [
        {"section": "forms", "dtype": "bfloat16", "tf32": False}
        | {"batch": batch, "density": density, "winner": form}
        for batch, forms in won.items()
        for density, form in forms.items()
    ]
    table = rules(rows)
    assert [tuple(rule.values()) for rule in table] == [
        ("half", 2, 0.2, "deltas"),
        ("half", 2, 1.0, "bitmap"),
        ("half", 8, 0.447, "bitmap"),
        ("half", 8, 1.0, "dense"),
        ("half", None, 1.0, "dense"),
    ]
    for row in rows:  # and it decides as was measured
        chosen = next(
            rule["form"]
            for rule in table
            if row["density"] <= rule["density"] and row["batch"] <= (rule["batch"] or math.inf)
        )
        assert chosen == row["winner"], row


def test_weight_gradients_become_a_threshold() -> None:
    def measured(case: str, **won: str) -> list[dict[str, object]]:
        facts = {"section": "weight_gradients", "case": case}
        densities = {"low": 0.05, "middle": 0.1, "high": 0.4}
        return [facts | {"density": densities[at], "winner": w} for at, w in won.items()]

    rows = [
        *measured("large", high="dense", low="sampled", middle="sampled"),
        *measured("always", low="sampled", high="sampled"),
        *measured("never", low="dense", high="sampled"),
        {"section": "weight_gradients", "case": "failed", "density": 0.1},
    ]
    assert sampled(rows) == [
        {"case": "large", "density": 0.2},
        {"case": "always", "density": 1.0},
        {"case": "never", "density": 0.0},
    ]


@pytest.mark.parametrize("good", [True, False])
def test_a_run_on_a_gpu(
    good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command around its stages, as after ``make gpu-check`` has built."""
    properties = SimpleNamespace(major=9, minor=0, total_memory=1 << 37, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(fastprune, "__file__", str(tmp_path / "site/fastprune/__init__.py"))
    (tmp_path / "site/fastprune").mkdir(parents=True)
    built = {"status": "ok", "seconds": 100.0, "targets": ["sm_90", "sm_90a"]}
    (tmp_path / "build.json").write_text(json.dumps(built))
    seen = {}

    def tests(_s: Path, _o: Path, environment: dict[str, str], deadline: float, dry: bool) -> Any:
        seen["tests"] = environment, deadline - time.monotonic(), dry
        failures = [] if good else ["FAILED tests/test_x.py::test_y - assert 1 == 2"]
        run = {"status": "ok" if good else "failed", "counts": {"passed": 7}, "failures": failures}
        return {"status": run["status"], "runs": {"gpu": run}}

    def broken(*_: Any) -> Any:
        raise OSError("no room")

    def bench(*_: Any) -> Any:
        row = {"section": "batch_1", "case": "w", "sparsity": 0.9, "dtype": "bfloat16"}
        row |= {"times": timed(fastprune=2.0, dense=9.0), "ours": "fastprune"}
        row["aims"] = [{"over": "dense", "at_least": 4.5}]
        return {"status": "ok", "rows": [row], "sections": {}, "runs": []}

    monkeypatch.setattr(gpu_check_stages, "tests", tests)
    monkeypatch.setattr(gpu_check_stages, "bench", bench)
    monkeypatch.setattr(gpu_check_stages, "sanitizer", bench if good else broken)
    arguments = ["gpu-check", "--out", str(tmp_path), "--source", str(ROOT)]
    assert main(arguments) == (0 if good else 1)
    environment, limit, dry = seen["tests"]
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path / "site")
    assert environment["FASTPRUNE_CUDA_ARCHS"] == "sm_90,sm_90a"
    assert 0 < limit <= 135
    assert not dry
    document = json.loads((tmp_path / "gpu-check.json").read_text())
    assert document["stages"]["build"] == built
    assert document["seconds"] >= 100
    assert document["machine"]["gpu"] == "NVIDIA H200"
    assert document["stages"]["bench"]["rows"][0]["aims"][0]["met"] is True
    assert document["stages"]["bench"]["rows"][0]["over_dense"] == 4.5
    printed = capsys.readouterr().out
    assert "bench/results/gpu-h200-" in printed
    for text in (printed, (tmp_path / "gpu-check.md").read_text()):
        assert ("no room" in text) == (not good)
        assert ("FAILED tests/test_x.py" in text) == (not good)
        assert "4.50x" in text


def test_build_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself is another test's business: what is asked of it, its failure, its limit."""
    said = tmp_path / "arguments.json"
    body = f"import json, sys, time; json.dump(sys.argv, open({str(said)!r}, 'w')); "
    program = script(tmp_path / "python", body + "print('why'); sys.exit(1)")
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(gpu_check_build, "capability", lambda: "9.0")
    result = build(ROOT, tmp_path / "out", 30.0)
    assert result["status"] == "failed"
    assert result["tail"] == ["why"]
    assert json.loads((tmp_path / "out/build.json").read_text()) == result
    arguments = json.loads(said.read_text())
    assert {"--no-index", "--no-build-isolation", "--no-deps"} <= set(arguments)
    assert "--config-settings=cmake.define.FASTPRUNE_CUDA_ARCHS=sm_90;sm_90a" in arguments
    script(tmp_path / "python", body + "time.sleep(60)")
    assert build(ROOT, tmp_path / "out", 1.0)["status"] == "out of time"


class FakeCuda:
    """As much of ``torch.cuda`` as the clock uses; an operation takes ``seconds``."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing: list[Callable[[], None]] | None = None
        self.lost = False
        cuda = self

        class Stream:
            def __init__(self, *_: Any) -> None: ...
            def wait_stream(self, _: Any) -> None: ...
            def synchronize(self) -> None: ...

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = cuda.now

            def elapsed_time(self, other: Any) -> float:
                return 1e3 * (other.at - self.at)

        class CUDAGraph:
            def capture_begin(self) -> None:
                cuda.capturing = []

            def capture_end(self) -> None:
                assert cuda.capturing is not None
                self.recorded, cuda.capturing = cuda.capturing, None

            def replay(self) -> None:
                for operation in self.recorded:
                    operation()

        self.Stream, self.Event, self.CUDAGraph = Stream, Event, CUDAGraph

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, _: Any) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1 << 20)

    def current_stream(self, _: Any = None) -> Any:
        return self.Stream()

    @contextlib.contextmanager
    def stream(self, _: Any) -> Iterator[None]:
        yield

    def synchronize(self, _: Any = None) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def empty_cache(self) -> None: ...

    def _sleep(self, cycles: int) -> None:
        self.now += cycles * 1e-9

    def operation(self, seconds: float, log: list[int], copy: int = 0) -> Callable[[], None]:
        def work() -> None:
            self.now += seconds
            log.append(copy)

        def call() -> None:
            if self.capturing is not None:
                self.capturing.append(work)
            else:
                work()

        return call


class FakeTorch:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def empty(self, *shape: Any, device: Any, **more: Any) -> torch.Tensor:
        assert device.type == "cuda"
        return torch.empty(*shape, **more)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(clock, "torch", FakeTorch(fake))
    return fake


def test_clock_times_calls_in_a_graph_over_copies(cuda: FakeCuda) -> None:
    watch = clock.CudaClock()
    assert watch.copies(1e9) == 2
    assert watch.copies(1 << 20) == 3
    assert watch.copies(10) == 24
    log: list[int] = []
    calls = [cuda.operation(2e-6, log, copy) for copy in range(3)]
    done, failed = watch.measure({"a": calls, "b": [cuda.operation(5e-6, [])]}, 0.001)
    assert not failed
    assert done["a"].how == "graph"
    assert done["a"].timing.median == pytest.approx(2e-6)
    assert done["b"].timing.median == pytest.approx(5e-6)
    assert done["a"].timing.runs >= 5
    assert log[:12] == [0, 1, 2] * 4, "a graph goes round the copies"


def test_clock_launches_what_cannot_be_captured(cuda: FakeCuda) -> None:
    watch = clock.CudaClock()
    work = cuda.operation(3e-6, [])

    def waits() -> None:
        if cuda.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        work()

    def broken() -> None:
        raise NotImplementedError("not for\nthis dtype")

    done, failed = watch.measure(
        {"waits": [waits, waits], "asked": [work], "broken": [broken]}, 0.001, launched=("asked",)
    )
    assert {name: one.how for name, one in done.items()} == {
        "waits": "launched",
        "asked": "launched",
    }
    assert done["waits"].timing.median == pytest.approx(3e-6)
    assert failed == {"broken": "NotImplementedError: not for this dtype"}


def test_clock_says_when_the_device_is_lost(cuda: FakeCuda) -> None:
    watch = clock.CudaClock()

    def fault() -> None:
        cuda.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(clock.LostDeviceError, match="illegal memory access"):
        watch.measure({"fault": [fault], "other": [cuda.operation(1e-6, [])]}, 0.001)
