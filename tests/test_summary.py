"""The screen at the end of a run, as a log gets it."""

from __future__ import annotations

import io

from rich.console import Console

from hjepa.summary import Summary, show

ADDRESS = f"s3://bucket/{'prefix/' * 20}"


def test_show__breaks_no_address_where_it_is_no_terminal() -> None:
    registration = {
        "name": "model",
        "version": 2,
        "alias": "challenger",
        "reason": "the champion of before is better",
        "mlflow_run_url": f"http://127.0.0.1:5000/#/{'a' * 100}",
        "compare_url": f"http://127.0.0.1:5000/#/compare?runs=[{'b' * 100}]",
    }
    row = {"encoder": "trained", "level": "all", "knn_top1": 0.5}
    gains = {f"{part}/{name}": 0.01 for part in ("gain", "gain/mean") for name in ("knn_top1", "linear_top1")}
    summary = Summary(
        dataset={"uri": f"{ADDRESS}data", "bytes_uploaded": 1000, "quarantine": {"total": 6}},
        checkpoint={"uri": f"{ADDRESS}point.pth"},
        model={"uri": f"{ADDRESS}model"},
        evaluation={"split": {"train": 10, "test": 2}, "table": [row], "metrics": gains},
        registration=registration,
        step_seconds={"train": 3.0},
        overhead_seconds=1.0,
        commands=[("train longer", f"hjepa run {'--set training.epochs=100 ' * 8}")],
    )
    console = Console(file=io.StringIO(), width=80)
    show(summary, console)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    for address in (summary.checkpoint["uri"], registration["mlflow_run_url"], registration["compare_url"]):
        (line,) = [line for line in lines if address in line]
        assert line.endswith(address)
    named = [line for line in lines if line.startswith(("gain over random init, all", "model", "registered"))]
    assert {line.index(value) for line, value in zip(named, ("k-NN", "s3:", "model v"), strict=True)} == {29}
    assert " " * 29 + registration["reason"] in lines
    assert any(line.endswith("(1,000 bytes uploaded, 6 files quarantined)") for line in lines)
