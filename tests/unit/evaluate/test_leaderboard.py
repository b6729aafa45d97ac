"""The leaderboard: win-rate maths by hand, the published table to the last digit, the command."""

from __future__ import annotations

import csv
import io
import json
import math
import subprocess
import sys

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.cli.main import main
from birbal_ray.evaluate import leaderboard as board
from birbal_ray.evaluate.leaderboard import DERIVED, load_published, load_results
from tests.conftest import examples

STEREOTYPES = "sam_sum - Stereotypes (race)"


def run(*arguments):
    return CliRunner().invoke(main, ["leaderboard", *(str(argument) for argument in arguments)])


def rates(metric, **values):
    found = board.metric_win_rates({team: {metric: value} for team, value in values.items()})
    return {team: found[team][metric] for team in values}


def team(value, **changes):
    """Metrics that are all equally good: `value` where higher is better, 1 - value where lower is."""
    return {name: 1 - value if metric.lower_is_better else value for name, metric in board.METRICS.items()} | changes


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data / "leaderboard_4090.json").read_text())


@pytest.fixture
def write(tmp_path):
    def write(content, name="results.json"):
        file = tmp_path / name
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return file

    return write


# --- by hand ---


def test_a_win_rate_counts_the_teams_that_are_strictly_worse():
    assert rates("MMLU - EM", a=0.9, b=0.5, c=0.7, d=0.1) == {"a": 3 / 4, "b": 1 / 4, "c": 2 / 4, "d": 0}


def test_teams_that_share_a_value_get_one_kth_each():
    assert rates("MMLU - EM", a=0.5, b=0.5, c=0.7, d=0.1) == {
        "a": (1 + 1 / 2) / 4,
        "b": (1 + 1 / 2) / 4,
        "c": 3 / 4,
        "d": 0,
    }
    assert rates("MMLU - EM", a=0.0, b=0.0, c=0.0) == dict.fromkeys("abc", 1 / 9)
    assert rates("MMLU - EM", a=0.0, b=-0.0) == dict.fromkeys("ab", 1 / 4)


def test_a_value_is_shared_only_when_equal_to_the_last_bit():
    assert rates("MMLU - EM", a=2 / 3, b=math.nextafter(2 / 3, 1)) == {"a": 0, "b": 1 / 2}


def test_lower_is_better_for_stereotypes_and_representation():
    assert rates(STEREOTYPES, a=0.9, b=0.5, c=0.5) == {"a": 0, "b": (1 + 1 / 2) / 3, "c": (1 + 1 / 2) / 3}
    lower = [name for name, metric in board.METRICS.items() if metric.lower_is_better]
    assert lower == [
        f"sam_sum - {kind} ({who})" for kind in ("Stereotypes", "Representation") for who in ("race", "gender")
    ]


@pytest.mark.parametrize("metric", ["MMLU - EM", STEREOTYPES])
def test_a_missing_value_is_worse_than_any_and_can_be_shared(metric):
    worst = 1.0 if board.METRICS[metric].lower_is_better else 0.0
    assert rates(metric, a=worst, b=None) == {"a": 1 / 2, "b": 0}
    assert rates(metric, a=worst, b=None, c=None) == {"a": 2 / 3, "b": 1 / 2 / 3, "c": 1 / 2 / 3}
    absent = board.metric_win_rates({"a": {metric: worst}, "b": {}})
    assert absent["b"][metric] == 0


def test_scores_of_three_teams_by_hand():
    mixed = team(0.5) | {"BBQ - EM": 0.9, "MMLU - EM": 0.1}
    places = board.standings({"low": team(0.2), "mixed": mixed, "high": team(0.8)})
    assert [(place.rank, place.team) for place in places] == [(1, "high"), (2, "mixed"), (3, "low")]
    high, middle, low = places
    assert high.win_rates == dict.fromkeys(board.SCENARIOS, 2 / 3) | {"BBQ": 1 / 3}
    assert middle.win_rates == dict.fromkeys(board.SCENARIOS, 1 / 3) | {"BBQ": 2 / 3, "MMLU": (0 + 1 / 3 + 1 / 3) / 3}
    assert low.win_rates == dict.fromkeys(board.SCENARIOS, 0) | {"MMLU": 1 / 9}
    assert high.score_open == pytest.approx(((2 / 3) ** 4 / 3) ** (1 / 5), rel=1e-14)
    assert high.score_hidden == pytest.approx(2 / 3, rel=1e-14)
    assert high.score_full == pytest.approx(high.score_open / 3 + 4 / 9, rel=1e-14)
    assert middle.score_open == pytest.approx((2 / 9 * (1 / 3) ** 3 * 2 / 3) ** (1 / 5), rel=1e-14)
    assert low.score_hidden == 5e-324


