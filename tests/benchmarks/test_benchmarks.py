"""The harness of the benchmarks: what it counts, gates, writes and draws. No test is timed."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, harness, names, plots, report, results, timers
from benchmarks.cases import Case, Effort, Head
from benchmarks.harness import CaseRun, Run, relative_error, work_of
from benchmarks.levels import Inputs, draw, least, truth
from benchmarks.memory import allocations, peak_bytes
from benchmarks.names import HIDDEN, LOGITS, LOGPROBS, MAPO
from benchmarks.providers import OURS, PLAIN, PROVIDERS, Provider
from benchmarks.roofs import Roofs
from benchmarks.timers import Samples
from mapo_kernels import config, files
from mapo_kernels.__main__ import main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
ONCE = Effort(0.0, least=2, most=2)
HEAD = Head("tiny", width=8, vocab=50)
BATCH = {"n_sequences": 16, "length": 4, "group_size": 8, "padding": 0.5, "no_signal": 0.3}


def by_the_wall(work, effort):
    """Stands in for a library's timer."""
    samples = []
    for _ in range(effort.least):
        began = time.perf_counter()
        work()
        samples.append((time.perf_counter() - began) * 1e3)
    return Samples(samples, "wall")


@pytest.fixture(scope="module")
def roofs():
    return Roofs(CPU, ONCE, tiny=True)


