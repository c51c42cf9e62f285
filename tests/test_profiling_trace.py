"""Times read from traces that are written by hand: on which every figure is known."""

import pytest

from videoattn.profiling import trace
from videoattn.profiling.categories import ATTENTION
from videoattn.profiling.scopes import ROOT, Scope

ATTN = Scope("transformer", "transformer.attn1", ATTENTION, "full")
LINEAR = Scope("transformer", "transformer.attn1.to_q", "linear", "full")
NORM = Scope("transformer", "transformer.norm", "normalisation")
REGION = Scope("transformer", "transformer.block", "compiled")
KNOWN = {trace.RANGE + scope.module: scope for scope in (ROOT, ATTN, LINEAR, NORM, REGION)}


def host(name, start, end, thread=1, category="cpu_op"):
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": thread, "ts": start, "dur": end - start}


def scope(of, start, end):
    return host(trace.RANGE + of.module, start, end)


def kernel(name, start, end, correlation, category="kernel"):
    args = {"correlation": correlation}
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": start, "dur": end - start, "args": args}


def launch(at, correlation, thread=1, category="cuda_runtime"):
    return host("cudaLaunchKernel", at, at + 0.5, thread, category) | {"args": {"correlation": correlation}}


def read(*events, device=False):
    return trace.read({"traceEvents": [scope(ROOT, 0, 1000), *events]}, KNOWN, device=device)


def times(recorded):
    """us by (module, operator), what is zero left out."""
    return {
        (module, operator): round(1e3 * spent.ms, 6)
        for (_, module, operator), spent in recorded.spent.items()
        if spent.ms > 1e-9
    }


def calls(recorded):
    return [(instance.scope.module, round(1e3 * instance.ms, 6)) for instance in recorded.instances]


def test_self_time_is_counted_once():
    recorded = read(
        scope(LINEAR, 100, 300),
        host("aten::linear", 120, 280),
        host("aten::addmm", 130, 270),
        host("aten::copy_", 140, 150),
        host("aten::add", 400, 450),
    )
    assert times(recorded) == {
        (LINEAR.module, "linear"): 160,
        (LINEAR.module, "host"): 40,
        ("pipeline", "elementwise"): 50,
        ("pipeline", "host"): 750,
    }
    assert recorded.wall_ms == recorded.busy_ms == 1
    assert recorded.spent[LINEAR.stage, LINEAR.module, "linear"].calls == 1


def test_a_pass_of_ours_before_attention_is_no_attention():
    recorded = read(
        scope(ATTN, 0, 100),
        host(trace.ATTEND + "triton_hopper", 10, 90, category="user_annotation"),
        launch(20, 1),
        launch(30, 2),
        kernel("_prepare", 40, 70, 1),
        kernel("forward", 70, 170, 2),
        device=True,
    )
    assert times(recorded) == {(ATTN.module, "prologue"): 30}
    assert calls(recorded) == [(ATTN.module, 100)]


def test_a_norm_written_out_in_small_operators():
    recorded = read(scope(NORM, 0, 90), host("aten::pow", 0, 30), host("aten::to", 30, 50), host("aten::mul", 50, 60))
    assert times(recorded)[NORM.module, "normalisation"] == 60


def test_operators_that_are_on_no_list_are_other():
    assert times(read(host("aten::never_heard_of", 0, 30)))["pipeline", "other"] == 30


def test_annotations_of_others_hide_nothing():
    recorded = read(
        host("ProfilerStep#2", 0, 100, category="user_annotation"),
        host("Torch-Compiled Region: 0/0", 0, 100),
        host("aten::conv3d", 10, 30),
    )
    assert times(recorded)["pipeline", "convolution"] == 20


def test_other_libraries_go_by_their_name():
    recorded = read(
        scope(ATTN, 0, 100),
        host("flash_attn::_flash_attn_forward", 10, 30),
        host("bitsandbytes::gemv_4bit", 30, 40),
        host("torchao::quantised_gemm", 40, 70),
    )
    assert calls(recorded) == [(ATTN.module, 20)]
    assert times(recorded)[ATTN.module, "linear"] == 30


def test_two_fused_calls_in_one_module_are_two():
    recorded = read(
        scope(ATTN, 0, 100),
        host("aten::scaled_dot_product_attention", 0, 30),
        host("aten::_scaled_dot_product_flash_attention_for_cpu", 5, 25),
        host("aten::transpose", 30, 40),
        host("aten::scaled_dot_product_attention", 40, 50),
    )
    assert calls(recorded) == [(ATTN.module, 30), (ATTN.module, 10)]
    assert times(recorded)[ATTN.module, "layout"] == 10


def test_products_and_softmax_of_an_unfused_module_are_one_call():
    once = [host("aten::baddbmm", 0, 30), host("aten::softmax", 30, 40), host("aten::bmm", 40, 60)]
    again = [event | {"ts": event["ts"] + 200} for event in once]
    recorded = read(scope(ATTN, 0, 100), *once, scope(ATTN, 200, 300), *again)
    assert calls(recorded) == [(ATTN.module, 60), (ATTN.module, 60)]


