# videoattn
"""The tables are appended to as they should be, and a bar is ok only if a current, clean row reaches it."""

import subprocess

import pytest

from videoattn.benchmarks import results, targets

ENV = {
    "date": "2030-01-02T00:00:00Z",
    "commit": "",
    "dirty": "no",
    "gpu": "Some GPU",
    "driver": "1",
    "torch": "2",
    "triton": "3",
    "diffusers": "0",
}
TIMING = dict.fromkeys(results.COLUMNS[len(results.ENVIRONMENT) :], "")


@pytest.fixture
def repository(tmp_path):
    """Two commits: the first brings kernel.py and other.py, the second changes other.py."""
    git(tmp_path, "init", "-q")
    (tmp_path / "kernel.py").write_text("1")
    (tmp_path / "other.py").write_text("1")
    commit(tmp_path, "first")
    (tmp_path / "other.py").write_text("2")
    commit(tmp_path, "second")
    return tmp_path


def git(folder, *arguments):
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder, message):
    git(folder, "add", ".")
    git(folder, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", message)


def append(repository, rows, *, back=0, name="speed", **env):
    """Rows measured ``back`` commits ago."""
    env = {**ENV, "commit": git(repository, "rev-parse", f"HEAD~{back}"), **env}
    results.append(name, [{**TIMING, **row} for row in rows], env, repository / "results")
    targets._table.cache_clear()
    targets._current.cache_clear()


def stand(repository, **change):
    base = {"id": "a", "what": "", "csv": "speed", "where": {"kernel": "ours"}, "metric": "ratio", "agg": "min"}
    target = targets.Target(**{**base, "better": "higher", "at_least": 1.5, "files": ("kernel.py",), **change})
    return targets.standing(target, repository / "results", repository)


def test_ok_short_and_missing(repository):
    assert stand(repository).status == "missing"
    append(repository, [{"kernel": "ours", "ratio": 2.0}, {"kernel": "theirs", "ratio": 0.5}])
    assert (stand(repository).status, stand(repository).figure) == ("ok", 2.0)
    assert stand(repository, at_least=2.5).status == "short"
    assert stand(repository, better="lower").status == "short"
    assert stand(repository, better="lower", at_least=2).status == "ok"
    assert stand(repository, where={"kernel": "nobody's"}).status == "missing"
    assert stand(repository, metric="gbs").status == "missing"


def test_a_row_older_than_the_last_change_of_its_files_is_stale(repository):
    append(repository, [{"kernel": "ours", "ratio": 2.0}], back=1)
    assert stand(repository, files=("kernel.py",)).status == "ok"
    assert stand(repository, files=("kernel.py", "other.py")).status == "stale"
    append(repository, [{"kernel": "ours", "ratio": 2.0}], date="2030-01-03T00:00:00Z")
    assert stand(repository, files=("kernel.py", "other.py")).status == "ok"


@pytest.mark.parametrize("env", [{"dirty": "yes"}, {"commit": "0" * 40}])
def test_a_row_from_uncommitted_or_unknown_code_is_stale(repository, env):
    append(repository, [{"kernel": "ours", "ratio": 2.0}], **env)
    assert stand(repository).status == "stale"


def test_the_newest_of_alike_rows_counts(repository):
    append(repository, [{"kernel": "ours", "case": "x", "ratio": 2.0}])
    append(repository, [{"kernel": "ours", "case": "x", "ratio": 1.0}], date="2030-01-03T00:00:00Z")
    append(repository, [{"kernel": "ours", "case": "x", "ratio": 3.0}], date="2030-01-01T00:00:00Z")
    assert (stand(repository).status, stand(repository).figure) == ("short", 1.0)


def test_what_a_run_chose_makes_no_other_row(repository):
    append(repository, [{"kernel": "theirs", "case": "x", "ratio": 2.0}], date="2030-01-01T00:00:00Z")
    append(repository, [{"kernel": "ours", "case": "x", "ratio": 3.0}])
    bar = {"where": {}, "agg": "min"}
    assert stand(repository, **bar).figure == 2.0
    assert stand(repository, **bar, chosen=("kernel",)).figure == 3.0


def test_several_rows_become_one_figure(repository):
    rows = [{"kernel": "ours", "case": str(ratio), "ratio": ratio} for ratio in (1.0, 2.0, 4.0)]
    append(repository, rows)
    figures = {agg: stand(repository, agg=agg).figure for agg in ("min", "max", "geomean")}
    assert figures == {"min": 1.0, "max": 4.0, "geomean": pytest.approx(2.0)}
    assert stand(repository, agg="max", where={"case": ["1.0", "2.0"]}).figure == 2.0


def test_derived_metrics(repository):
    rows = [
        {"kernel": "ours", "case": "x", "verdict": "slower", "ratio": 0.8, "baseline_ms": 0.1},
        {"kernel": "ours", "case": "y", "verdict": "faster", "ratio": 1.25, "baseline_ms": 0.1},
    ]
    append(repository, rows)
    bar = {"better": "lower", "at_least": 0, "agg": "max"}
    assert (stand(repository, metric="slower", **bar).status, stand(repository, metric="slower", **bar).figure) == (
        "short",
        1,
    )
    assert stand(repository, metric="slower", **bar, where={"case": "y"}).status == "ok"
    assert stand(repository, metric="added_us", **bar).figure == pytest.approx(25.0)
    assert stand(repository, metric="time_ratio", **bar).figure == pytest.approx(1.25)


def test_the_command_fails_unless_all_are_ok(repository, capsys):
    file = repository / "targets.toml"
    file.write_text(
        '[[target]]\nid = "a.b"\nwhat = ""\ncsv = "speed"\nwhere = { kernel = "ours" }\nmetric = "ratio"\nagg = "min"\n'
        'better = "higher"\nat_least = 1.5\naim = 3\nfiles = ["kernel.py"]\n'
    )
    arguments = ["--targets", str(file), "--results", str(repository / "results"), "--repository", str(repository)]
    assert targets.main(arguments) == 1
    assert capsys.readouterr().out.startswith("missing  a.b")
    append(repository, [{"kernel": "ours", "ratio": 2.0}])
    assert targets.main(arguments) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert line.split() == ["ok", "a.b", "2", ">=", "1.5", "aim", "3", git(repository, "rev-parse", "HEAD")[:10]]


def test_a_target_that_is_not_well_formed_is_refused(tmp_path):
    good = {"id": "a", "what": "", "csv": "c", "where": {}, "metric": "ratio", "better": "higher", "at_least": 1.0}
    with pytest.raises(ValueError, match="agg"):
        targets.Target(**good, agg="mean")
    row = '[[target]]\nid = "a"\nwhat = ""\ncsv = "c"\nwhere = {}\nmetric = "m"\nagg = "min"\nbetter = "higher"\nat_least = 1\n'
    (tmp_path / "t.toml").write_text(row + row)
    with pytest.raises(ValueError, match="every id once"):
        targets.read(tmp_path / "t.toml")


def test_the_project_s_own_targets_are_well_formed():
    mine = targets.read(results.HERE / "targets.toml")
    assert len(mine) > 100
    timing, figures = set(results.COLUMNS), set(results.FIGURE_COLUMNS)
    for target in mine:
        known = figures if target.metric == "value" else timing
        assert set(target.where) <= known, target.id
        assert target.metric in known or target.metric in targets.DERIVED, target.id


def test_tables_grow_by_whole_rows_only(tmp_path):
    row = {**TIMING, "case": "x", "ratio": 1.23456789}
    results.append("speed", [row], ENV, tmp_path)
    results.append("speed", [row], ENV, tmp_path)
    rows = results.read(tmp_path / "speed.csv")
    assert tuple(rows[0]) == results.COLUMNS
    assert len(rows) == 2 and rows[0]["ratio"] == "1.2346" and rows[0]["gpu"] == "Some GPU"
    with pytest.raises(ValueError, match="columns"):
        results.append("speed", [{"case": "x"}], ENV, tmp_path)
    with pytest.raises(ValueError, match="header"):
        results.append_figures("speed", [{"case": "x", "metric": "m", "value": 1, "unit": "s"}], ENV, tmp_path)
    assert len(results.read(tmp_path / "speed.csv")) == 2


def test_figures_measured_elsewhere_are_appended(tmp_path):
    results.append("speed", [TIMING], ENV, tmp_path / "elsewhere")
    results.append_figures(
        "other", [{"case": "x", "metric": "m", "value": 1, "unit": "s"}], ENV, tmp_path / "elsewhere"
    )
    files = [str(tmp_path / "elsewhere" / name) for name in ("speed.csv", "other.csv")]
    for _ in range(2):
        assert results.main([*files, "--results", str(tmp_path / "here")]) == 0
    assert len(results.read(tmp_path / "here" / "speed.csv")) == len(results.read(tmp_path / "here" / "other.csv")) == 2


def test_the_commit_may_be_named_where_there_is_no_git(tmp_path):
    assert results.environment("abc123")["dirty"] == "no"
    (tmp_path / "commit").write_text("abc123-dirty\n")
    env = results.environment(str(tmp_path / "commit"))
    assert (env["commit"], env["dirty"]) == ("abc123", "yes")
    assert set(env) == set(results.ENVIRONMENT)