def tiny_cases(suite, on_gpu):
    return [
        Case(MAPO, 64),
        Case(names.GRPO, 64),
        Case(LOGPROBS, **BATCH),
        Case(LOGITS, **BATCH, head=HEAD),
        Case(names.SCORING, **BATCH, head=HEAD),
        Case(HIDDEN, **BATCH, head=HEAD),
        Case(HIDDEN, **BATCH, head=HEAD, sweep="live"),
        Case(names.KEPT, **BATCH, head=HEAD),
        Case(names.KEPT, **BATCH, head=HEAD, sweep="kept", kept=4),
        Case(names.KEPT, **BATCH, head=HEAD, sweep="common", common=True),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of tiny cases of every level, and the files that it wrote on the way."""
    patch = pytest.MonkeyPatch()
    patch.setattr(harness, "cases_of", tiny_cases)
    patch.setitem(harness.EFFORTS, "quick", ONCE)
    patch.setattr(harness, "Roofs", lambda device, effort, tiny: Roofs(CPU, ONCE, tiny=True))
    patch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path_factory.mktemp("run") / "x.json"
    try:
        run = Run(path, results.About("quick", notes="a test"))
        written = [results.read(path)]
        for item in run.items:
            run.measure(*item, by_the_wall)
            written.append(results.read(path))
        return run, written
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def found(run):
    return run[0].file.found


def hand_counted(level, dtype=torch.float32):
    """4 sequences of 5 tokens, a head of 3 x 7; half of the positions alive."""
    return least(Case(level, 4, 5, 2, head=Head("x", 3, 7), dtype=dtype), 0.5)


def test_counted_bytes_and_flops_by_hand():
    # A reward read, an advantage written.
    assert least(Case(MAPO, 1024), 1.0) == (1024 * (4 + 4), 0)
    # 20 mask bytes; 10 live tokens' new and old log-probs; 20 gradients.
    assert hand_counted("log-probs") == (20 + 10 * 8 + 20 * 4, 0)
    # 10 live rows of 7 read; 24 rows (each sequence has one position more) written.
    assert hand_counted("logits") == (10 * 7 * 4 + 24 * 7 * 4, 0)
    assert hand_counted("logits", torch.bfloat16) == (10 * 7 * 2 + 24 * 7 * 2, 0)
    assert hand_counted("scoring-logits", torch.bfloat16) == (20 * 7 * 2, 0)
    # 10 live rows of 3, a weight of 7 x 3; gradients of all 20 rows and of the weight.
    moved = (10 + 7) * 3 * 4 + (20 + 7) * 3 * 4
    assert hand_counted("hidden-states") == (moved, 6 * 10 * 3 * 7)


def test_the_roof_that_binds_is_the_slowest():
    roofs = Roofs.__new__(Roofs)
    roofs.found = {"copy_gigabytes_per_second": 1.0, "launch_microseconds": 10.0}
    roofs.products = {"8 x 50 float32": 1.0}
    case = Case(LOGITS, 1, head=HEAD)
    small = roofs.compare(case, 1000, 0, 0.02)
    assert small["roof"] == "launch" and math.isclose(small["percent_of_roof"], 50)
    wide = roofs.compare(case, 10**9, 10**9, 4000)
    assert wide["roof"] == "copy" and math.isclose(wide["percent_of_roof"], 25)
    deep = roofs.compare(case, 1000, 10**12, 2000)
    assert deep["roof"] == "products" and math.isclose(deep["percent_of_roof"], 50)
    assert (deep["bytes"], deep["flops"]) == (1000, 10**12)


def test_peak_memory_by_hand():
    """A sum of 4 kB lives on, what is added up on the way does not."""
    x = torch.zeros(1000)
    assert 8000 <= peak_bytes(lambda: [x + 1, (x * 2).sum()], CPU) < 9000
    with allocations() as found:
        kept = x + 1
    assert found.now == kept.nbytes <= found.peak < kept.nbytes + 100  # and the number itself


@pytest.mark.parametrize("padding", [0.4, 0.5, 0.6])
@pytest.mark.parametrize("no_signal", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("group_size", [8, 12, 16])
def test_batches_have_their_padding_and_silent_groups(padding, no_signal, group_size):
    case = Case(LOGPROBS, 20 * group_size, 1024, group_size, padding, no_signal)
    generator = torch.Generator().manual_seed(0)
    lengths = cases.answer_lengths(case, generator)
    assert lengths.min() >= 1 and lengths.max() <= 1024
    assert abs(1 - float(lengths.double().mean()) / 1024 - padding) < 0.01
    # Different lengths, and none of them sorted.
    assert len(lengths.unique()) > 20 and not bool((lengths.diff() >= 0).all())
    groups = cases.draw_rewards(case, generator).view(20, group_size)
    silent = (groups == groups[:, :1]).all(1)
    assert int(silent.sum()) == round(20 * no_signal)


@pytest.mark.parametrize("level", ["log-probs", "logits", "hidden-states"])
def test_truth_is_the_gradient_of_the_whole_batch(level):
    head = cases.NO_HEAD if level == LOGPROBS else HEAD
    case = Case(level, **BATCH, head=head)
    inputs = draw(case, CPU)
    exact = inputs._replace(leaves=tuple(x.double() for x in inputs.leaves))
    whole = work_of(PROVIDERS[level][PLAIN].call, [exact], "both")()
    assert relative_error(whole, truth(case, inputs)) < 1e-6


def test_relative_error_sees_what_is_off():
    exact = [torch.arange(1.0, 5.0), torch.ones(3)]
    assert relative_error([x.clone() for x in exact], exact) == 0
    assert math.isclose(relative_error([exact[0], exact[1] * 1.5], exact), 0.5)
    assert math.isnan(relative_error([exact[0] * float("nan"), exact[1]], exact))
    assert math.isnan(relative_error([exact[0], exact[1] / 0 * 0], exact))
    assert math.isnan(relative_error([exact[0][:2], exact[1]], exact))
    assert relative_error([torch.ones(2)], [torch.zeros(2)]) > 1


def measured(provider, roofs, leaf=None, timer=by_the_wall):
    """The row of a provider of the loss sum(x^2), whose gradient is 2x."""
    leaf = torch.linspace(1, 2, 1000) if leaf is None else leaf
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROVIDERS[LOGITS], "x", provider)
        patch.setattr(harness, "draw", lambda case, device: Inputs((leaf,), SimpleNamespace()))
        patch.setattr(harness, "truth", lambda case, inputs: [2 * inputs.leaves[0].double()])
        run = CaseRun(Case(LOGITS, 10, 100, head=HEAD), roofs)
        return run.measure("x", timer)


def test_a_right_provider_is_timed(roofs):
    row = measured(Provider(lambda x, rest: (x * x).sum()), roofs)
    assert row["status"] == "ok" and row["direction"] == "both"
    assert len(row["samples_ms"]) == 2
    assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert row["error"] < 1e-6 and row["peak_bytes"] >= 4000


@pytest.fixture
def triton_timers(monkeypatch):
    """Triton's timers as far as a CPU has them: they call, as Triton does."""
    testing = pytest.importorskip("triton.testing")
    calls = []

    def do_bench(fn, warmup, rep, return_mode):
        assert return_mode == "all"
        calls.append(("do_bench", rep))
        for _ in range(5):  # an estimate, a warm-up, two samples
            fn()
        return [do_bench.launched] * 2 if len(calls) == 1 else [3.0, 5.0]

    def do_bench_cudagraph(fn, rep, return_mode):
        assert return_mode == "all"
        calls.append(("graph", rep))
        fn()
        return [0.01] * 10

    do_bench.launched = 0.2
    monkeypatch.setattr(testing, "do_bench", do_bench)
    monkeypatch.setattr(testing, "do_bench_cudagraph", do_bench_cudagraph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return do_bench, calls


@pytest.mark.parametrize("kind", ["short", "long", "waits"])
def test_short_work_that_never_waits_is_replayed_as_a_graph(triton_timers, kind):
    do_bench, calls = triton_timers
    do_bench.launched = 200.0 if kind == "long" else 0.2
    guarded = []

    def work():
        # As a call that waits for the device does where waiting is an error.
        if kind == "waits" and guarded:
            raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: guarded.append(mode) or (
            guarded.clear() if mode == 0 else None
        ))  # fmt: skip
        found = timers.on_gpu(work, Effort(0.2, least=5))
    if kind == "short":
        assert found == Samples([0.01] * 10, "graph", 0.2)
        assert calls == [("do_bench", 10), ("graph", timers.GRAPH_MS)]
    else:
        assert found == Samples([3.0, 5.0], "events")
        # At least five samples of what takes long.
        assert calls == [("do_bench", 10), ("do_bench", 1000.0 if kind == "long" else 200.0)]


def test_a_gpu_row_is_replayed(triton_timers, roofs):
    row = measured(Provider(lambda x, rest: (x * x).sum()), roofs, timer=timers.on_gpu)
    assert row["status"] == "ok" and row["median_ms"] == 0.01
    assert (row["timer"], row["launched_ms"]) == ("graph", 0.2)


@pytest.mark.parametrize(
    ("function", "status", "reason"),
    [
        (lambda x, rest: (x * x).sum() * 1.01, "wrong", "off"),
        (lambda x, rest: (x * x).sum() * float("nan"), "wrong", "off"),
        (lambda x, rest: undefined(x), "failed", "NameError"),  # noqa: F821
    ],
)
def test_a_wrong_provider_is_never_fast(roofs, function, status, reason):
    row = measured(Provider(function), roofs)
    assert row["status"] == status and reason in row["reason"]
    assert "median_ms" not in row and "samples_ms" not in row


def test_what_cannot_be_measured_is_a_line(roofs):
    right = {"call": lambda x, rest: (x * x).sum()}
    for provider, reason in (
        (Provider(**right, package="surely_not_installed"), "not installed"),
        (Provider(**right, needs_gpu=True), "needs a GPU"),
    ):
        row = measured(provider, roofs)
        assert row["status"] == "unavailable" and reason in row["reason"]
    capped = Case(HIDDEN, 8, head=cases.GEMMA)
    assert "no cap" in Provider(**right, softcap=False).unavailable(capped, CPU)
    assert "minutes" in Provider(**right, loops=True).unavailable(Case(MAPO, 1 << 18), CPU)


def test_what_is_compared_is_not_what_a_provider_has_written_over(roofs):
    leaf = torch.linspace(1, 2, 1000)
    seen = []

    class Destroys(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(float(x.detach().sum()))
            ctx.save_for_backward(x.detach().clone())
            x.detach().zero_()
            return x.new_ones(())

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0]

    provider = Provider(lambda x, rest: Destroys.apply(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "MAX_SETS", 1)
        row = measured(provider, roofs, leaf)
    assert row["status"] == "ok"
    # Compared, then timed on a copy.
    assert seen[0] > 0 and seen[1] > 0 and set(seen[2:]) == {0.0}
    assert torch.equal(leaf, torch.linspace(1, 2, 1000))


def test_inputs_take_turns_beyond_the_cache(roofs, monkeypatch):
    monkeypatch.setattr(harness, "cache_bytes", lambda device: 1 << 20)
    small = CaseRun(Case(MAPO, 64), roofs)
    assert len(small.copies) == harness.MAX_SETS
    large = CaseRun(Case(MAPO, (1 << 20) // 4), roofs)
    pointers = [x.leaves[0].data_ptr() for x in (large.inputs, *large.copies)]
    assert len(set(pointers)) == len(pointers) == 3
    work = large.work(lambda rewards, rest: rewards)
    assert [work()[0].data_ptr() for _ in range(3)] == [pointers[i] for i in (1, 2, 1)]


def test_what_is_timed_in_place_has_the_same_work_every_time(roofs):
    run = CaseRun(Case(LOGITS, **BATCH, head=HEAD), roofs)
    run.copies = run.copies[:1]
    rest = run.copies[0].rest
    live = rest.padded[2].bool() & (rest.advantages != 0)[:, None]
    work = run.work(PROVIDERS[LOGITS][f"{OURS} in place"].call)
    for _ in range(3):
        (grad,) = work()
        assert torch.equal((grad != 0).any(-1), live)


def test_a_run_that_is_killed_keeps_every_finished_row(run):
    whole, written = run
    assert [len(found["rows"]) for found in written] == list(range(len(whole.items) + 1))
    assert [found["finished"] for found in written] == [False] * len(whole.items) + [True]
    for found in written[:-1]:
        assert "rows are missing" in report.markdown(found)
    assert "rows are missing" not in report.markdown(written[-1])


def test_a_run_has_every_level_and_every_provider(found):
    assert {row["level"] for row in found["rows"]} == set(PROVIDERS)
    for name, providers in PROVIDERS.items():
        rows = [row for row in found["rows"] if row["level"] == name]
        # Compiling would take longer than the quick suite.
        quick = {name for name, provider in providers.items() if not provider.compiles}
        assert {row["provider"] for row in rows} == quick
        ours = [row for row in rows if row["provider"].startswith(OURS)]
        assert {row["status"] for row in ours} == {"ok"}
    assert {"torch", "triton", "python"} <= set(found["environment"]["versions"])


def test_rows_without_a_time_are_refused(found, tmp_path):
    broken = json.loads(json.dumps(found))
    row = next(row for row in broken["rows"] if row["status"] == "ok")
    del row["median_ms"]
    results.write(broken, tmp_path / "x.json")
    with pytest.raises(files.CommandError, match="median_ms"):
        results.read(tmp_path / "x.json")


def test_result_files_and_what_is_drawn_from_them(found, tmp_path):
    path = tmp_path / "example.json"
    results.write(found, path)
    results.write_table(found, path)
    again = results.read(path)
    assert again == json.loads(json.dumps(found))
    lines = path.with_suffix(".csv").read_text().splitlines()
    assert len(lines) == len(found["rows"]) + 1
    # One number of tokens, one share of tokens alive: no line.
    assert list(plots.draw(again)) == ["relative_time"]
    assert "cut-cross-entropy: not installed" in report.markdown(again)


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.json"
    path.write_text("[]")
    with pytest.raises(files.CommandError, match="expected a result file"):
        results.read(path)


def row_of(provider, ms, **more):
    same = {"level": "logits", "shape": "8 x 8, x, float32", "direction": "both", "live": 0.5}
    same |= {"group_size": 8, "padding": 0.0, "no_signal": 0.5, "status": "ok", "median_ms": ms}
    same |= {"timer": "wall", "launched_ms": None}
    return same | {"percent_of_roof": 12.3, "roof": "copy", "peak_bytes": 4e6} | more | {
        "provider": provider
    }  # fmt: skip


def test_the_readme_table_is_the_file(tmp_path):
    rows = [
        row_of(OURS, 2.0),
        row_of("TRL", 5.0, peak_bytes=8e6),
        row_of("Liger", 1.0, status="wrong", reason="its result is off"),
        row_of("plain PyTorch", 0.0, status="unavailable", reason="not installed"),
    ]
    heads = ["logits", "live", f"{OURS}, ms", "of the roof", "peak MB", "TRL", "Liger"]
    cells = ["8 x 8, x, float32", "50%", "2", "12.3% of copy", "4", "2.50 (8 MB)", "wrong"]
    expected = report.table(heads, [cells])
    assert report.level_table("logits", rows) == expected
    assert expected.splitlines()[1] == "|---|---|---|---|---|---|---|"
    bad, absent = report.notes({"rows": rows})
    assert "Liger: wrong, its result is off" in bad and "plain PyTorch: not installed" in absent
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb"
    assert report.insert(text, "x", "new") == text.replace("old", "new")
    with pytest.raises(ValueError, match="<!-- y: begin -->"):
        report.insert(text, "y", "new")


def test_a_replayed_row_is_compared_with_one_that_is_not_as_both_are_launched():
    ours = row_of(OURS, 0.01, timer="graph", launched_ms=0.2)
    assert report.times(row_of("TRL", 0.02, timer="graph", launched_ms=0.3), ours) == 2
    assert report.times(row_of("verl", 0.8, timer="events", launched_ms=None), ours) == 4
    assert report.times(ours, row_of("x", 0.8, timer="events")) == 0.25


@pytest.mark.parametrize("suite", names.SUITES)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_suites_name_levels_and_heads_that_exist(suite, on_gpu):
    every = cases.cases_of(suite, on_gpu)
    assert len(set(every)) == len(every) and cases.EFFORTS[suite].least >= 3
    assert {case.level for case in every} == set(PROVIDERS)
    for case in every:
        if case.head is cases.NO_HEAD:  # The others draw one sequence of each group.
            assert case.n_sequences % case.group_size == 0
        assert case.tiny().tokens <= 96


def test_kept_columns_are_drawn_as_rollouts_keep_them_and_few_bytes_are_read_for_them():
    case = cases.Case(names.KEPT, 64, 512, head=cases.QWEN3_8B, dtype=cases.BF16)
    counts = cases.kept_counts(case, torch.Generator().manual_seed(0)).double()
    assert abs((counts == 1).double().mean() - 0.47) < 0.02 and counts.median() == 2
    assert abs(counts.mean() - 8) < 1 and abs(counts.quantile(0.99) - 82) < 15
    # A product reads a row of the weight for each column, and the hidden state for some of them.
    read = counts[counts > 1]
    states = (read / config.KEPT.columns).ceil().sum()
    assert read.sum() + states <= 1.3 * read.sum()


def test_report_redraws_a_file_and_writes_the_readme(found, tmp_path):
    path = tmp_path / "again.json"
    results.write(found, path)
    readme = tmp_path / "README.md"
    readme.write_text("x\n<!-- again: begin -->\n<!-- again: end -->\n")
    assert main(["bench", "report", str(path), f"--readme={readme}"]) == 0
    assert report.markdown(results.read(path)) in readme.read_text()
    assert (tmp_path / "again_relative_time.png").read_bytes().startswith(b"\x89PNG")
