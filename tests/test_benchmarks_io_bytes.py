"""ncu's output is read rightly, its refusals are told apart from our own faults, and the rows say what was measured."""

import contextlib
import stat

import pytest
import torch

from videoattn.benchmarks import attention, find_shapes, io_bytes, results, targets
from videoattn.kernels import sdpa
from videoattn.profiling import ceilings, io_model
from videoattn.profiling.profile import Ceilings

H100 = Ceilings(flops={"bfloat16": 8e14}, copy_bandwidth=3e12, l2_bytes=50 * 2**20, sm_count=132, sm_bytes=228 * 1024)
CPU = torch.device("cpu")
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
    '"dram__bytes_read.sum","dram__bytes_write.sum"\n'
)
UNITS = '"","","","","","","","","","","","byte","byte"\n'
# The layout of ncu --csv --page raw --print-units base; the figures are made up.
SAMPLE = (
    "==PROF== Connected to process 4242 (/usr/bin/python3.12)\n"
    '==PROF== Profiling "forward" - 0: 0%....50%....100% - 1 pass\n'
    '==PROF== Profiling "_forward" - 1: 0%....50%....100% - 1 pass\n'
    "==PROF== Disconnected from process 4242\n"
    + HEADER
    + UNITS
    + '"0","4242","python3.12","127.0.0.1","forward","1","7","(384, 1, 1)","(132, 1, 1)","0","9.0",'
    + '"982,345,216","311,402,496"\n'
    + '"1","4242","python3.12","127.0.0.1","_forward","1","7","(32, 1, 1)","(92160, 1, 1)","0","9.0",'
    + '"884,736,032","294,912.5"\n'
)
COUNTED = [(982345216, 311402496), (884736032, 294912)]


def test_the_csv_of_ncu():
    assert io_bytes.parse(SAMPLE) == COUNTED


def test_scaled_units():
    scaled = SAMPLE.replace(UNITS, UNITS.replace('"byte","byte"', '"Mbyte","Kbyte"'))
    scaled = scaled.replace("982,345,216", "982.345").replace("311,402,496", "311,402.5")
    assert io_bytes.parse(scaled)[0] == (982345000, 311402500)