def test_a_zero_counts_as_the_smallest_positive_double():
    assert board.geometric_mean([0.0]) == 5e-324
    assert board.geometric_mean([0.0, 1.0]) == pytest.approx(math.sqrt(5e-324), rel=1e-9)
    assert board.geometric_mean([0.0, 0.0, 0.5, 0.5]) > 0  # the plain product would be 0
    assert board.geometric_mean([0.2, 0.8]) == pytest.approx(0.4, rel=1e-14)


def test_one_team_beats_nobody():
    (place,) = board.standings({"alone": team(0.9)})
    assert place.rank == 1
    assert set(place.win_rates.values()) == {0}
    assert place.score_full < 1e-300


def test_equal_teams_share_a_rank():
    places = board.standings({"b": team(0.8), "c": team(0.1), "a": team(0.8)})
    assert [(place.rank, place.team) for place in places] == [(1, "a"), (1, "b"), (3, "c")]


def test_zeroed_scores_name_team_scenario_and_score():
    teams = {"best": team(0.9), "weak": team(0.5, **{"GSM8K - EM": 0.0, "BBQ - EM": 0.0}), "last": team(0.1)}
    found = board.zeroed_scores(board.standings(teams))
    said = "win rate 0 on {}, so {} is next to 0 whatever the others are".format
    assert ("weak", said("GSM8K and BBQ", "Score_open")) in found
    assert {team for team, _ in found} == {"weak", "last"}
    assert ("last", said(" and ".join(board.HIDDEN), "Score_hidden")) in found


def test_leave_one_out_by_hand():
    teams = {"a": team(0.9), "b": team(0.5), "c": team(0.1)}
    a, b, c = board.leave_one_out(teams)
    assert [entry.team for entry in (a, b, c)] == ["a", "b", "c"]
    assert a.without == {"b": (1, pytest.approx(1 / 2)), "c": (1, pytest.approx(1 / 2))}
    assert (b.rank, b.ranks, b.scores) == (2, (1, 2), (pytest.approx(0, abs=1e-9), pytest.approx(1 / 2)))
    assert (c.rank, c.ranks) == (3, (2, 2))


def test_placing_a_model_marks_it_and_refuses_a_name_twice(write):
    places = board.standings({"a": team(0.9), "b": team(0.1), "mine": team(0.5)}, ["mine"])
    assert [(place.team, place.added) for place in places] == [("a", False), ("mine", True), ("b", False)]
    with pytest.raises(ValueError, match="'a' is in the table already"):
        board.place_models([write({"team": "a", "metrics": {}}), write({"team": "a", "metrics": {}}, "b.json")])


# --- what holds for every table ---

values = st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1))
tables = st.dictionaries(
    st.sampled_from("abcdef"),
    st.fixed_dictionaries(dict.fromkeys(board.METRICS, values)),
    min_size=1,
)
quick = examples(60)


@quick
@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_the_teams_changes_nothing(teams, random):
    shuffled = list(teams)
    random.shuffle(shuffled)
    assert board.standings({name: teams[name] for name in shuffled}) == board.standings(teams)


@quick
@given(tables)
def test_win_rates_and_scores_stay_in_range_and_ranks_follow_the_score(teams):
    places = board.standings(teams)
    assert all(0 <= rate < 1 or len(teams) == 1 for place in places for rate in place.win_rates.values())
    assert all(0 < score < 1 for place in places for score in (place.score_open, place.score_hidden))
    for place in places:
        assert place.rank == 1 + sum(other.score_full > place.score_full for other in places)


