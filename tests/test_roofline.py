"""The table of docs/roofline.md: each row's bound from its formula, put between the page's marks and nowhere else."""

import json
from pathlib import Path

import pytest
from cwfast.benchmarks import roofline

MACHINE = {"cpu": "Some CPU", "gpu": None, "threads": 2, "isa": "avx2", "torch": "2.0", "commit": "a" * 40,
           "date": "2030-01-02T03:04:05", "size": "full"}  # fmt: skip
OP = {"case": "saliency op float32 B=2 T=4 8-8", "flops": 100, "peak_flops": 1000, "moved_bytes": 10,
      "read_bytes": 1000, "seconds": {"cwfast": 0.5, "fma_peak": 1.0, "read": 1.0}, "ratios": {}}  # fmt: skip
STEP = {"case": "saliency step mlp", "seconds": {}, "ratios": {"over_step_cwfast": 1.25, "times_vmap": 9.0}}
SELECT = {"case": "select bfloat16 N=1e7", "seconds": {}, "ratios": {"reads": 2.125}, "dtype": "torch.bfloat16"}
REWIND = {"case": "rewind N=1e4", "seconds": {}, "ratios": {"reads_cwfast_list": 1.0}, "k": 100, "numel": 10**4}
OTHER = {"case": "freeze 5e7", "seconds": {}, "ratios": {"over_adamw": 1.1}}


def lines(*results):
    return [{**MACHINE, **result} for result in results]


def test_rows_hold_the_bounds():
    op, step, select, rewind = roofline.rows(lines(OP, STEP, SELECT, REWIND, OTHER))
    assert (op.unit, op.bound, op.measured) == ("ms, multiply-adds", 100.0, 500.0)
    assert (step.bound, step.measured) == (1.0, 1.25)
    assert (select.bound, select.measured) == (1.0625, 2.125)
    assert rewind.bound == pytest.approx(0.31208, abs=1e-5)
    slow_memory = {**OP, "moved_bytes": 200}
    assert roofline.rows(lines(slow_memory))[0].unit == "ms, bytes"
    assert roofline.rows(lines(slow_memory))[0].bound == 200.0


def test_of_equal_cases_the_last_counts():
    assert [row.measured for row in roofline.rows(lines(STEP, {**STEP, "ratios": {"over_step_cwfast": 2.0}}))] == [2.0]


def test_bfloat16_ops_have_no_bound_here():
    assert roofline.rows(lines({**OP, "seconds": {"cwfast": 1.0, "read": 1.0}})) == []


def test_table_replaces_what_is_between_the_marks(tmp_path, capsys):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    results.write_text("\n".join(json.dumps(line) for line in lines(STEP, SELECT)))
    page.write_text(f"before\n{roofline.BEGIN}\nold\n{roofline.END}\nafter\n")
    assert roofline.main([str(results)]) == 0
    printed = capsys.readouterr().out.strip()
    assert "| saliency step mlp, cwfast | ordinary steps | 1 | 1.25 | 80% | `saliency` |" in printed
    assert printed.startswith("Some CPU, 2 threads, avx2, torch 2.0, commit `aaaaaaaaaaaa`, 2030-01-02; sizes: full.")
    assert roofline.main([str(results), "--page", str(page)]) == 0
    assert page.read_text() == f"before\n{roofline.BEGIN}\n{printed}\n{roofline.END}\nafter\n"


def test_what_has_no_bound_or_no_marks_is_refused(tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page.md"
    with pytest.raises(ValueError, match="needs results that have a bound; got 1 without"):
        roofline.table(lines(OTHER))
    results.write_text(json.dumps(lines(STEP)[0]))
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        roofline.main([str(results), "--page", str(page)])
    assert page.read_text() == "no marks"


def test_the_page_has_its_marks():
    page = (Path(__file__).resolve().parent.parent / "docs/roofline.md").read_text()
    assert page.index(roofline.BEGIN) < page.index(roofline.END)