@pytest.mark.parametrize("text", ["", "==ERROR== ERR_NVGPUCTRPERM - no permission\n", "cogvideox\n"])
def test_no_table_is_no_kernel(text):
    assert io_bytes.parse(text) == []


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ('"byte","byte"', '"byte","sector"', "dram__bytes_write.sum in one of byte, .*, got 'sector'"),
        ('"dram__bytes_read.sum"', '"dram__bytes.sum"', "dram__bytes_read.sum in one of byte, .*, got None"),
        ("982,345,216", "n/a", "a number of dram__bytes_read.sum of forward, got 'n/a'"),
    ],
)
def test_a_table_that_says_something_else(old, new, wanted):
    with pytest.raises(ValueError, match=wanted):
        io_bytes.parse(SAMPLE.replace(old, new))


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A program in the place of ncu: writes `log` to the log file it is told, says `said`, and leaves with `status`."""

    def install(log="", said="", status=0):
        (tmp_path / "log").write_text(log)
        program = tmp_path / "ncu"
        program.write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nwhile [ "$1" != --log-file ]; do shift; done\n'
            f"cp {tmp_path}/log \"$2\"\necho '{said}'\nexit {status}\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(io_bytes, "NCU", (str(program),))
        return tmp_path / "arguments"

    return install


def test_cases_get_the_kernels_in_their_order(ncu):
    arguments = ncu(SAMPLE, "first\nsecond")
    assert io_bytes.counted(["first", "second"]) == dict(zip(["first", "second"], COUNTED, strict=True))
    words = arguments.read_text()
    assert "--metrics dram__bytes_read.sum,dram__bytes_write.sum" in words and "--profile-from-start off" in words
    assert "--clock-control none" in words
    assert words.strip().endswith("-m videoattn.benchmarks.io_bytes --run first second")


def test_a_machine_that_gives_no_counters_refuses(ncu, monkeypatch):
    ncu(
        "==PROF== Connected to process 7\n==ERROR== ERR_NVGPUCTRPERM - The user does not have permission\n"
        "==ERROR== The application returned an error code (1).\n",
        status=1,
    )
    with pytest.raises(io_bytes.Refused, match="^ERR_NVGPUCTRPERM - The user does not have permission$"):
        io_bytes.counted(["first"])
    ncu(said="==ERROR== Failed to initialize the profiler: LibraryNotLoaded", status=1)
    with pytest.raises(io_bytes.Refused, match="LibraryNotLoaded"):
        io_bytes.counted(["first"])
    monkeypatch.setattr(io_bytes, "NCU", ("no-such-program",))
    with pytest.raises(io_bytes.Refused, match="not installed"):
        io_bytes.counted(["first"])


@pytest.mark.parametrize(
    ("log", "said", "wanted"),
    [
        ("==ERROR== The application returned an error code (1).\n", "CUDA out of memory", "got 0.*out of memory"),
        (SAMPLE, "", "wanted 1 kernels, got 2"),
    ],
)
def test_a_program_that_fails_is_no_refusal(ncu, log, said, wanted):
    ncu(log, said, status=1)
    with pytest.raises(ValueError, match=f"(?s){wanted}"):
        io_bytes.counted(["first"])


class Own:
    """SDPA, as a kernel of ours that says when it is called."""

    name, own = "triton_own", True

    def __init__(self, log):
        self.log = log

    def refuses(self, call, decision):
        return None

    def tile(self, call):
        from videoattn.kernels.triton_backend import Tile

        return Tile(128, 64, 4)

    def plan(self, call, decision, flag=None):
        run = sdpa.BACKENDS[0].plan(call, decision)

        def told(*args):
            self.log.append("call")
            return run(*args)

        return told


@pytest.fixture
def small(monkeypatch):
    """Two small cases on the CPU, one of them without a bar; returns what the kernel and the profiler were told."""
    pytest.importorskip("triton")
    log = []
    shape = find_shapes.square("full", 1, 2, 96, 16, "float32")
    cases = {"with": io_bytes.Case("triton_own", shape), "without": io_bytes.Case("triton_own", shape, bar=False)}
    monkeypatch.setattr(io_bytes, "CASES", cases)
    monkeypatch.setattr(io_bytes, "_gpu", lambda: CPU)
    for module in (io_bytes, io_model):
        monkeypatch.setattr(module, "backends", lambda: (Own(log),))
    monkeypatch.setattr(ceilings, "measure", lambda device, *dtypes: H100)
    return log


def test_ncu_sees_the_second_call_of_each_case(small, monkeypatch, capsys):
    @contextlib.contextmanager
    def profile():
        small.append("start")
        yield
        small.append("stop")

    monkeypatch.setattr(torch.cuda.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: small.append("wait"))
    assert io_bytes.main(["--run", "with", "without"]) == 0
    assert small == ["call", "wait", "start", "call", "wait", "stop"] * 2
    assert capsys.readouterr().out.split() == ["with", "without"]


def measured(tmp_path, *flags):
    assert io_bytes.main(["--results", str(tmp_path), "--commit", "abc", *flags]) == 0
    rows = results.read(tmp_path / "io_bytes.csv")
    return {(row["case"], row["metric"]): float(row["value"]) for row in rows}


def test_rows_of_counters(small, tmp_path, monkeypatch, capsys):
    q = 2 * 96 * 16 * 4
    monkeypatch.setattr(io_bytes, "counted", lambda names: dict.fromkeys(names, (3 * q, q + 100)))
    found = measured(tmp_path)
    assert found["with triton_own", "model_bytes"] == 4 * q
    assert found["with triton_own", "counter_bytes"] == 4 * q + 100
    assert found["with triton_own", "counter_bytes_read"] == 3 * q
    ratio = 4 * q / (4 * q + 100)
    assert found["with triton_own", "ratio"] == pytest.approx(ratio, rel=1e-4)
    assert found["with triton_own", "hbm_deviation"] == pytest.approx(1 - ratio, rel=1e-3)
    assert ("without triton_own", "ratio") in found and ("without triton_own", "hbm_deviation") not in found
    assert "no bar" in capsys.readouterr().out.splitlines()[-1]


def test_rows_where_counters_are_refused(small, tmp_path, capsys):
    found = measured(tmp_path, "--no-counters", "--only", "without")
    most = found["without triton_own", "time_x_copy_bandwidth_bytes"]
    assert found["without triton_own", "ratio_to_time_x_copy_bandwidth"] == pytest.approx(
        found["without triton_own", "model_bytes"] / most, rel=1e-3
    )
    assert most > 1e-6 * H100.copy_bandwidth and "call" in small  # it was timed
    assert {metric for _, metric in found}.isdisjoint({"counter_bytes", "ratio", "hbm_deviation"})
    assert "no counters (--no-counters): bytes are bounded by time" in capsys.readouterr().out


def test_the_bar_reads_these_rows():
    (target,) = [target for target in targets.read(results.HERE / "targets.toml") if target.id == "profile.io_model"]
    assert (target.csv, target.where["metric"], target.at_least) == ("io_bytes", "hbm_deviation", 0.15)
    assert sum(case.bar for case in io_bytes.CASES.values()) == 6
    assert {case.kernel for case in io_bytes.CASES.values() if case.bar} == {
        "triton_flash",
        "triton_hopper",
        "triton_temporal",
    }


@pytest.mark.parametrize("name", io_bytes.CASES)
def test_cases_are_what_they_are_said_to_be(name):
    """Far more bytes than L2 holds, and with a bar: all that is at work within half of it, so that each moves once."""
    pytest.importorskip("triton")
    case = io_bytes.CASES[name]
    call = attention.Problem(case.shape, CPU).call()
    trivial = io_model.trivial_bytes(call)
    assert trivial >= 15 * 60e6 and trivial < 4e9
    io = io_bytes.predicted(case, H100, CPU)
    lse = 4 * call.batch * call.heads * call.q_len * (case.kernel == "triton_hopper")
    assert (io.hbm_bytes == trivial + lse) is case.bar
    keys_and_values = 2 * call.kv_len * call.head_dim * call.dtype.itemsize
    assert keys_and_values < H100.l2_bytes  # of one head


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="io_bytes: wanted an NVIDIA GPU, got none"):
        io_bytes.main([])
