"""`mapo-kernels bench codegen`: its bounds, and its rows for one architecture."""

import pytest

from benchmarks import codegen


def test_bounds_by_hand():
    gpu = codegen.Gpu("x", "sm_90", terabytes_per_second=4.0, multiprocessors=100, gigahertz=2.0)
    # 100 multiprocessors at 2 GHz: 0.2 clocks a picosecond; 25.6 instructions, 3.2 exponentials.
    bounds = gpu.bounds({"bytes": 4, "instructions": 12.8, "exponentials": 1.6})
    assert bounds == pytest.approx({"memory": 1.0, "instructions": 0.5, "exponentials": 0.5})


@pytest.mark.slow
def test_static_table_of_one_architecture(monkeypatch):
    pytest.importorskip("triton")
    rows = codegen.compile_for("sm_90")
    assert {row["kernel"] for row in rows} == {title for _, title, *_ in codegen.PARTS}
    for row in rows:
        assert row["spills"] == 0 and 0 < row["registers"] <= 128
    monkeypatch.setattr(codegen, "compile_for", lambda target: rows)
    heads, _, *lines = codegen.static_table().splitlines()
    assert len(lines) == len(codegen.GPUS) * len(rows)
    assert {line.count("|") for line in lines} == {heads.count("|")}
    passes = {row["part"]: row for row in rows if row["kernel"] == "loss from bfloat16 logits"}
    assert passes["both passes"]["bytes"] == 4
    assert passes["gradient pass"]["exponentials"] <= 1.05
    (tokens,) = [row for row in rows if row["part"] == "a token"]
    assert 20 < tokens["instructions"] < 130