def test_a_call_of_the_runner_is_one_call():
    recorded = read(
        scope(ATTN, 0, 100),
        host(trace.ATTEND + "sdpa", 10, 60),
        host("aten::transpose", 10, 15),
        host("aten::scaled_dot_product_attention", 20, 50),
    )
    assert calls(recorded) == [(ATTN.module, 30)]
    assert times(recorded)[ATTN.module, "layout"] == 5


def test_code_of_a_compiled_region_is_fused():
    recorded = read(scope(REGION, 0, 100), host("aten::addmm", 20, 50))
    assert times(recorded)[REGION.module, "fused"] == 70
    assert times(recorded)[REGION.module, "linear"] == 30


def test_a_kernel_belongs_to_what_was_open_at_its_launch():
    recorded = read(
        scope(LINEAR, 100, 110),
        host("aten::linear", 101, 109),
        launch(105, 1),
        scope(NORM, 110, 120),
        host("aten::layer_norm", 111, 119),
        launch(115, 2),
        kernel("gemm", 200, 500, 1),
        kernel("norm", 500, 600, 2),
        device=True,
    )
    assert times(recorded) == {(LINEAR.module, "linear"): 300, (NORM.module, "normalisation"): 100}
    assert recorded.busy_ms == 0.4
    assert {place: round(1e3 * ms) for place, ms in recorded.idle.items() if ms} == {
        (LINEAR.stage, LINEAR.module): 200,
        (ROOT.stage, ROOT.module): 400,
    }


def test_overlapping_kernels_count_once():
    recorded = read(
        scope(LINEAR, 0, 10),
        host("aten::linear", 0, 9),
        launch(1, 1),
        launch(2, 2),
        kernel("gemm", 100, 300, 1),
        kernel("gemm", 200, 350, 2),
        device=True,
    )
    assert times(recorded) == {(LINEAR.module, "linear"): 250}
    assert recorded.busy_ms == 0.25 and recorded.overlap_ms == pytest.approx(0.1)


def test_a_kernel_without_an_operator_in_an_attention_module_is_its_attention():
    recorded = read(
        scope(ATTN, 0, 50),
        host(trace.ATTEND + "triton_hopper", 10, 20),
        launch(15, 1, category="cuda_driver"),
        scope(ATTN, 60, 70),
        launch(65, 2),
        kernel("forward", 100, 300, 1),
        kernel("somebody's", 300, 340, 2),
        device=True,
    )
    assert calls(recorded) == [(ATTN.module, 200), (ATTN.module, 40)]


def test_kernels_of_a_compiled_region_go_by_their_name():
    fused = "triton_poi_fused__scaled_dot_product_flash_attention_clone_3"  # what comes before it, not attention
    names = (fused, "nvjet_tst_128", "flash_fwd_kernel", "void at::native::elementwise_kernel<4>")
    recorded = read(
        scope(REGION, 0, 50),
        *(launch(index, index) for index in range(1, 5)),
        *(kernel(name, 100 * index, 100 * index + 50, index) for index, name in enumerate(names, 1)),
        device=True,
    )
    operators = ("fused", "linear", "elementwise")
    assert times(recorded) == {(REGION.module, operator): 50 for operator in operators}
    assert calls(recorded) == [(REGION.module, 50)]


def test_copies_between_host_and_device():
    recorded = read(
        host("aten::to", 0, 100),
        *(launch(index, index) for index in (1, 2, 3)),
        kernel("Memcpy HtoD (Pageable -> Device)", 100, 150, 1, "gpu_memcpy"),
        kernel("Memcpy DtoD (Device -> Device)", 150, 160, 2, "gpu_memcpy"),
        kernel("Memcpy DtoH (Device -> Pageable)", 160, 180, 3, "gpu_memcpy"),
        device=True,
    )
    assert times(recorded) == {("pipeline", "transfer"): 70, ("pipeline", "layout"): 10}


def test_work_that_no_range_surrounds_is_told():
    recorded = read(launch(5, 1, thread=9), kernel("gemm", 100, 200, 1), device=True)
    assert recorded.astray_ms == 0.1


def test_work_before_and_after_the_run_does_not_count():
    recorded = read(
        host("aten::add", -50, -10),
        launch(-20, 1),
        kernel("early", -15, -5, 1),
        launch(5, 2),
        kernel("late", 2000, 2100, 3),
        kernel("in time", 10, 20, 2),
        device=True,
    )
    assert recorded.kernels == 1 and recorded.busy_ms == 0.01


def test_traces_that_say_nothing_are_errors():
    with pytest.raises(ValueError, match="wanted a range 'va:pipeline', got none"):
        trace.read({"traceEvents": [host("aten::add", 0, 1)]}, KNOWN, device=False)
    with pytest.raises(ValueError, match="wanted GPU kernels, got none"):
        read(host("aten::add", 0, 1), device=True)
