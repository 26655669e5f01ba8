"""Findings: what fails, and how those of the ranks become one."""

from mocov3_ds.checks.finding import Finding, judge_errors, judge_problem, merge_findings


def test_a_failing_rank_is_named_and_the_worst_wins() -> None:
    good = Finding("disk", "pass", "100 MB/s")
    bad = Finding("disk", "fail", "read-only", remedy="mount it")
    [finding] = merge_findings([[good], [bad], [good], [bad]], ["a", "b", "c", "d"])
    assert finding.status == "fail"
    assert finding.measured == "rank 1 on b and 1 more (3): read-only"
    assert finding.remedy == "mount it"
    assert merge_findings([[good], [good]], ["a", "b"]) == [good]
    # a rank whose check raised says so beside what the others found
    alone = Finding("run folder", "fail", "OSError: gone")
    assert [f.name for f in merge_findings([[good], [alone]], ["a", "b"])] == ["disk", "run folder"]


def test_what_is_not_a_number_fails() -> None:
    assert judge_errors("x", {"a": 1e-7, "b": float("nan")}, 1e-5, "mend").status == "fail"
    assert judge_errors("x", {"a": 1e-7}, 1e-5, "mend") == Finding(
        "x", "pass", "a 1.0e-07", "<= 1e-05", "", {"a": 1e-7}
    )


def test_a_problem_in_words_takes_the_place_of_the_measurement() -> None:
    good = judge_problem("x", "1 MB/s", "fast", problem="", remedy="mend")
    assert good == Finding("x", "pass", "1 MB/s", "fast")
    bad = judge_problem("x", "1 MB/s", "fast", problem="too slow", remedy="mend")
    assert (bad.status, bad.measured, bad.remedy) == ("fail", "too slow", "mend")
    counted = judge_problem("x", "1 MB/s", "fast", problem=3, remedy="mend")
    assert (counted.status, counted.measured) == ("fail", "1 MB/s")


def test_the_file_has_the_names_that_programs_know() -> None:
    assert Finding("x", "pass", "1", "2").as_json() == {
        "name": "x", "status": "pass", "measured": "1", "wanted": "2", "remedy": "", "numbers": {}
    }  # fmt: skip


def test_the_file_holds_no_number_that_json_does_not_know() -> None:
    numbers = {"a": float("nan"), "b": float("inf"), "c": 1.5}
    tree = Finding("x", "fail", "1", "2", "mend", numbers).as_json()
    assert tree["numbers"] == {"a": "nan", "b": "inf", "c": 1.5}
