import pytest

from benchmarks import report
from benchmarks.results import Result, Table, command_line, load, save, target_row


def result(benchmark="bench_made_up", machine=None, pictures=()):
    return Result(
        benchmark=benchmark,
        command="python -m benchmarks.bench_made_up --backend host",
        machine=machine or {"cpu": "2 x abacus"},
        settings={"rounds": 3},
        tables=[
            Table(
                "Beads",
                ["what", "moved"],
                [["one|two", "3"], target_row("x", "1", "2", False)[:2]],
                "By hand.",
            )
        ],
        raw={"beads": [1, 2, 3]},
        pictures=list(pictures),
    )


README = f"# Made up\n\n{report.BEGIN}\n\nold\n\n{report.END}\ntail\n"


def test_a_result_survives_its_file(tmp_path):
    path = tmp_path / "deep" / "result.json"
    save(result(), path)
    assert load(path) == result()


def test_tables_become_markdown():
    text = report.render([result(pictures=["beads.png"])], "results")
    assert "### bench_made_up: host memory" in text
    assert "`python -m benchmarks.bench_made_up --backend host`" in text
    assert "| what | moved |\n| --- | ---: |\n| one\\|two | 3 |\n| x | 1 |" in text
    assert "By hand." in text
    assert "![bench_made_up: host memory](results/beads.png)" in text


def test_the_section_is_replaced_and_nothing_else():
    once = report.insert(README, "new")
    assert once == f"# Made up\n\n{report.BEGIN}\n\nnew\n\n{report.END}\ntail\n"
    assert report.insert(once, "new") == once


@pytest.mark.parametrize("readme", ["", report.BEGIN, report.END, f"{report.END}{report.BEGIN}"])
def test_missing_markers_are_an_error(readme):
    with pytest.raises(report.ReportError, match="must hold the line"):
        report.insert(readme, "new")


def test_gpus_come_first_and_other_files_are_refused(tmp_path):
    save(result("a"), tmp_path / "a.json")
    save(result("b", {"gpu": "Abacus 80GB", "cpu": "2 x abacus"}), tmp_path / "b.json")
    assert [found.benchmark for found in report.read(tmp_path)] == ["b", "a"]
    (tmp_path / "c.json").write_text('{"benchmark": 1}')
    with pytest.raises(report.ReportError, match=r"c\.json is no benchmark result"):
        report.read(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(report.ReportError, match="no results"):
        report.read(tmp_path)


def test_commands_name_files_without_their_folders():
    arguments = ["--trace", "/somewhere/deep/trace.csv", "--out=/else/where.json", "--size", "1GiB"]
    expected = "python -m benchmarks.bench_kv --trace trace.csv --out=where.json --size 1GiB"
    assert command_line("bench_kv", arguments) == expected


def test_the_readme_shows_the_saved_results():
    results = report.README.parent / "results"
    assert list(results.glob("*.json"))
    readme = report.README.read_text()
    assert readme == report.insert(readme, report.render(report.read(results), "results"))
