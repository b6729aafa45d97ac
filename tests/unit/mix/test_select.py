"""Properties of the selection on made-up columns."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from birbal_ray.mix.config import MixConfig
from birbal_ray.mix.features import Flags, row_hashes, shuffle_hashes
from birbal_ray.mix.select import BUCKETS, NO_DUPLICATE, Candidates, Group, Reason, decide
from birbal_ray.ni.schema import hash_order
from birbal_ray.settings import ConfigError
from tests.conftest import examples

GROUPS = [
    Group("a", "natural_instructions", "exact_match", 0.2),
    Group("b", "natural_instructions", "exact_match", 0.8),
    Group("c", "natural_instructions", "generation", 0.5),
    Group("d", "natural_instructions", "generation", 0.1),
    Group("out", "out", None, None, max_rows=7),
]
FLAGS = [0, 0, 0, 0, Flags.ERROR, Flags.TOO_LONG, Flags.SHORT_INPUT, Flags.EMPTY_OUTPUT, Flags.LLM_WRITTEN, Flags.NGRAM]


def columns(count, seed, keys=None):
    rng = np.random.default_rng(seed)
    group = rng.integers(0, len(GROUPS), count).astype(np.int32)
    exact = group < 2
    score = np.where(exact, rng.integers(0, 2, count), rng.random(count).round(2))
    score[group == 4] = np.nan
    return Candidates(
        group=group,
        row_hash=rng.permutation(count).astype(np.uint64),
        shuffle_hash=rng.permutation(count).astype(np.uint64),
        key=rng.integers(0, keys or 4 * count + 1, count).astype(np.uint64),
        score=score,
        published=score.copy(),
        flags=np.array([FLAGS[i] for i in rng.integers(0, len(FLAGS), count)], np.uint16),
    )


def permuted(rows, order):
    return Candidates(*(getattr(rows, name)[order] for name in Candidates.__dataclass_fields__))


@examples(150)
@given(
    st.integers(0, 400),
    st.integers(0, 10_000),
    st.sampled_from(["task_score", "birbal_2023"]),
    st.integers(0, 120),
    st.sampled_from([None, 20]),
)
def test_the_order_of_the_rows_changes_nothing(count, seed, policy, budget, keys):
    rows = columns(count, seed, keys)
    config = MixConfig(
        policy=policy,
        task_score={"exact_match_budget": budget, "generation_budget": budget, "allow_shortfall": True},
    )
    order = np.random.default_rng(seed + 1).permutation(count)
    straight, mixed = decide(rows, GROUPS, config), decide(permuted(rows, order), GROUPS, config)
    assert (straight.reason[order] == mixed.reason).all()
    assert (straight.bucket[order] == mixed.bucket).all()
    assert (straight.rank[order] == mixed.rank).all()
    repeats = np.where(straight.duplicate_of == NO_DUPLICATE, NO_DUPLICATE, straight.duplicate_of)
    back = np.argsort(order) if count else order
    expected = np.array([NO_DUPLICATE if t == NO_DUPLICATE else back[t] for t in repeats[order]], np.int64)
    assert (expected == mixed.duplicate_of).all()


@examples(150)
@given(st.integers(0, 400), st.integers(0, 10_000), st.integers(0, 150), st.integers(0, 150))
def test_budgets_and_buckets(count, seed, exact, generation):
    rows = columns(count, seed)
    config = MixConfig(
        task_score={"exact_match_budget": exact, "generation_budget": generation, "allow_shortfall": True}
    )
    result = decide(rows, GROUPS, config)
    kept = result.reason == Reason.KEPT
    for label, budget in (("exact_match", exact), ("generation", generation)):
        mine = np.isin(rows.group, [i for i, g in enumerate(GROUPS) if g.label == label])
        assert kept[mine].sum() == budget - result.allocations[label].shortfall
    assert kept[rows.group == 4].sum() <= 7
    assert not kept[(rows.flags & (Flags.ERROR | Flags.LLM_WRITTEN | Flags.TOO_LONG)) != 0].any()
    assert len(np.unique(rows.key[kept])) == kept.sum()
    failed = np.array([BUCKETS[b] == "failed" for b in result.bucket], bool)
    for number in range(4):  # a kept "rest" row means no failed row of the task was left over
        mine = rows.group == number
        if (kept & mine & ~failed).any():
            assert not (mine & failed & (result.reason == Reason.OVER_ALLOCATION)).any()
    assert sorted(result.rank) == list(range(count))
    assert (result.rank[kept] < result.num_kept).all()
    by_rank = rows.shuffle_hash[kept][np.argsort(result.rank[kept])]
    assert (np.diff(by_rank.astype(np.int64)) > 0).all()


def test_hand_computed_mix():
    # One exact-match task of 4 rows (two failed), one generation task of 3, budgets 3 and 2.
    rows = Candidates(
        group=np.array([0, 0, 0, 0, 2, 2, 2], np.int32),
        row_hash=np.array([4, 3, 2, 1, 7, 6, 5], np.uint64),
        shuffle_hash=np.array([0, 1, 2, 3, 4, 5, 6], np.uint64),
        key=np.array([1, 2, 3, 4, 5, 6, 6], np.uint64),
        score=np.array([0.0, 1.0, 1.0, 0.0, 0.1, 0.9, 0.2]),
        published=np.full(7, np.nan),
        flags=np.zeros(7, np.uint16),
    )
    config = MixConfig(task_score={"exact_match_budget": 3, "generation_budget": 2})
    result = decide(rows, GROUPS, config)
    # rows 0 and 3 failed; of 1 and 2 the smaller hash (row 2) comes first; row 6 repeats row 5
    assert [Reason(r).word for r in result.reason] == [
        *("kept", "over_allocation", "kept", "kept", "kept", "kept", "duplicate")
    ]
    assert [BUCKETS[b] for b in result.bucket[:6]] == ["failed", "rest", "rest", "failed", "failed", "rest"]
    assert result.duplicate_of.tolist() == [-1, -1, -1, -1, -1, -1, 5]
    assert result.rank.tolist() == [0, 5, 1, 2, 3, 4, 6]
    assert result.usable.tolist() == [4, 0, 2, 0, 0] and result.allocated.tolist() == [3, 0, 2, 0, 0]


def test_published_ladder_by_hand():
    # Task b: 10 rows, 8 correct → accuracy 0.8, cap int(100 · 0.01) = 1 of the 2 wrong ones.
    # Task d: 5 rows below 0.2 → 4 drawn; 5 in [0.2, 0.3) → 1 drawn; 1 at 0.8 → none.
    ladder = [1.0] * 8 + [0.0] * 2 + [0.1] * 5 + [0.25] * 5 + [0.8]
    count = len(ladder)
    rows = Candidates(
        group=np.array([1] * 10 + [3] * 11, np.int32),
        row_hash=np.arange(count, dtype=np.uint64),
        shuffle_hash=np.arange(count, dtype=np.uint64),
        key=np.arange(count, dtype=np.uint64),
        score=np.array(ladder),
        published=np.array(ladder),
        flags=np.array([0] * 10 + [Flags.SEVERAL_REFERENCES] + [0] * 10, np.uint16),
    )
    result = decide(rows, GROUPS, MixConfig(policy="birbal_2023", birbal_2023={"factor": 0.01}))
    words = [Reason(r).word for r in result.reason]
    assert words[:10] == ["answered_correctly"] * 8 + ["kept", "over_cap"]
    assert words[10:] == [
        *("several_references", "kept", "kept", "kept", "not_drawn"),  # drawn first, then filtered, as published
        *("kept", "not_drawn", "not_drawn", "not_drawn", "not_drawn", "answered_well"),
    ]
    assert BUCKETS[result.bucket[8]] == "accuracy_8" and BUCKETS[result.bucket[16]] == "rouge_0.2"


def test_published_band_edges():
    scores = np.array([0.0, 0.1999, 0.2, 0.45, 0.7999, 0.8, 1.0])
    order = np.arange(len(scores), dtype=np.uint64)
    group, flags = np.full(len(scores), 3, np.int32), np.zeros(len(scores), np.uint16)
    result = decide(
        Candidates(group, order, order, order, scores, scores, flags), GROUPS, MixConfig(policy="birbal_2023")
    )
    edges = ("0.0", "0.0", "0.2", "0.4", "0.7", "0.8", "0.8")
    assert [BUCKETS[bucket] for bucket in result.bucket] == [f"rouge_{edge}" for edge in edges]
    answered_well = [Reason(reason) is Reason.ANSWERED_WELL for reason in result.reason]
    assert answered_well == [False] * 5 + [True] * 2


def test_budget_that_cannot_be_met():
    with pytest.raises(ConfigError, match=r"task_score.generation_budget = 3: only 0 generation candidates"):
        decide(columns(0, 0), GROUPS, MixConfig(task_score={"exact_match_budget": 0, "generation_budget": 3}))


def test_rows_of_a_task_come_in_the_order_that_scoring_takes_them():
    ids = [f"task{n % 3}:{n}" for n in range(50)]
    hashes = row_hashes([row_id.encode() for row_id in ids], 7)
    assert hashes.tolist() == [int.from_bytes(hash_order(row_id, 7), "big") for row_id in ids]
    shuffled = shuffle_hashes(hashes)
    assert len(set(shuffled.tolist())) == 50 and np.argsort(shuffled).tolist() != np.argsort(hashes).tolist()