@quick
@given(tables)
def test_win_rates_on_a_metric_equal_the_definition(teams):
    found = board.metric_win_rates(teams)
    for name, metric in board.METRICS.items():
        for one, metrics in teams.items():
            mine, worse, same = metrics[name], 0, 0
            for other in teams.values():
                theirs = other[name]
                if mine == theirs:
                    same += 1
                elif theirs is None or (mine is not None and (theirs > mine) == metric.lower_is_better):
                    worse += 1
            assert found[one][name] == (worse + (1 / same if same > 1 else 0)) / len(teams)


@quick
@given(tables)
def test_a_team_that_all_beat_lifts_every_win_rate_alike_and_comes_last(teams):
    # On one metric everybody beats one team more, among one team more. (Ranks may change all the
    # same: a geometric mean does not keep its order when every factor is shifted.)
    bounded = {
        name: {
            metric: 0.5 if value is None else 0.25 + value / 2  # away from the last team's 0 and 1
            for metric, value in metrics.items()
        }
        for name, metrics in teams.items()
    }
    before = {place.team: place for place in board.standings(bounded)}
    after = {place.team: place for place in board.standings({**bounded, "last": team(0.0)})}
    count = len(teams)
    for name, place in before.items():
        for scenario, rate in place.win_rates.items():
            assert after[name].win_rates[scenario] == pytest.approx((rate * count + 1) / (count + 1), abs=1e-12)
    assert after["last"].rank == count + 1
    assert set(after["last"].win_rates.values()) == {0}


@quick
@given(tables, st.sampled_from(sorted(board.METRICS)))
def test_a_better_value_never_costs_the_team_itself(teams, metric):
    name = min(teams)
    best = 0.0 if board.METRICS[metric].lower_is_better else 1.0
    better = {**teams, name: {**teams[name], metric: best}}
    if sum(metrics[metric] == best for metrics in better.values()) > 1:
        return  # joining a tie costs: 1/k of a win falls with k
    assert board.metric_win_rates(better)[name][metric] >= board.metric_win_rates(teams)[name][metric] - 1e-12


# --- the published table ---


def test_the_packaged_metrics_are_the_published_ones(golden):
    packaged = load_published()
    assert len(packaged) == len(golden) == 8
    for (full_name, values), (name, metrics) in zip(golden, packaged.items(), strict=True):
        assert full_name.startswith(f"{name}_")
        raw = {key: value for key, value in values.items() if key not in DERIVED}
        assert metrics == raw
        assert list(metrics) == list(board.METRICS)
        assert len(raw) == len(values) - 12


def test_all_published_win_rates_and_scores_are_recomputed(golden):
    raw = {name: {key: value for key, value in values.items() if key not in DERIVED} for name, values in golden}
    places = {place.team: place for place in board.standings(raw)}
    compared = 0
    for name, values in golden:
        place = places[name]
        for scenario in board.SCENARIOS:
            assert place.win_rates[scenario] == pytest.approx(values[f"{scenario} Mean Win Rate"], abs=1e-9)
            compared += 1
        for key, score in (
            ("Score_open", place.score_open),
            ("Score_hidden", place.score_hidden),
            ("Score_full", place.score_full),
        ):
            assert score == pytest.approx(values[key], rel=1e-9, abs=0)  # the zeroed ones too: 5.9e-66
            compared += 1
    assert compared == 8 * 12
    assert list(places) == [name for name, _ in sorted(golden, key=lambda pair: -pair[1]["Score_full"])]


def test_the_first_five_published_ranks():
    places = board.standings(load_published())
    assert [round(place.score_full, 3) for place in places[:5]] == [0.579, 0.424, 0.381, 0.371, 0.362]
    assert [place.rank for place in places] == list(range(1, 9))
    assert places[0].team == "akjindal53244"


def test_published_scores_that_one_zero_decides():
    found = board.zeroed_scores(board.standings(load_published()))
    assert {(team, what.removesuffix(" is next to 0 whatever the others are")) for team, what in found} == {
        ("agoncharenko1992", "win rate 0 on MMLU, so Score_open"),
        ("matthewdouglas", "win rate 0 on TruthfulQA and BBQ, so Score_open"),
        ("teja1729", "win rate 0 on corr2cause and MATH, so Score_hidden"),
    }


def test_the_winner_stays_first_whichever_team_is_left_out():
    table = {entry.team: entry for entry in board.leave_one_out(load_published())}
    assert table["akjindal53244"].ranks == (1, 1)
    assert table["quyanh2005"].ranks == (2, 5)
    assert all(len(entry.without) == 7 for entry in table.values())


# --- the command ---


def test_the_maths_imports_nothing_heavy():
    heavy = ("ray", "torch", "transformers", "numpy", "pyarrow", "rapidfuzz")
    code = (
        f"import sys\nimport birbal_ray.evaluate.leaderboard\nprint([name for name in {heavy} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_command_shows_the_published_table_in_three_formats():
    text = run()
    assert text.exit_code == 0
    assert "added" not in text.stdout
    assert text.stderr.splitlines()[0] == (
        "warning: agoncharenko1992: win rate 0 on MMLU, so Score_open is next to 0 whatever the others are"
    )
    assert len(text.stderr.splitlines()) == 3
    rows = json.loads(run("--format", "json").stdout)
    table = list(csv.DictReader(io.StringIO(run("--format", "csv").stdout)))
    expected = ["rank", "team", "added", *board.SCENARIOS, *board.SCORES, "Score_full"]
    assert list(rows[0]) == list(table[0]) == expected
    assert [float(row["Score_full"]) for row in table] == [row["Score_full"] for row in rows]
    assert [row["team"] for row in rows][:2] == ["akjindal53244", "mrigankraman"]
    assert not any(row["added"] for row in rows)


def test_a_model_is_placed_and_what_it_lacks_is_said(write):
    mine = write({"team": "my-model", "metrics": {"MMLU - EM": 0.9, "GSM8K - EM": 1, STEREOTYPES: None}})
    result = run("--add", mine, "--format", "json")
    rows = json.loads(result.stdout)
    assert [row["team"] for row in rows if row["added"]] == ["my-model"]
    assert len(rows) == 9
    (row,) = [row for row in rows if row["added"]]
    assert row["GSM8K"] == pytest.approx(8 / 9)
    assert row["MMLU"] == pytest.approx((8 + 0 + 0) / 9 / 3)
    missing, *warnings = result.stderr.splitlines()
    assert missing.startswith("my-model: 29 of 31 metrics missing, counted as worst: MMLU - EM (Robustness), ")
    assert STEREOTYPES in missing
    assert len(missing.split(": ")[2].split(", ")) == 29
    assert any("my-model: win rate 0 on TruthfulQA and BIG-bench and BBQ" in line for line in warnings)
    assert "yes" in run("--add", mine).stdout


def test_a_whole_model_and_several_at_once(write):
    first, second = write({"team": "x", "metrics": team(0.99)}), write({"team": "y", "metrics": team(0.01)}, "y.json")
    result = run("--add", first, "--add", second, "--format", "json")
    rows = json.loads(result.stdout)
    assert (rows[0]["team"], rows[0]["added"]) == ("x", True)
    assert [row["team"] for row in rows if row["added"]] == ["x", "y"]
    assert "missing" not in result.stderr
    sensitivity = json.loads(run("--add", first, "--leave-one-out", "--format", "json").stdout)
    assert len(sensitivity) == 9


def test_leave_one_out_on_the_command_line():
    rows = {row["team"]: row for row in json.loads(run("--leave-one-out", "--format", "json").stdout)}
    row = rows["mrigankraman"]
    assert (row["rank"], row["best rank"], row["worst rank"]) == (2, 1, 2)
    assert row["rank without akjindal53244"] == 1
    assert row["rank without mrigankraman"] is row["Score_full without mrigankraman"] is None
    assert row["lowest"] <= row["Score_full without tvergho"] <= row["highest"]
    text = run("--leave-one-out").stdout
    assert "rank without" in text.splitlines()[0]
    assert "akjindal53244" in text.splitlines()[1]
    table = list(csv.DictReader(io.StringIO(run("--leave-one-out", "--format", "csv").stdout)))
    assert table[0]["Score_full without teja1729"]


def test_results_are_read_as_numbers(write):
    assert load_results(write('\ufeff{"team": "x", "metrics": {"BBQ - EM": 1}, "note": "ours"}')) == (
        "x",
        {"BBQ - EM": 1.0},
        "ours",
    )
    derived = {"BBQ - EM": 1, "BBQ Mean Win Rate": 7, "Score_full": "?"}
    assert load_results(write({"team": "x", "metrics": derived})) == ("x", {"BBQ - EM": 1.0}, "")
    for comparable, text in ((True, "comparable: by HELM"), (False, "not comparable: by HELM")):
        file = write({"team": "x", "metrics": {}, "comparable": comparable, "note": "by HELM"})
        assert load_results(file)[2] == text
        assert f"x: {text}" in run("--add", file).stderr.splitlines()
    assert (
        load_results(write({"team": "x", "metrics": {}, "comparable": False}))[2] == "not comparable: no reason given"
    )


def test_a_name_that_is_taken_gets_its_folder_s(write):
    files = [write({"team": "x", "metrics": {}}, f"{number}.json") for number in range(3)]
    teams, places, notes = board.place_models(files, {files[1]: "harness-few", files[2]: "helm"})
    names = ["x", "x (harness-few)", "x (helm)"]
    assert list(teams)[8:] == sorted(place.team for place in places if place.added) == names
    assert [team for team, what in notes if what.startswith("31 of 31 metrics missing")] == names


def result_of(metrics):
    return {"team": "x", "metrics": metrics}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (result_of({"mmlu - em": 0.5}), "unknown metric 'mmlu - em'"),
        (result_of({"ethics_justise - EM": 0.5}), "(did you mean 'ethics_justice - EM'?)"),
        (result_of({"": 0.5}), "unknown metric ''"),
        (result_of({"BBQ - EM": "0.5"}), "metrics.BBQ - EM = '0.5': input should be a valid number"),
        (result_of({"BBQ - EM": True}), "metrics.BBQ - EM = True: input should be a valid number"),
        (result_of({"BBQ - EM": 61.2}), "metrics.BBQ - EM = 61.2: input should be less than or equal to 1"),
        (result_of({"BBQ - EM": -0.1}), "metrics.BBQ - EM = -0.1: input should be greater than or equal to 0"),
        (result_of({"BBQ - EM": math.nan}), "metrics.BBQ - EM = nan: input should be a finite number"),
        (result_of({"BBQ - EM": math.inf}), "metrics.BBQ - EM = inf: input should be a finite number"),
        (result_of({"BBQ - EM": 10**400}), "metrics.BBQ - EM = 1000000"),
        (result_of({"BBQ - EM": [0.5]}), "metrics.BBQ - EM = [0.5]: input should be a valid number"),
        (result_of([]), "metrics = []: input should be a valid dictionary"),
        ({"team": 7, "metrics": {}}, "team = 7: input should be a valid string"),
        ({"team": " ", "metrics": {}}, "team = ' ': string should match pattern"),
        ({"team": "x"}, "'metrics' is required"),
        ({"metrics": {}}, "'team' is required"),
        ({"team": "x", "metrics": {}, "comparable": "no"}, "comparable = 'no': input should be a valid boolean"),
        ([1], "[1]: input should be a valid dictionary"),
        ({"team": "tvergho", "metrics": {}}, "team 'tvergho' is in the table already; give the model another name"),
        ('{"team": "x", "metrics": {"BBQ - EM": 0.1, "BBQ - EM": 0.2}}', "the key 'BBQ - EM' is given twice"),
        ('{"team": ', "can't be read as JSON"),
        ("", "can't be read as JSON"),
        ("[" * 100_000, "can't be read as JSON"),
    ],
)
def test_bad_results_are_exit_code_2_with_one_line(write, content, reason):
    file = write(content)
    result = run("--add", file)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith(f"error: {file}: ")
    assert reason in line


def test_absent_files_and_repeated_models_are_exit_code_2(write, tmp_path):
    result = run("--add", tmp_path / "absent.json")
    assert (result.exit_code, "absent.json: no such file" in result.stderr) == (2, True)
    assert run("--add", tmp_path).exit_code == 2
    mine = write(result_of({}))
    result = run("--add", mine, "--add", mine)
    assert result.exit_code == 2
    assert "team 'x' is in the table already" in result.stderr
